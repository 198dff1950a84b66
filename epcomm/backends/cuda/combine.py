"""High-throughput combine: every rank pulls its tokens' rows and sums them."""

from __future__ import annotations

from typing import Any

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.backends.agreement import combine_payload, values_with_handle
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import CombineOutcome, CombineRequest
from epcomm.kernels import combine as kernel
from epcomm.kernels.layout import NO_BLOCK, NUM_ENTRY_AGREED, REJECTED, THROUGH_WINDOW, UNIT, round_up
from epcomm.memory import Block

__all__ = ["combine", "reject_combine"]

_FLOAT32 = np.dtype(np.float32)
_NOTHING = (0,) * NUM_ENTRY_AGREED
_NOTHING_TO_AGREE_ON = (0, 0, *_NOTHING)  # of no tokens
_NO_ARRAYS = (0,) * 9


class _Plan:
    """What a combine needs apart from addresses and numbers of rows. Made once for all that are alike, see `Job.plan`.

    Raises:
        CapacityError: the window has no room for a row.
    """

    def __init__(self, job: Job, dtype: np.dtype[Any], hidden: int, num_topk: int, num_sms: int) -> None:
        self.row_bytes = hidden * dtype.itemsize
        self.dtype = dtype.name
        self.blocks = job.placement.blocks(num_sms)
        self.window = job.window.cut(round_up(self.row_bytes + 4 * num_topk, UNIT))
        self.shape = kernel.shape(self.row_bytes, job.size, job.launch.stage_memory)
        self.payload = combine_payload(hidden, dtype, num_topk)


def combine(job: Job, turn: CudaTurn, request: CombineRequest) -> CombineOutcome:
    """Bring the rows of a dispatch back to their tokens and sum them. Does not wait for anybody on the host."""
    x, weights, handle = request.x, request.topk_weights, request.handle
    turn.pin(handle.send_pos, handle.rank_prefix_matrix, handle.recv_src_idx)
    hidden, dtype, num_topk = x.shape[1], x.dtype, 0 if weights is None else weights.shape[1]
    plan = job.plan(_Plan, dtype, hidden, num_topk, request.num_sms)
    rows, own_weights, copies = _own_offsets(job, turn, x, weights)
    combined = turn.new((handle.num_tokens, hidden), dtype)
    combined_weights = None if weights is None else turn.new((handle.num_tokens, num_topk), _FLOAT32)
    biases = [bias.ptr for bias in request.biases]
    agreed = values_with_handle(plan.payload, handle.dispatch_id, request.config)
    fields = (
        *plan.window,
        rows,
        own_weights,
        handle.num_tokens,
        0,
        *agreed,
        *_NOTHING[len(agreed) :],
        plan.row_bytes,
        plan.shape.piece_bytes,
        x.ptr,
        0 if weights is None else weights.ptr,
        handle.recv_src_idx.ptr,
        handle.send_pos.ptr,
        handle.rank_prefix_matrix.ptr,
        *biases,
        *_NOTHING[: 2 - len(biases)],
        combined.ptr,
        0 if combined_weights is None else combined_weights.ptr,
        *plan.shape.feed,
        plan.row_bytes,
        num_topk,
        handle.num_worst_tokens,
    )
    turn.has_entered = True
    job.launch.combine(turn.stream, plan.dtype, plan.blocks, plan.shape, fields)
    for copy in copies:
        copy.note_reader(*turn.ref)
    job.count(rows == THROUGH_WINDOW, "combine")
    return CombineOutcome(combined, combined_weights)


def _own_offsets(job: Job, turn: CudaTurn, x: ArrayView, weights: ArrayView | None) -> tuple[int, int, list[Block]]:
    """Offsets of this rank's rows and weights for its peers, and copies to keep until the kernel is launched.

    What lies outside of the arena is copied into it: one pass at the speed of the memory. Rows go through the window
    only if there is no room.
    """
    copies: list[Block] = []
    rows = _offset_in_arena(job, turn, x, copies)
    own_weights = NO_BLOCK if rows is None or weights is None else _offset_in_arena(job, turn, weights, copies)
    if rows is None or own_weights is None:
        return THROUGH_WINDOW, THROUGH_WINDOW, copies
    return rows, own_weights, copies


def _offset_in_arena(job: Job, turn: CudaTurn, array: ArrayView, copies: list[Block]) -> int | None:
    num_bytes = array.spec.num_bytes
    if num_bytes == 0:
        return job.arena_offset // UNIT  # of nothing
    offset = job.offset_of(array.ptr, num_bytes)
    if offset is not None:
        return offset
    block = job.arena.allocate(num_bytes, turn.stream, high=True, is_captured=turn.is_captured)
    if block is None:
        return None
    copies.append(block)
    runtime = job.runtime
    runtime.memcpyAsync(block.ptr, array.ptr, num_bytes, runtime.memcpyDeviceToDevice, turn.stream)
    return (job.arena_offset + block.offset) // UNIT


def reject_combine(job: Job, turn: CudaTurn) -> None:
    """Enter a combine only to say that this rank's input is bad."""
    shape = kernel.shape(16, job.size, job.launch.stage_memory)
    fields = (
        *job.window.cut(16),
        REJECTED,
        NO_BLOCK,
        *_NOTHING_TO_AGREE_ON,
        16,
        shape.piece_bytes,
        *_NO_ARRAYS,
        *shape.feed,
        16,
        0,
        0,
    )
    job.launch.combine(turn.stream, "bfloat16", 1, shape, fields)
