"""What the Buffer asks of a backend: checked requests in, arrays out.

The Buffer validates shapes, dtypes and devices and wraps results for the user's framework; a backend moves and
sums rows. Every call has a `Turn`, which brings arrays in and out. Arrays in requests are views of the user's memory,
contiguous except `DispatchRequest.scales`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArrayView, Place, StreamRef
from epcomm.config import Config
from epcomm.errors import EpcommError
from epcomm.event import EventOverlap
from epcomm.handle import DispatchHandle, LowLatencyHandle

__all__ = [
    "Array",
    "Backend",
    "CombineOutcome",
    "CombineRequest",
    "DispatchOutcome",
    "DispatchRequest",
    "LayoutOutcome",
    "LowLatencyCombineRequest",
    "LowLatencyCombineTerms",
    "LowLatencyDispatchOutcome",
    "LowLatencyDispatchRequest",
    "LowLatencyDispatchTerms",
    "Rejectable",
    "Turn",
]

# What `Turn.take` makes of an argument: a NumPy array on the host backend, an ArrayView of GPU memory on CUDA.
Array: TypeAlias = Any


class Rejectable(Enum):
    """Collective operations that a rank can take part in by rejecting its own input."""

    DISPATCH = "dispatch"
    CACHED_DISPATCH = "dispatch(handle=...)"
    COMBINE = "combine"
    LOW_LATENCY_DISPATCH = "low_latency_dispatch"
    LOW_LATENCY_COMBINE = "low_latency_combine"


@dataclass(slots=True, eq=False)  # not frozen: one is made in every call, and freezing triples the time
class LayoutOutcome:
    """See `epcomm.handle.LayoutResult`."""

    num_tokens_per_rank: Array  # int32 [R]
    num_tokens_per_rdma_rank: Array | None  # int32 [num_nodes]
    num_tokens_per_expert: Array  # int32 [E]
    is_token_in_rank: Array  # bool [T, R]


@dataclass(slots=True, eq=False)
class DispatchRequest:
    """A dispatch of T rows. A cached one has a handle, and of the routing only the mask, which is the handle's."""

    x: Array  # [T, hidden]
    scales: Array | None  # [T] or [T, num_scales], any strides
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int
    config: Config
    num_sms: int
    handle: DispatchHandle | None
    is_token_in_rank: Array  # bool [T, R]
    num_tokens_per_rank: Array | None = None  # int32 [R]
    num_tokens_per_expert: Array | None = None  # int32 [E]
    topk_idx: Array | None = None  # int32 or int64 [T, num_topk]
    topk_weights: Array | None = None  # float32 [T, num_topk]


@dataclass(slots=True, eq=False)
class DispatchOutcome:
    """What a dispatch delivered; see `epcomm.handle.DispatchResult` and `DispatchHandle`.

    A cached dispatch need not repeat what its handle has: all from `rank_prefix_matrix` to `dispatch_id`.
    """

    recv_x: Array
    recv_scales: Array | None
    recv_topk_idx: Array | None = None
    recv_topk_weights: Array | None = None
    num_recv_tokens_per_expert: list[int] = field(default_factory=list)
    rank_prefix_matrix: Array | None = None  # int32 [R, R]
    recv_src_idx: Array | None = None  # int32 [N]
    is_token_in_rank: Array | None = None  # bool [T, R], for the handle: nobody else's memory
    forward_mask: Array | None = None
    forward_counts: Array | None = None
    send_pos: Array | None = None  # CUDA only: int32 [T, R], see `DispatchHandle`
    dispatch_id: int = 0
    num_dropped: int = 0  # rows that did not fit into num_worst_tokens on this rank
    num_sent: int | None = None  # rows that this rank sent; None: the host does not know


@dataclass(slots=True, eq=False)
class CombineRequest:
    """A combine of the rows of a dispatch."""

    x: Array  # [num_rows, hidden]
    topk_weights: Array | None  # float32 [num_rows, num_topk]
    biases: tuple[Array, ...]  # each [T, hidden], dtype of x
    config: Config
    num_sms: int
    handle: DispatchHandle


