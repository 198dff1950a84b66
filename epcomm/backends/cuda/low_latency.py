"""Low-latency dispatch and combine: rows grouped by expert on arrival, send and receive halves apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.backends.agreement import low_latency_combine_values, low_latency_dispatch_values
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.slots import Ring
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import (
    LowLatencyCombineRequest,
    LowLatencyDispatchOutcome,
    LowLatencyDispatchRequest,
)
from epcomm.config import (
    COMBINE_LANES,
    low_latency_bytes,
    low_latency_combine_offset,
    low_latency_row_stride,
    low_latency_rows_offset,
)
from epcomm.errors import CapacityError, UnsupportedOption
from epcomm.kernels import low_latency_dispatch as kernel
from epcomm.kernels.layout import MAX_LOCAL_EXPERTS, MAX_RANKS, NUM_ENTRY_AGREED
from epcomm.kernels.low_latency import RECEIVE, SEND, THREADS, piece_bytes
from epcomm.numerics import BFLOAT16, FP8_BLOCK, FP8_E4M3, num_packed_scales

__all__ = ["combine", "dispatch", "reject_combine", "reject_dispatch"]

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_CASTS = (kernel.BF16, kernel.FP8, kernel.FP8_POWER_OF_TWO, kernel.FP8_EXPONENTS)
_NOTHING = (0,) * NUM_ENTRY_AGREED
_MAX_CAST_BYTES = 2048  # of x, that a warp takes at once to cast it

Receive = Callable[[CudaTurn], None]


def dispatch(job: Job, turn: CudaTurn, request: LowLatencyDispatchRequest) -> tuple[LowLatencyDispatchOutcome, Receive]:
    """The send half, and the receive half too unless it is postponed. Does not wait for anybody on the host."""
    low = job.low_latency
    slot = low.dispatches.next_slot()
    _check_dispatch(job, request)
    outcome = _allocate(job, turn, request)
    x, topk_idx, num_local = request.x, request.topk_idx, request.num_experts // job.size
    (num_tokens, hidden), max_tokens = x.shape, request.num_max_dispatch_tokens_per_rank
    row_stride = low_latency_row_stride(hidden, request.use_fp8)
    blocks = job.placement.blocks(request.num_sms)
    num_warps = blocks * THREADS // 32
    send_bytes = piece_bytes(2 * hidden, num_tokens, num_warps, *([_MAX_CAST_BYTES] if request.use_fp8 else []))
    fields = (
        *_agreed(low_latency_dispatch_values(request)),
        low.area.lane_bytes,
        low_latency_rows_offset(max_tokens, num_local),
        row_stride,
        x.ptr,
        topk_idx.ptr,
        *_addresses(outcome.send_pos, outcome.recv_x, outcome.recv_scales, outcome.recv_count, outcome.src_info),
        *_addresses(outcome.recv_ranges, outcome.send_begin, request.expert_stats, request.wait_stats),
        _CASTS[request.use_fp8 + request.round_scale + request.use_ue8m0],
        send_bytes // 16,
        piece_bytes(hidden * (1 if request.use_fp8 else 2), num_tokens * job.size, num_warps),
        hidden,
        num_tokens,
        topk_idx.shape[1],
        topk_idx.dtype.itemsize,
        num_local,
        max_tokens,
        0,
    )
    shared_bytes = kernel.shared_bytes(num_local, job.size)

    def launch(stream: int, halves: int) -> None:
        low.launch.dispatch(stream, blocks, shared_bytes, *low.slot_fields(low.dispatches, slot, halves), *fields)

    return outcome, _launch_halves(low.dispatches, slot, turn, request.is_postponed, launch)


def combine(job: Job, turn: CudaTurn, request: LowLatencyCombineRequest) -> Receive:
    """The send half, and the receive half too unless it is postponed. Does not wait for anybody on the host."""
    low, handle = job.low_latency, request.handle
    slot = low.combines.next_slot()
    if request.use_logfmt or request.pre_reduce:
        raise UnsupportedOption("use_logfmt" if request.use_logfmt else "pre_reduce", got="True", wanted="False")
    _check_combine(job, request)
    turn.pin(handle.recv_ranges, handle.send_pos, handle.send_begin)
    topk_idx, num_topk, row_bytes = request.topk_idx, request.topk_idx.shape[1], 2 * handle.hidden
    num_local, max_rows = handle.src_info.shape
    blocks = job.placement.blocks(request.num_sms)
    num_warps = blocks * THREADS // 32
    fields = (
        *_agreed(low_latency_combine_values(request)),
        *low.combine_addresses(slot),
        low_latency_combine_offset(handle.num_experts),
        *_addresses(request.x, topk_idx, request.topk_weights, handle.send_pos, handle.recv_ranges, handle.send_begin),
        *_addresses(request.out, request.wait_stats),
        row_bytes,
        piece_bytes(row_bytes, handle.num_tokens * num_topk, num_warps),
        piece_bytes(row_bytes, handle.num_tokens, num_warps),
        request.zero_copy,
        handle.num_tokens,
        num_topk,
        topk_idx.dtype.itemsize,
        num_local,
        max_rows,
        0,
    )

    def launch(stream: int, halves: int) -> None:
        # Whoever only says where its rows are does that in one block.
        few = 1 if request.zero_copy and halves == SEND else blocks
        low.launch.combine(stream, few, *low.slot_fields(low.combines, slot, halves), *fields)

    return _launch_halves(low.combines, slot, turn, request.is_postponed, launch)


def _launch_halves(
    ring: Ring, slot: int, turn: CudaTurn, is_postponed: bool, launch: Callable[[int, int], None]
) -> Receive:
    """Launch the send half, or both; what launches the receive half."""
    turn.has_entered = True
    launch(turn.stream, SEND if is_postponed else SEND | RECEIVE)
    if not is_postponed:
        ring.pass_over(slot)
        return lambda _: None
    number = ring.take(slot)

    def receive(later: CudaTurn) -> None:
        ring.give_back(slot, number)
        later.use_outputs_of(turn)
        launch(later.stream, RECEIVE)

    return receive


def reject_dispatch(job: Job, turn: CudaTurn) -> None:
    """Take part in a dispatch only to say that this rank's input is bad."""
    low = job.low_latency
    slot = low.dispatches.next_slot()
    fields = low.slot_fields(low.dispatches, slot, SEND | RECEIVE, is_rejected=True)
    low.launch.dispatch(turn.stream, 1, 0, *fields, *_NOTHING, *(0,) * 24)
    low.dispatches.pass_over(slot)


