"""What operations return: named results, and handles that later operations take.

Results are named tuples, so they unpack like DeepEP V1's. A handle belongs to the Buffer that made it,
has named fields, can be indexed where users of DeepEP V1 index its tuple, and is a JAX pytree: its arrays
are leaves (int32 and bool only, which JAX keeps exactly), its sizes and its Buffer's id are static.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArrayView, StreamRef, array_spec, export_any, import_array, to_device, to_host
from epcomm.event import EventOverlap

__all__ = [
    "CombineResult",
    "DispatchHandle",
    "DispatchResult",
    "LayoutResult",
    "LowLatencyCombineResult",
    "LowLatencyDispatchResult",
    "LowLatencyHandle",
    "register_pytrees",
]


class LayoutResult(NamedTuple):
    """Result of ``Buffer.get_dispatch_layout``; R ranks, E experts, T tokens."""

    num_tokens_per_rank: Any  # int32 [R]
    num_tokens_per_rdma_rank: Any  # int32 [num_nodes], None on one node
    num_tokens_per_expert: Any  # int32 [E]
    is_token_in_rank: Any  # bool [T, R]
    event: EventOverlap

    def arguments(self) -> dict[str, Any]:
        """The layout as keyword arguments of ``Buffer.dispatch``."""
        return {name: value for name, value in self._asdict().items() if name != "event"}


class DispatchResult(NamedTuple):
    """Result of ``Buffer.dispatch``; N received rows."""

    recv_x: Any  # [N, hidden], or (rows, scales) when scales were sent
    recv_topk_idx: Any  # [N, num_topk] local expert or -1; None for cached dispatch
    recv_topk_weights: Any  # float32 [N, num_topk], 0 where not local; None for cached dispatch
    num_recv_tokens_per_expert_list: list[int]  # rounded up to expert_alignment; empty with num_worst_tokens
    handle: DispatchHandle
    event: EventOverlap


class CombineResult(NamedTuple):
    """Result of ``Buffer.combine``."""

    combined_x: Any  # [T, hidden]
    combined_topk_weights: Any  # float32 [T, num_topk], None when no weights were passed
    event: EventOverlap


class LowLatencyDispatchResult(NamedTuple):
    """Result of ``Buffer.low_latency_dispatch``."""

    recv_x: Any  # [L, R * max_tokens, hidden] bfloat16, or (float8_e4m3fn rows, scales)
    recv_count: Any  # int32 [L]
    handle: LowLatencyHandle
    event: EventOverlap
    hook: Callable[[], None]


class LowLatencyCombineResult(NamedTuple):
    """Result of ``Buffer.low_latency_combine``."""

    combined_x: Any  # bfloat16 [T, hidden]
    event: EventOverlap
    hook: Callable[[], None]


class _Handle:
    """Indexing, export to the user's framework and the pytree protocol shared by both handles."""

    framework: str
    stream: StreamRef | None
    _LEAVES: tuple[str, ...]
    _has_travelled: ClassVar[bool] = False  # True in a handle that JAX has put together

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """A handle with these fields, all of them, which it keeps. One by one, as a frozen class sets its fields, they
        would take five times as long, in every call."""
        handle = cls.__new__(cls)
        object.__setattr__(handle, "__dict__", values)
        return handle

    def _positions(self) -> tuple[Callable[[], Any], ...]:
        raise TypeError(f"{type(self).__name__} has no positions")

    def __len__(self) -> int:
        return len(self._positions())

    def __getitem__(self, index: int) -> Any:
        value = self._positions()[index]()
        return self._exported(value) if isinstance(value, np.ndarray | ArrayView) else value

    def _exported(self, value: Any) -> Any:
        return export_any(value, self.framework, self.stream)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        # JAX's transformations know NumPy and JAX arrays.
        values = (getattr(self, name) for name in self._LEAVES)
        leaves = tuple(self._exported(value) if isinstance(value, ArrayView) else value for value in values)
        names = [f.name for f in fields(self) if f.name not in self._LEAVES]  # type: ignore[arg-type]
        return leaves, tuple((name, getattr(self, name)) for name in names)

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple[str, Any], ...], leaves: tuple[Any, ...]) -> Self:
        handle = cls(**dict(static), **dict(zip(cls._LEAVES, leaves, strict=True)))
        object.__setattr__(handle, "_has_travelled", True)
        return handle

    def with_own_leaves(self, stream: int | None) -> Self:
        """The same handle with every leaf as the backend made it, after a trip through a JAX transformation.

        Args:
            stream: the CUDA stream that is going to read the leaves; None on the host backend.
        """
        if not self._has_travelled:
            return self
        foreign = {
            name: leaf
            for name in self._LEAVES
            if (leaf := getattr(self, name)) is not None and not isinstance(leaf, np.ndarray | ArrayView)
        }
        if not foreign:
            return self
        own: dict[str, Any]
        if stream is None:
            own = {name: np.asarray(leaf) for name, leaf in foreign.items()}
        else:
            own = {name: import_array(leaf, f"handle.{name}", stream=stream) for name, leaf in foreign.items()}
        return replace(self, **own)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class DispatchHandle(_Handle):
    """Everything a cached dispatch and a combine need to know of a dispatch.

    Indexing follows DeepEP V1: on one node ``handle[0]`` is `rank_prefix_matrix`, ``handle[3]`` is
    `recv_src_idx` and ``handle[4]`` is `is_token_in_rank`; on several nodes ``handle[0]`` is
    `is_token_in_rank`, ``handle[4]`` the prefix sum over source nodes and ``handle[-4]`` the prefix sum over
    all source ranks. The matrices that describe DeepEP's ring queues have no meaning here and are None.

    Attributes:
        is_token_in_rank: bool ``[T, R]``, where each of this rank's tokens went.
        rank_prefix_matrix: int32 ``[R, R]``; entry [i, j] is the number of rows ranks 0..i sent to rank j.
        recv_src_idx: int32 ``[N]``, the source's token index of every received row.
        forward_mask: bool ``[F, local_ranks]``; on several nodes, the local ranks to which this rank forwarded
            each row that came from the ranks with its own local index; None on one node and on the CUDA backend.
        forward_counts: int32 ``[num_nodes]``, those rows by source node; else None.
        buffer_id: id of the Buffer that made the handle.
        dispatch_id: which of that Buffer's dispatches; equal on all ranks.
        rank, num_tokens, num_rows, num_topk, hidden, num_experts, ranks_per_node, num_worst_tokens: sizes;
            num_rows is the number of rows of ``recv_x``, padding included.
        framework: the framework in which indexing returns arrays.
        send_pos: int32 ``[T, R]`` on the CUDA backend: the index of each of this rank's rows within (this rank,
            destination), or -1; else None.
        stream: the CUDA stream in which the dispatch ran; None on the host backend.

    On the CUDA backend the arrays are in GPU memory (`epcomm.arrays.ArrayView`); indexing gives arrays of `framework`.
    """

    is_token_in_rank: Any
    rank_prefix_matrix: Any
    recv_src_idx: Any
    forward_mask: NDArray[np.bool_] | None
    forward_counts: Any
    buffer_id: int
    dispatch_id: int
    rank: int
    num_tokens: int
    num_rows: int
    num_topk: int
    hidden: int
    num_experts: int
    ranks_per_node: int
    num_worst_tokens: int
    framework: str
    send_pos: Any = None
    stream: StreamRef | None = None

    _LEAVES = ("is_token_in_rank", "rank_prefix_matrix", "recv_src_idx", "forward_mask", "forward_counts", "send_pos")

    @property
    def recv_rank_prefix_sum(self) -> NDArray[np.int32]:
        """int32 ``[R]``: rows received from ranks 0..i. On the CUDA backend it blocks until the dispatch is done."""
        # A replayed graph, which can only hold dispatches with num_worst_tokens, changes the matrix.
        return self._read_prefix_sum() if self.num_worst_tokens and self.stream else self._prefix_sum

    @cached_property
    def _prefix_sum(self) -> NDArray[np.int32]:
        return self._read_prefix_sum()

    def _read_prefix_sum(self) -> NDArray[np.int32]:
        if self.stream is None:
            values = np.asarray(self.rank_prefix_matrix)
        else:
            values = to_host(self.with_own_leaves(self.stream.ptr).rank_prefix_matrix, self.stream.ptr)
        return np.ascontiguousarray(values[:, self.rank])

    @property
    def num_recv_tokens(self) -> int:
        """Rows received: padding not counted, rows beyond `num_worst_tokens` dropped."""
        return min(int(self.recv_rank_prefix_sum[-1]), self.num_rows)

    def _where_the_rows_are(self, values: NDArray[np.int32]) -> NDArray[np.int32] | ArrayView:
        """The same in the memory of the GPU, on the CUDA backend."""
        if self.stream is None:
            return values
        return to_device(values, self.with_own_leaves(self.stream.ptr).send_pos.device[1], self.stream.ptr)

    def _recv_node_prefix_sum(self) -> NDArray[np.int32]:
        if self.stream is None:
            counts = np.asarray(self.forward_counts)
        else:
            counts = to_host(self.with_own_leaves(self.stream.ptr).forward_counts, self.stream.ptr)
        return np.cumsum(counts, dtype=np.int32)

    def _positions(self) -> tuple[Callable[[], Any], ...]:
        def absent() -> None:
            return None

        if self.forward_counts is None:
            return (
                lambda: self.rank_prefix_matrix,
                absent,
                absent,
                lambda: self.recv_src_idx,
                lambda: self.is_token_in_rank,
                absent,
            )
        prefix_sums = (
            lambda: self._where_the_rows_are(self._recv_node_prefix_sum()),
            absent,
            lambda: self._where_the_rows_are(self.recv_rank_prefix_sum),
        )
        return (lambda: self.is_token_in_rank, absent, absent, absent, *prefix_sums, absent, absent, absent)