@dataclass(slots=True, eq=False)
class CombineOutcome:
    """Sums for this rank's tokens."""

    combined_x: Array
    combined_topk_weights: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class LowLatencyDispatchTerms:
    """What dispatches have in common that differ in addresses only: sizes and options, checked.

    Calls whose arguments look the same share the object, so a backend finds by it what it has prepared for them.
    """

    num_tokens: int
    hidden: int
    num_topk: int
    index_bytes: int  # of an element of topk_idx
    num_max_dispatch_tokens_per_rank: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    num_sms: int


@dataclass(slots=True, eq=False)
class LowLatencyDispatchRequest:
    """A low-latency dispatch of at most `num_max_dispatch_tokens_per_rank` bfloat16 rows."""

    terms: LowLatencyDispatchTerms
    x: Array  # [T, hidden]
    topk_idx: Array  # [T, num_topk]
    expert_stats: Array | None  # int32 [L], added to in place
    wait_stats: Array | None  # int64 [R], nanoseconds added in place
    is_postponed: bool  # the receive half runs later


@dataclass(slots=True, eq=False)
class LowLatencyDispatchOutcome:
    """Arrays that are filled when the receive half has run; see `epcomm.handle.LowLatencyHandle`."""

    recv_x: Array
    recv_scales: Array | None
    recv_count: Array
    src_info: Array
    recv_ranges: Array
    send_info: Array | None = None  # CUDA only, as the others
    messages: Array | None = None
    num_messages: Array | None = None
    dispatch_id: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LowLatencyCombineTerms:
    """What combines have in common that differ in addresses only; see `LowLatencyDispatchTerms`."""

    num_tokens: int
    hidden: int
    num_topk: int
    index_bytes: int
    num_max_dispatch_tokens_per_rank: int
    num_experts: int
    use_logfmt: bool  # rows travel in `epcomm.numerics.encode_logfmt`; hidden is a multiple of its block
    pre_reduce: bool  # each rank's rows of a token are summed and rounded first; not with use_logfmt or zero_copy
    zero_copy: bool  # x is what low_latency_combine_buffer returned
    is_postponed: bool  # the receive half runs later, on all ranks alike
    num_sms: int


@dataclass(slots=True, eq=False)
class LowLatencyCombineRequest:
    """A weighted sum of the rows that the experts made of a low-latency dispatch."""

    terms: LowLatencyCombineTerms
    x: Array  # bfloat16 [L, R * max_tokens, hidden]
    topk_idx: Array
    topk_weights: Array  # float32 [T, num_topk]
    handle: LowLatencyHandle
    out: Array  # bfloat16 [T, hidden]
    wait_stats: Array | None  # as in a dispatch
    is_postponed: bool  # as in a dispatch


class Turn(Protocol):
    """One call: where its arrays must lie, in which stream it runs, how its results go out. Local."""

    @property
    def place(self) -> Place:
        """Where its arrays must lie."""

    @property
    def stream(self) -> int | None:
        """The CUDA stream of the call, None on the host backend."""

    @property
    def ref(self) -> StreamRef | None:
        """The same, with what keeps it alive."""

    def take(self, view: ArrayView) -> Array:
        """An argument as the backend's requests hold it."""

    def values(self, view: ArrayView) -> NDArray[Any] | None:
        """The elements, where looking at them costs no wait; else None, and the backend checks them itself."""

    def checked_values(self, view: ArrayView) -> NDArray[Any]:
        """The elements, for ``EPCOMM_CHECK=1``; may block until they are there."""

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Memory for a result."""

    def export(self, array: Array, framework: str) -> Any:
        """A result as an array of the caller's framework."""

    def finish(self, inputs: object) -> EventOverlap:
        """End the call; `inputs` are kept as long as it reads them."""


