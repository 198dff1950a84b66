"""High-throughput combine: every rank pulls its tokens' rows and sums them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.backends.agreement import combine_payload, values_with_handle
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import CombineOutcome, CombineRequest
from epcomm.kernels import combine as kernel
from epcomm.kernels import internode_combine as internode
from epcomm.kernels.layout import NO_BLOCK, NUM_ENTRY_AGREED, REJECTED, THROUGH_WINDOW, UNIT, round_up
from epcomm.memory import Block
from epcomm.numerics import BFLOAT16

__all__ = ["combine", "reject_combine"]

_FLOAT32 = np.dtype(np.float32)
_NOTHING = (0,) * NUM_ENTRY_AGREED
_NO_ARRAYS = (0,) * 9


class _Sum(NamedTuple):
    """One combine: what its kernel is told besides what its plan says.

    Attributes:
        entry: what the rank enters with.
        arrays: addresses of x, x_weights, src_idx, send_pos, rank_prefix, bias[2], out, out_weights.
        num_topk: 0 without weights.
        num_worst_tokens: of the dispatch.
    """

    entry: tuple[int, ...]
    arrays: tuple[int, ...]
    num_topk: int
    num_worst_tokens: int


class _Plan:
    """What a combine on one node needs apart from addresses and numbers of rows. Made once for all that are alike.

    Attributes:
        payload: what the ranks agree on about their rows.

    Raises:
        CapacityError: the window has no room for a row.
    """

    def __init__(self, job: Job, dtype: np.dtype[Any], hidden: int, num_topk: int, num_sms: int) -> None:
        self._row_bytes, self._dtype = hidden * dtype.itemsize, dtype.name
        self._blocks = job.placement.blocks(num_sms)
        self.payload = combine_payload(hidden, dtype, num_topk)
        self._prepare(job, num_topk)

    def _prepare(self, job: Job, num_topk: int) -> None:
        self._window = job.window.cut(round_up(self._row_bytes + 4 * num_topk, UNIT))
        self._shape = kernel.shape(self._row_bytes, job.size, job.launch.stage_memory)

    def launch(self, job: Job, turn: CudaTurn, one: _Sum) -> None:
        shape, row_bytes = self._shape, self._row_bytes
        fields = (
            *self._window,
            *one.entry,
            row_bytes,
            shape.piece_bytes,
            *one.arrays,
            *shape.feed,
            row_bytes,
            one.num_topk,
            one.num_worst_tokens,
        )
        job.launch.combine(turn.stream, self._dtype, self._blocks, shape, fields)


class _InternodePlan(_Plan):
    """The same on several nodes.

    Raises:
        CapacityError: the rings have no room for a message.
    """

    def _prepare(self, job: Job, num_topk: int) -> None:
        assert job.rings is not None
        assert job.handover is not None
        per_node = job.ranks_per_node
        terms = (self._row_bytes, per_node, job.num_nodes, job.launch.stage_memory)
        self._node_shapes = [internode.shape(*terms, is_windowed) for is_windowed in (False, True)]
        asked, answered, fed, self._weights = internode.messages(self._row_bytes, num_topk, per_node)
        while asked.unit_tokens > 1 and not job.rings.has_room(asked, answered):
            asked, answered, fed, _ = internode.messages(self._row_bytes, num_topk, per_node, asked.unit_tokens // 2)
        rings = job.rings.cut((asked, answered), (internode.WANTED_GROUPS,) * 2)
        num_groups = min(ring.num_groups for ring in rings)  # a question has room for its answer
        self._rings = [*job.rings.nodes]
        for ring in rings:
            self._rings += ring._replace(num_groups=num_groups)
        self._rings += (*job.handover.nodes, *job.handover.cut((fed,), (internode.WANTED_GROUPS,))[0])

    def launch(self, job: Job, turn: CudaTurn, one: _Sum) -> None:
        shape = self._node_shapes[one.entry[0] == THROUGH_WINDOW]
        sizes = (
            *(self._row_bytes, shape.stage_bytes, self._weights),
            *(one.num_topk, one.num_worst_tokens, shape.feeding),
        )
        fields = (*self._rings, *one.entry, *one.arrays, *sizes)
        job.launch.combine(turn.stream, self._dtype, self._blocks, shape, fields)


def combine(job: Job, turn: CudaTurn, request: CombineRequest) -> CombineOutcome:
    """Bring the rows of a dispatch back to their tokens and sum them. Does not wait for anybody on the host."""
    x, weights, handle = request.x, request.topk_weights, request.handle
    turn.pin(handle.send_pos, handle.rank_prefix_matrix, handle.recv_src_idx)
    hidden, dtype, num_topk = x.shape[1], x.dtype, 0 if weights is None else weights.shape[1]
    plan = job.plan(_plan_of(job), dtype, hidden, num_topk, request.num_sms)
    rows, own_weights, copies = _own_offsets(job, turn, x, weights)
    combined = turn.new((handle.num_tokens, hidden), dtype)
    combined_weights = None if weights is None else turn.new((handle.num_tokens, num_topk), _FLOAT32)
    biases = [bias.ptr for bias in request.biases]
    agreed = values_with_handle(plan.payload, handle.dispatch_id, request.config)
    arrays = (
        x.ptr,
        0 if weights is None else weights.ptr,
        handle.recv_src_idx.ptr,
        handle.send_pos.ptr,
        handle.rank_prefix_matrix.ptr,
        *biases,
        *_NOTHING[: 2 - len(biases)],
        combined.ptr,
        0 if combined_weights is None else combined_weights.ptr,
    )
    entry = (rows, own_weights, handle.num_tokens, 0, *agreed, *_NOTHING[len(agreed) :])
    turn.has_entered = True
    plan.launch(job, turn, _Sum(entry, arrays, num_topk, handle.num_worst_tokens))
    del copies  # their memory may be had again behind this call
    job.count(rows == THROUGH_WINDOW, "combine")
    return CombineOutcome(combined, combined_weights)


def _plan_of(job: Job) -> type[_Plan]:
    return _Plan if job.rings is None else _InternodePlan


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
    block.note_reader(*turn.ref)  # before the copy: an error behind it gives the block back
    runtime = job.runtime
    runtime.memcpyAsync(block.ptr, array.ptr, num_bytes, runtime.memcpyDeviceToDevice, turn.stream)
    return (job.arena_offset + block.offset) // UNIT


def reject_combine(job: Job, turn: CudaTurn) -> None:
    """Enter a combine only to say that this rank's input is bad."""
    plan = job.plan(_plan_of(job), BFLOAT16, 8, 0, 1)
    entry = (REJECTED, NO_BLOCK, 0, 0, *_NOTHING)
    plan.launch(job, turn, _Sum(entry, _NO_ARRAYS, 0, 0))