@dataclass(frozen=True, eq=False)
class LowLatencyHandle(_Handle):
    """What a low-latency combine needs to know of its dispatch; L local experts, R ranks.

    Unpacks like DeepEP V1's tuple: ``(src_info, layout_range, num_max_dispatch_tokens_per_rank, hidden,
    num_experts)``.

    Attributes:
        src_info: int32 ``[L, R * max_tokens]``, the source's token index of every received row, -1 elsewhere.
        recv_ranges: int32 ``[L, R, 2]``, number of rows from each source rank, and the first of them.
        num_max_dispatch_tokens_per_rank, hidden, num_experts, num_tokens: sizes.
        num_topk: K.
        buffer_id: id of the Buffer that made the handle.
        dispatch_id: which of that Buffer's low-latency dispatches since its `epoch`; equal on all ranks.
        epoch: how often masked ranks had been brought back before.
        framework: the framework in which indexing returns arrays.
        send_info: int32 ``[T, K, 2]`` on the CUDA backend: the expert of each choice, and the index of the row among
            those of this rank there; -1 where nothing was sent. Else None.
        messages: int32 ``[R, max_tokens, 1 + K]`` on the CUDA backend: what came with each token, see
            ``cuda_src/sync/message.cuh``; else None.
        num_messages: int32 ``[R + 1]`` on the CUDA backend: tokens received from each rank, and the ranks that have
            sent, a bit each; else None.
        stream: the CUDA stream in which the dispatch ran; None on the host backend.
    """

    src_info: Any
    recv_ranges: Any
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    num_topk: int
    buffer_id: int
    dispatch_id: int
    epoch: int
    num_tokens: int
    framework: str
    send_info: Any = None
    messages: Any = None
    num_messages: Any = None
    stream: StreamRef | None = None

    _LEAVES = ("src_info", "recv_ranges", "send_info", "messages", "num_messages")

    @property
    def layout_range(self) -> Any:
        """int64 ``[L, R]``: ``begin << 32 | count`` of the rows from each source rank."""
        ranges = self.recv_ranges
        if isinstance(ranges, ArrayView):
            spec = array_spec(ranges.framework, ranges.shape[:2], None, np.dtype(np.int64), ranges.device)
            return ArrayView(spec, ranges.ptr, ranges.owner)
        return np.ascontiguousarray(ranges, np.int32).view(np.int64)[..., 0]

    def _positions(self) -> tuple[Callable[[], Any], ...]:
        return (
            lambda: self.src_info,
            lambda: self.layout_range,
            lambda: self.num_max_dispatch_tokens_per_rank,
            lambda: self.hidden,
            lambda: self.num_experts,
        )


_registered = False
_registration = threading.Lock()  # ranks may be threads of one process


def register_pytrees() -> None:
    """Tell JAX, if the program has imported it, that handles are pytrees. Cheap to call again."""
    global _registered
    jax = sys.modules.get("jax")
    if _registered or jax is None:
        return
    with _registration:
        if not _registered:
            for cls in (DispatchHandle, LowLatencyHandle):
                jax.tree_util.register_pytree_node(cls, cls.tree_flatten, cls.tree_unflatten)
            _registered = True