class Backend(Protocol):
    """One rank's half of every operation. All methods but those marked *local* are collective."""

    name: str

    def enter(self) -> int | None:
        """*Local.* Make this rank's GPU current in this thread; what `leave` needs to undo that, if there is anything.

        Raises:
            EpcommError: the device has recorded a failure that broke the Buffer.
        """

    def leave(self, before: int) -> None:
        """*Local.* Make the device current again that `enter` found."""

    def turn(self, framework: str | None, stream: Any, previous_event: EventOverlap | None, async_finish: bool) -> Turn:
        """*Local.* Begin a call. `framework` is that of its input, None if that is no array."""

    def num_sms(self, wanted: int | None, is_low_latency: bool = False) -> int:
        """*Local.* SMs of an operation, None: the backend's own default, another one in the low-latency mode.

        Raises:
            CapacityError: that many of all ranks do not fit their GPU.
        """

    def dispatch_layout(self, turn: Any, topk_idx: Array, num_experts: int) -> LayoutOutcome:
        """*Local.* Destinations of ``topk_idx`` ``[T, num_topk]``."""

    def dispatch(self, turn: Any, request: DispatchRequest) -> DispatchOutcome: ...

    def combine(self, turn: Any, request: CombineRequest) -> CombineOutcome: ...

    def low_latency_dispatch(
        self, turn: Any, request: LowLatencyDispatchRequest
    ) -> tuple[LowLatencyDispatchOutcome, Callable[[Any], None]]:
        """The send half; the second result runs the receive half, in a turn of its own if that is postponed."""

    def low_latency_combine(self, turn: Any, request: LowLatencyCombineRequest) -> Callable[[Any], None]:
        """The send half; the result runs the receive half, which fills ``request.out``, likewise."""

    def reject(self, turn: Any, operation: Rejectable, error: Exception) -> None:
        """Take part in `operation` only to tell the peers that this rank's input is bad. Returns normally."""

    def barrier(self, turn: Any) -> None:
        """All ranks reach this point: of their streams on CUDA, of their programs on the host backend."""

    def combine_buffer(self, turn: Any, num_rows: int, hidden: int, dtype: np.dtype[Any]) -> Array:
        """*Local.* Memory from which the next combine needs no copy, ``[num_rows, hidden]``."""

    def low_latency_combine_buffer(self, turn: Any, shape: tuple[int, int, int]) -> Array:
        """Memory from which the next low-latency combine needs no copy. *Local* where there is such memory already."""

    def mask(self, turn: Any, rank: int) -> None:
        """*Local.* Leave a rank out of low-latency operations."""

    def query_masks(self, turn: Any, out: Array) -> None:
        """*Local.* Write 1 for the ranks that are left out, and 0 for the others, to int32 ``[R]``."""

    def unmask(self, turn: Any, ranks: list[int]) -> None:
        """Bring ranks back; all ranks, those included, agree on where to go on."""

    def local_buffer(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """*Local.* A part of this rank's arena; None on a backend without one."""

    def record_stream(self, x: ArrayView, stream: Any) -> None:
        """*Local.* `stream` uses the memory of `x`."""

    def news(self) -> EpcommError | None:
        """*Local.* What the device has recorded since the last look; a failure stays."""

    def comm_stream(self) -> StreamRef | None:
        """*Local.* The communication stream, None on the host backend."""

    def stats(self) -> dict[str, int]:
        """*Local.* Counters since construction."""

    def interrupted(self) -> bool:
        """*Local.* Whether an exception of a signal handler ended a wait, which left this rank out of step."""

    def abandon(self) -> None:
        """*Local.* This rank left a call half done; tell the peers not to wait."""

    def close(self) -> None:
        """*Local.* Release what can be released now. Never waits."""

    def drop(self, is_expected: bool) -> None:
        """*Local.* The Buffer is gone without `close`: no wait, no lock, no call of a driver.

        Args:
            is_expected: the owner left it to garbage collection; else peers are not told.
        """
