"""Arguments of low-latency operations: user arrays in, requests for the backend out. Local; nothing is sent."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from epcomm.arrays import ArraySpec, Place, import_array, require
from epcomm.backends import (
    Array,
    LowLatencyCombineRequest,
    LowLatencyCombineTerms,
    LowLatencyDispatchRequest,
    LowLatencyDispatchTerms,
    Turn,
)
from epcomm.buffer.arguments import (
    FLOAT32,
    INT32,
    NUM_REMEMBERED,
    check_num_experts,
    check_rows,
    check_topk,
    check_topk_values,
    positive_argument,
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

_INT64 = np.dtype(np.int64)


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
    max_tokens = positive_argument(num_max_dispatch_tokens_per_rank, "num_max_dispatch_tokens_per_rank")
    is_postponed, stream = bool(return_recv_hook), turn.stream
    rows, indices = import_array(x, "x", stream=stream), import_array(topk_idx, "topk_idx", stream=stream)
    experts = waits = None
    if expert_stats is not None:
        experts = import_array(expert_stats, "cumulative_local_expert_recv_stats", writable=True, stream=stream)
    if wait_stats is not None:
        waits = import_array(wait_stats, "dispatch_wait_recv_cost_stats", writable=True, stream=stream)
    terms = _dispatch_terms(
        turn.place,
        rows.spec,
        indices.spec,
        None if experts is None else experts.spec,
        None if waits is None else waits.spec,
        max_tokens,
        int(num_experts),
        num_ranks,
        bool(use_fp8),
        bool(round_scale),
        bool(use_ue8m0),
        is_postponed,
        num_sms,
    )
    if check:
        check_topk_values(turn.checked_values(indices), num_experts)
    return LowLatencyDispatchRequest(
        terms,
        turn.take(rows),
        turn.take(indices),
        None if experts is None else turn.take(experts),
        None if waits is None else turn.take(waits),
        is_postponed,
    )


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _dispatch_terms(
    place: Place,
    x: ArraySpec,
    topk_idx: ArraySpec,
    expert_stats: ArraySpec | None,
    wait_stats: ArraySpec | None,
    max_tokens: int,
    num_experts: int,
    num_ranks: int,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    is_postponed: bool,
    num_sms: int,
) -> LowLatencyDispatchTerms:
    """Check what does not depend on addresses and values."""
    check_rows(place, x, (BFLOAT16,))
    if use_fp8 and is_postponed and x.framework == "jax":
        raise ImmutableArray(
            "return_recv_hook",
            got="JAX and fp8, whose scales JAX would copy before they are received",
            do="pass use_fp8=False, or call without return_recv_hook",
        )
    num_tokens, hidden = x.shape
    if num_tokens > max_tokens:
        raise CapacityError(
            "x", got=f"{num_tokens} tokens", wanted=f"at most num_max_dispatch_tokens_per_rank, {max_tokens}"
        )
    if use_fp8 and hidden % FP8_BLOCK:
        raise ShapeError(
            "x", got=f"hidden {hidden}", wanted=f"a multiple of {FP8_BLOCK}", do="pad hidden, or pass use_fp8=False"
        )
    if use_fp8 and use_ue8m0 and not round_scale:
        raise InputError("use_ue8m0", got="round_scale=False", wanted="power-of-two scales", do="pass round_scale=True")
    check_topk(place, topk_idx, num_tokens)
    if expert_stats is not None:
        shape = (num_experts // num_ranks,)
        require(expert_stats, "cumulative_local_expert_recv_stats", dtypes=(INT32,), shape=shape, place=place)
    if wait_stats is not None:
        _check_wait_stats(place, wait_stats, "dispatch_wait_recv_cost_stats", num_ranks)
    return LowLatencyDispatchTerms(
        num_tokens=num_tokens,
        hidden=hidden,
        num_topk=topk_idx.shape[1],
        index_bytes=topk_idx.dtype.itemsize,
        num_max_dispatch_tokens_per_rank=max_tokens,
        num_experts=num_experts,
        use_fp8=use_fp8,
        round_scale=use_fp8 and round_scale,
        use_ue8m0=use_fp8 and use_ue8m0,
        num_sms=num_sms,
    )


def low_latency_handle(handle: Any, buffer_id: int, epoch: int, turn: Turn) -> LowLatencyHandle:
    """Raise HandleError unless `handle` came from this Buffer's low_latency_dispatch, in this epoch."""
    if not isinstance(handle, LowLatencyHandle):
        raise HandleError(
            "handle", got=f"a {type(handle).__name__}", wanted="the handle that low_latency_dispatch returned"
        )
    if handle.buffer_id != buffer_id:
        raise HandleError("handle", got="the handle of another Buffer", wanted="one of this Buffer")
    if handle.epoch != epoch:
        raise HandleError(
            "handle", got="one from before masked ranks were brought back", wanted="one of a dispatch since then"
        )
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
    stream, is_postponed = turn.stream, bool(return_recv_hook)
    rows, indices = import_array(x, "x", stream=stream), import_array(topk_idx, "topk_idx", stream=stream)
    weights = import_array(topk_weights, "topk_weights", stream=stream)
    sums = waits = None
    if out is not None:
        sums = import_array(out, "out", writable=True, stream=stream)
    if wait_stats is not None:
        waits = import_array(wait_stats, "combine_wait_recv_cost_stats", writable=True, stream=stream)
    terms = _combine_terms(
        turn.place,
        rows.spec,
        indices.spec,
        weights.spec,
        None if sums is None else sums.spec,
        None if waits is None else waits.spec,
        handle.num_tokens,
        handle.num_topk,
        handle.hidden,
        handle.num_max_dispatch_tokens_per_rank,
        handle.num_experts,
        num_ranks,
        bool(use_logfmt),
        bool(pre_reduce),
        in_place is not None,
        is_postponed,
        num_sms,
    )
    if check:
        check_topk_values(turn.checked_values(indices), terms.num_experts)
    return LowLatencyCombineRequest(
        terms,
        turn.take(rows) if in_place is None else in_place,
        turn.take(indices),
        turn.take(weights),
        handle,
        turn.new((terms.num_tokens, terms.hidden), BFLOAT16) if sums is None else turn.take(sums),
        None if waits is None else turn.take(waits),
        is_postponed,
    )


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _combine_terms(
    place: Place,
    x: ArraySpec,
    topk_idx: ArraySpec,
    topk_weights: ArraySpec,
    out: ArraySpec | None,
    wait_stats: ArraySpec | None,
    num_tokens: int,
    num_topk: int,
    hidden: int,
    max_tokens: int,
    num_experts: int,
    num_ranks: int,
    use_logfmt: bool,
    pre_reduce: bool,
    zero_copy: bool,
    is_postponed: bool,
    num_sms: int,
) -> LowLatencyCombineTerms:
    """Check what does not depend on addresses and values; the sizes are those of the handle."""
    check_rows(place, x, (BFLOAT16,), ndim=3)
    require(x, "x", shape=(num_experts // num_ranks, num_ranks * max_tokens, hidden), place=place)
    if use_logfmt and hidden % LOGFMT_BLOCK:
        raise ShapeError(
            "x",
            got=f"hidden {hidden}",
            wanted=f"a multiple of {LOGFMT_BLOCK}",
            do="pad hidden, or pass use_logfmt=False",
        )
    check_topk(place, topk_idx, num_tokens)
    if topk_idx.shape[1] != num_topk:
        raise ShapeError(
            "topk_idx", got=f"{topk_idx.shape[1]} choices a token", wanted=f"the {num_topk} of the dispatch"
        )
    require(topk_weights, "topk_weights", dtypes=(FLOAT32,), shape=topk_idx.shape, place=place)
    if out is not None:  # the kernels write 16 bytes at a time
        is_aligned = place != "cpu"
        require(out, "out", dtypes=(BFLOAT16,), shape=(num_tokens, hidden), aligned=is_aligned, place=place)
    if wait_stats is not None:
        _check_wait_stats(place, wait_stats, "combine_wait_recv_cost_stats", num_ranks)
    return LowLatencyCombineTerms(
        num_tokens=num_tokens,
        hidden=hidden,
        num_topk=num_topk,
        index_bytes=topk_idx.dtype.itemsize,
        num_max_dispatch_tokens_per_rank=max_tokens,
        num_experts=num_experts,
        use_logfmt=use_logfmt,
        pre_reduce=pre_reduce,
        zero_copy=zero_copy,
        is_postponed=is_postponed,
        num_sms=num_sms,
    )


def _check_wait_stats(place: Place, stats: ArraySpec, name: str, num_ranks: int) -> None:
    require(stats, name, dtypes=(_INT64,), shape=(num_ranks,), place=place)


def writable_masks(turn: Turn, mask_status: Any, num_ranks: int) -> Array:
    """The memory of the user's int32 ``[num_ranks]``."""
    view = import_array(mask_status, "mask_status", writable=True, stream=turn.stream)
    require(view.spec, "mask_status", dtypes=(INT32,), shape=(num_ranks,), place=turn.place)
    return turn.take(view)
