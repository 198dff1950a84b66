"""Arguments of low-latency operations: user arrays in, requests for the backend out. Local; nothing is sent."""

from __future__ import annotations

from typing import Any

import numpy as np

from epcomm.backends import Array, LowLatencyCombineRequest, LowLatencyDispatchRequest, Turn
from epcomm.buffer.arguments import (
    FLOAT32,
    INT32,
    array_argument,
    check_num_experts,
    positive_argument,
    rows_argument,
    topk_indices,
    writable_argument,
)
from epcomm.errors import CapacityError, HandleError, ImmutableArray, InputError, ShapeError
from epcomm.handle import LowLatencyHandle
from epcomm.numerics import BFLOAT16, FP8_BLOCK, LOGFMT_BLOCK

__all__ = [
    "check_pre_reduce",
    "low_latency_combine_request",
    "low_latency_dispatch_request",
    "low_latency_handle",
    "writable_masks",
]


def low_latency_dispatch_request(
    turn: Turn,
    x: Any,
    topk_idx: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    expert_stats: Any,
    wait_stats: Any,
    *,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    return_recv_hook: bool,
    num_ranks: int,
    num_sms: int,
    check: bool,
) -> LowLatencyDispatchRequest:
    """The request of ``Buffer.low_latency_dispatch``."""
    check_num_experts(num_experts, num_ranks)
    positive_argument(num_max_dispatch_tokens_per_rank, "num_max_dispatch_tokens_per_rank")
    view = rows_argument(turn, x, "x", (BFLOAT16,))
    if use_fp8 and return_recv_hook and view.framework == "jax":
        raise ImmutableArray(
            "return_recv_hook",
            got="JAX and fp8, whose scales JAX would copy before they are received",
            do="pass use_fp8=False, or call without return_recv_hook",
        )
    num_tokens, hidden = view.shape
    if num_tokens > num_max_dispatch_tokens_per_rank:
        raise CapacityError(
            "x",
            got=f"{num_tokens} tokens",
            wanted=f"at most num_max_dispatch_tokens_per_rank, {num_max_dispatch_tokens_per_rank}",
        )
    if use_fp8 and hidden % FP8_BLOCK:
        raise ShapeError(
            "x", got=f"hidden {hidden}", wanted=f"a multiple of {FP8_BLOCK}", do="pad hidden, or pass use_fp8=False"
        )
    if use_fp8 and use_ue8m0 and not round_scale:
        raise InputError("use_ue8m0", got="round_scale=False", wanted="power-of-two scales", do="pass round_scale=True")
    num_local = num_experts // num_ranks
    return LowLatencyDispatchRequest(
        x=turn.take(view),
        topk_idx=turn.take(topk_indices(turn, topk_idx, num_tokens, num_experts, check)),
        num_max_dispatch_tokens_per_rank=int(num_max_dispatch_tokens_per_rank),
        num_experts=int(num_experts),
        use_fp8=bool(use_fp8),
        round_scale=bool(use_fp8 and round_scale),
        use_ue8m0=bool(use_fp8 and use_ue8m0),
        expert_stats=None
        if expert_stats is None
        else writable_argument(turn, expert_stats, "cumulative_local_expert_recv_stats", INT32, (num_local,)),
        wait_stats=_wait_stats(turn, wait_stats, "dispatch_wait_recv_cost_stats", num_ranks),
        num_sms=num_sms,
        is_postponed=bool(return_recv_hook),
    )


def low_latency_handle(handle: Any, buffer_id: int, turn: Turn) -> LowLatencyHandle:
    """Raise HandleError unless `handle` came from this Buffer's low_latency_dispatch."""
    if not isinstance(handle, LowLatencyHandle):
        raise HandleError(
            "handle", got=f"a {type(handle).__name__}", wanted="the handle that low_latency_dispatch returned"
        )
    if handle.buffer_id != buffer_id:
        raise HandleError("handle", got="the handle of another Buffer", wanted="one of this Buffer")
    return handle.with_own_leaves(turn.stream)


def check_pre_reduce(pre_reduce: bool, use_logfmt: bool, zero_copy: bool) -> None:
    """Raise InputError for options of a combine that exclude each other."""
    for name, is_set in (("use_logfmt", use_logfmt), ("zero_copy", zero_copy)):
        if pre_reduce and is_set:
            raise InputError("pre_reduce", got=f"also {name}", wanted="one of the two")


def low_latency_combine_request(
    turn: Turn,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    handle: LowLatencyHandle,
    in_place: Array | None,
    out: Any,
    wait_stats: Any,
    *,
    use_logfmt: bool,
    pre_reduce: bool,
    return_recv_hook: bool,
    num_ranks: int,
    num_sms: int,
    check: bool,
) -> LowLatencyCombineRequest:
    """The request of ``Buffer.low_latency_combine``.

    Args:
        handle: a handle that `low_latency_handle` has checked.
        in_place: with zero_copy, the memory that get_next_low_latency_combine_buffer returned.
        out: where the sums go, None for new memory.
    """
    num_local, max_rows = handle.src_info.shape
    view = rows_argument(turn, x, "x", (BFLOAT16,), ndim=3)
    turn.check(view, "x", shape=(num_local, max_rows, handle.hidden))
    if use_logfmt and handle.hidden % LOGFMT_BLOCK:
        raise ShapeError(
            "x",
            got=f"hidden {handle.hidden}",
            wanted=f"a multiple of {LOGFMT_BLOCK}",
            do="pad hidden, or pass use_logfmt=False",
        )
    indices = topk_indices(turn, topk_idx, handle.num_tokens, handle.num_experts, check)
    sums = (handle.num_tokens, handle.hidden)
    return LowLatencyCombineRequest(
        x=turn.take(view) if in_place is None else in_place,
        topk_idx=turn.take(indices),
        topk_weights=turn.take(array_argument(turn, topk_weights, "topk_weights", (FLOAT32,), indices.shape)),
        handle=handle,
        out=turn.new(sums, BFLOAT16)
        if out is None
        else writable_argument(turn, out, "out", BFLOAT16, sums, aligned=True),
        wait_stats=_wait_stats(turn, wait_stats, "combine_wait_recv_cost_stats", num_ranks),
        use_logfmt=bool(use_logfmt),
        pre_reduce=bool(pre_reduce),
        zero_copy=in_place is not None,
        num_sms=num_sms,
        is_postponed=bool(return_recv_hook),
    )


def writable_masks(turn: Turn, mask_status: Any, num_ranks: int) -> Array:
    """The memory of the user's int32 ``[num_ranks]``."""
    return writable_argument(turn, mask_status, "mask_status", INT32, (num_ranks,))


def _wait_stats(turn: Turn, stats: Any, name: str, num_ranks: int) -> Array | None:
    return None if stats is None else writable_argument(turn, stats, name, np.dtype(np.int64), (num_ranks,))