def reject_combine(job: Job, turn: CudaTurn) -> None:
    """Take part in a combine only to say that this rank's input is bad."""
    low = job.low_latency
    slot = low.combines.next_slot()
    fields = low.slot_fields(low.combines, slot, SEND | RECEIVE, is_rejected=True)
    low.launch.combine(turn.stream, 1, *fields, *_NOTHING, *(0,) * (MAX_RANKS + 19))
    low.combines.pass_over(slot)


def _agreed(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values, *_NOTHING[len(values) :])


def _addresses(*arrays: ArrayView | None) -> tuple[int, ...]:
    return tuple([0 if array is None else array.ptr for array in arrays])


def _check_dispatch(job: Job, request: LowLatencyDispatchRequest) -> None:
    """Raise CapacityError for sizes that the kernel, or the area, has no room for."""
    max_tokens, num_local = request.num_max_dispatch_tokens_per_rank, request.num_experts // job.size
    if max_tokens > kernel.MAX_TOKENS:
        raise CapacityError(
            "num_max_dispatch_tokens_per_rank", got=str(max_tokens), wanted=f"at most {kernel.MAX_TOKENS}"
        )
    most = min(MAX_LOCAL_EXPERTS, kernel.MAX_SHARED_BYTES // kernel.shared_bytes(1, job.size))
    if num_local > most:
        raise CapacityError("num_experts", got=f"{num_local} a rank", wanted=f"at most {most} a rank")
    hidden = request.x.shape[1]
    before = low_latency_rows_offset(max_tokens, num_local)
    needed = before + max_tokens * low_latency_row_stride(hidden, request.use_fp8)
    if needed > job.low_latency.area.lane_bytes:
        _no_room(job, max_tokens, hidden, request.num_experts, COMBINE_LANES)


def _check_combine(job: Job, request: LowLatencyCombineRequest) -> None:
    """Raise CapacityError where the rows of all choices have no room."""
    handle, num_topk = request.handle, request.topk_idx.shape[1]
    max_tokens = handle.num_max_dispatch_tokens_per_rank
    needed = low_latency_combine_offset(handle.num_experts) + max_tokens * num_topk * 2 * handle.hidden
    if needed > job.low_latency.area.combine_slot(0).num_bytes:
        _no_room(job, max_tokens, handle.hidden, handle.num_experts, num_topk)


def _no_room(job: Job, max_tokens: int, hidden: int, num_experts: int, num_topk: int) -> None:
    needed = low_latency_bytes(max_tokens, hidden, job.size, num_experts, num_topk=max(num_topk, COMBINE_LANES))
    raise CapacityError(
        "num_rdma_bytes",
        got=f"{job.low_latency.area.num_bytes} bytes",
        wanted=f"at least {needed} for {max_tokens} tokens of {hidden} channels and {num_topk} choices",
        do="size the Buffer with get_low_latency_rdma_size_hint",
    )


def _allocate(job: Job, turn: CudaTurn, request: LowLatencyDispatchRequest) -> LowLatencyDispatchOutcome:
    """Outputs of the documented shapes; scales with the token dimension fastest in memory."""
    num_local, hidden = request.num_experts // job.size, request.x.shape[1]
    max_rows = job.size * request.num_max_dispatch_tokens_per_rank
    scales = None
    if request.use_fp8:
        width = num_packed_scales(hidden) if request.use_ue8m0 else hidden // FP8_BLOCK
        memory = turn.new((num_local, width, max_rows), _INT32 if request.use_ue8m0 else _FLOAT32)
        scales = turn.transposed(memory)
    return LowLatencyDispatchOutcome(
        recv_x=turn.new((num_local, max_rows, hidden), FP8_E4M3 if request.use_fp8 else BFLOAT16),
        recv_scales=scales,
        recv_count=turn.new((num_local,), _INT32),
        src_info=turn.new((num_local, max_rows), _INT32),
        recv_ranges=turn.new((num_local, job.size, 2), _INT32),
        send_pos=turn.new(request.topk_idx.shape, _INT32),
        send_begin=turn.new((num_local, job.size), _INT32),
    )
