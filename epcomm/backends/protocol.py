"""What the Buffer asks of a backend: checked requests in, arrays out.

The Buffer validates shapes, dtypes and devices and wraps results for the user's framework; a backend moves and
sums rows. Arrays in requests are views of the user's memory, contiguous except `DispatchRequest.scales`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from epcomm.config import Config
from epcomm.handle import DispatchHandle, LowLatencyHandle

__all__ = [
    "Backend",
    "CombineOutcome",
    "CombineRequest",
    "DispatchOutcome",
    "DispatchRequest",
    "LayoutOutcome",
    "LowLatencyCombineRequest",
    "LowLatencyDispatchOutcome",
    "LowLatencyDispatchRequest",
    "Rejectable",
]

Array = NDArray[Any]


class Rejectable(Enum):
    """Collective operations that a rank can take part in by rejecting its own input."""

    DISPATCH = "dispatch"
    CACHED_DISPATCH = "dispatch(handle=...)"
    COMBINE = "combine"
    LOW_LATENCY_DISPATCH = "low_latency_dispatch"
    LOW_LATENCY_COMBINE = "low_latency_combine"


@dataclass(frozen=True, eq=False)
class LayoutOutcome:
    """See `epcomm.handle.LayoutResult`."""

    num_tokens_per_rank: NDArray[np.int32]
    num_tokens_per_rdma_rank: NDArray[np.int32] | None
    num_tokens_per_expert: NDArray[np.int32]
    is_token_in_rank: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DispatchRequest:
    """A dispatch of T rows; `handle` is set for a cached one, and then there is no routing."""

    x: Array  # [T, hidden]
    scales: Array | None  # [T] or [T, num_scales], any strides
    topk_idx: Array | None  # int32 or int64 [T, num_topk]
    topk_weights: Array | None  # float32 [T, num_topk]
    is_token_in_rank: NDArray[np.bool_]  # [T, R]
    num_tokens_per_expert: NDArray[np.int32] | None  # [E]
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int
    config: Config
    handle: DispatchHandle | None


@dataclass(frozen=True, eq=False)
class DispatchOutcome:
    """What a dispatch delivered; see `epcomm.handle.DispatchResult` and `DispatchHandle`."""

    recv_x: Array
    recv_scales: Array | None
    recv_topk_idx: Array | None
    recv_topk_weights: Array | None
    num_recv_tokens_per_expert: list[int]
    rank_prefix_matrix: NDArray[np.int32]
    recv_src_idx: NDArray[np.int32]
    forward_mask: NDArray[np.bool_] | None
    forward_counts: NDArray[np.int32] | None
    dispatch_id: int
    num_dropped: int  # rows that did not fit into num_worst_tokens on this rank


@dataclass(frozen=True, eq=False)
class CombineRequest:
    """A combine of the rows of a dispatch."""

    x: Array  # [num_rows, hidden]
    topk_weights: Array | None  # float32 [num_rows, num_topk]
    biases: tuple[Array, ...]  # each [T, hidden], dtype of x
    config: Config
    handle: DispatchHandle


@dataclass(frozen=True, eq=False)
class CombineOutcome:
    """Sums for this rank's tokens."""

    combined_x: Array
    combined_topk_weights: Array | None


@dataclass(frozen=True, eq=False)
class LowLatencyDispatchRequest:
    """A low-latency dispatch of at most `num_max_dispatch_tokens_per_rank` bfloat16 rows."""

    x: Array  # [T, hidden]
    topk_idx: Array  # [T, num_topk]
    num_max_dispatch_tokens_per_rank: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    expert_stats: NDArray[np.int32] | None  # [L], added to in place
    wait_stats: NDArray[np.int64] | None  # [R], nanoseconds added in place


@dataclass(frozen=True, eq=False)
class LowLatencyDispatchOutcome:
    """Arrays that are filled when the receive half has run; see `epcomm.handle.LowLatencyHandle`."""

    recv_x: Array
    recv_scales: Array | None
    recv_count: NDArray[np.int32]
    src_info: NDArray[np.int32]
    recv_begin: NDArray[np.int32]
    recv_counts: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class LowLatencyCombineRequest:
    """A weighted sum of the rows that the experts made of a low-latency dispatch."""

    x: Array  # bfloat16 [L, R * max_tokens, hidden]
    topk_idx: Array
    topk_weights: NDArray[np.float32]
    handle: LowLatencyHandle
    out: Array  # bfloat16 [T, hidden]
    wait_stats: NDArray[np.int64] | None
    zero_copy: bool  # x is what low_latency_combine_buffer returned


class Backend(Protocol):
    """One rank's half of every operation. All methods but those marked *local* are collective."""

    def dispatch_layout(self, topk_idx: Array, num_experts: int) -> LayoutOutcome:
        """*Local.* Destinations of ``topk_idx`` ``[T, num_topk]``."""

    def dispatch(self, request: DispatchRequest) -> DispatchOutcome: ...

    def combine(self, request: CombineRequest) -> CombineOutcome: ...

    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest
    ) -> tuple[LowLatencyDispatchOutcome, Callable[[], None]]:
        """The send half; the second result runs the receive half."""

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """The send half; the result runs the receive half, which fills ``request.out``."""

    def reject(self, operation: Rejectable, error: Exception) -> None:
        """Take part in `operation` only to tell the peers that this rank's input is bad. Returns normally."""

    def combine_buffer(self, num_rows: int, hidden: int, dtype: np.dtype[Any]) -> Array:
        """*Local.* Memory from which the next combine needs no copy, ``[num_rows, hidden]``."""

    def low_latency_combine_buffer(self, shape: tuple[int, int, int]) -> Array:
        """*Local.* Memory from which the next low-latency combine needs no copy."""

    def mask(self, rank: int) -> None:
        """*Local.* Leave a rank out of low-latency operations."""

    def masks(self) -> NDArray[np.bool_]:
        """*Local.* ``[R]``, the ranks that are left out."""

    def unmask(self, ranks: list[int]) -> None:
        """Bring ranks back; all ranks, those included, agree on where to go on."""

    def stats(self) -> dict[str, int]:
        """*Local.* Counters since construction."""

    def interrupted(self) -> bool:
        """*Local.* Whether an exception of a signal handler ended a wait, which left this rank out of step."""

    def abandon(self) -> None:
        """*Local.* This rank left a call half done; tell the peers not to wait."""

    def close(self) -> None:
        """*Local.* Release what can be released now. Never waits."""
