"""High-throughput dispatch: counts to everybody, then rows to their final outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from epcomm.arrays import ArraySpec, ArrayView
from epcomm.backends.agreement import DISPATCH, check_agreed, dispatch_payload, dispatch_values, values_with_handle
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.outputs import Outputs, Sizes
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import DispatchOutcome, DispatchRequest, LayoutOutcome
from epcomm.errors import CapacityError, InputError, PeerError, RoutingError
from epcomm.kernels import dispatch as kernel
from epcomm.kernels.exchange import ANY_CAPACITY, STATUS_COUNTS
from epcomm.kernels.layout import (
    MAX_LOCAL_EXPERTS,
    NO_BLOCK,
    NUM_AGREED,
    NUM_ENTRY_AGREED,
    REJECTED,
)

__all__ = ["ELSEWHERE", "contradiction", "dispatch", "dispatch_layout", "reject_exchange", "reject_move"]

_BOOL, _INT32 = np.dtype(np.bool_), np.dtype(np.int32)
_STATUS_REJECTED = 1
ELSEWHERE = "an error there says why"

# Arguments of kernels that are launched only to say no.
_NO_MARKS = (0,) * 7  # no arrays, no tokens, no experts
_NOTHING = (0,) * NUM_ENTRY_AGREED
_NOTHING_TO_AGREE_ON = (0, 0, *_NOTHING)  # of no tokens
_NO_ARRAYS = (0,) * 13
_NOTHING_BESIDE = (0, 1, 0, 8, 0)  # no scales of 1 byte, no choices of 8 bytes, no experts


def dispatch_layout(job: Job, turn: CudaTurn, topk_idx: ArrayView, num_experts: int) -> LayoutOutcome:
    """Destinations of this rank's tokens. Local."""
    num_tokens, num_topk = topk_idx.shape
    per_rank = turn.new((job.size,), _INT32)
    per_expert = turn.new((num_experts,), _INT32)
    marks = turn.new((num_tokens, job.size), _BOOL)
    job.launch.layout(
        turn.stream,
        num_tokens,
        num_experts + job.size,
        (
            topk_idx.ptr,
            per_rank.ptr,
            0,
            per_expert.ptr,
            marks.ptr,
            num_tokens,
            num_topk,
            topk_idx.dtype.itemsize,
            num_experts,
            job.size,
            job.size,
        ),
    )
    return LayoutOutcome(per_rank, None, per_expert, marks)


def dispatch(job: Job, turn: CudaTurn, request: DispatchRequest) -> DispatchOutcome:
    """Send every token once to each rank that owns one of its experts.

    Waits for the counts of all ranks, unless the request has a handle or `num_worst_tokens`.
    """
    scales, topk_idx, topk_weights = request.scales, request.topk_idx, request.topk_weights
    plan = job.plan(
        _MovePlan,
        request.x.spec,
        None if scales is None else scales.spec,
        None if topk_idx is None else topk_idx.spec,
        None if topk_weights is None else topk_weights.spec,
        request.num_experts,
        request.num_sms,
    )
    if request.handle is not None:
        return _cached(job, turn, request, plan)
    num_local = request.num_experts // job.size
    if num_local > MAX_LOCAL_EXPERTS:
        raise CapacityError("num_experts", got=f"{num_local} a rank", wanted=f"at most {MAX_LOCAL_EXPERTS} a rank")
    worst = request.num_worst_tokens
    if turn.is_captured and not worst:
        raise InputError(
            "dispatch",
            got="a stream under capture, and a call that waits for counts",
            wanted="a call that does not: with num_worst_tokens, or with a handle",
        )
    outputs = _outputs_in_advance(job, turn, plan.sizes, worst)
    send_pos = turn.new((plan.sizes.num_tokens, job.size), _INT32)
    prefix = turn.new((job.size, job.size), _INT32)
    turn.has_entered, job.is_in_step = True, False
    capacity = ANY_CAPACITY if worst else 0 if outputs is None else outputs.num_rows
    tag = _exchange(job, turn, request, send_pos, prefix, capacity)
    if outputs is not None:
        # In the wake of the exchange, which says whether it moves rows; meanwhile the host hears of the counts.
        _move(job, turn, request, plan, outputs, send_pos, prefix, tag, False)
    num_sent, experts = None, []
    if not worst:
        outputs = _await_counts(job, turn, request, plan, outputs, send_pos, prefix, tag)
        unit, num_sent = request.expert_alignment, job.page.num_sent
        experts = [-(-count // unit) * unit for count in job.page.experts(num_local)]
    assert outputs is not None
    job.is_in_step = True
    outputs.own()
    job.count(outputs.is_windowed, "dispatch")
    return DispatchOutcome(
        recv_x=outputs.rows(request.x),
        recv_scales=outputs.scales(request.scales),
        recv_topk_idx=outputs.topk_idx(request.topk_idx),
        recv_topk_weights=outputs.topk_weights(request.topk_weights),
        num_recv_tokens_per_expert=experts,
        rank_prefix_matrix=prefix,
        recv_src_idx=outputs.src_idx(),
        is_token_in_rank=request.is_token_in_rank,
        forward_mask=None,
        forward_counts=None,
        dispatch_id=tag,
        num_dropped=0,  # with num_worst_tokens the page counts them
        num_sent=num_sent,
        send_pos=send_pos,
    )


def _cached(job: Job, turn: CudaTurn, request: DispatchRequest, plan: _MovePlan) -> DispatchOutcome:
    handle = request.handle
    assert handle is not None
    turn.pin(handle.send_pos, handle.rank_prefix_matrix)
    outputs = Outputs.of(job, turn, plan.sizes, handle.num_rows, False)
    turn.has_entered = True
    _move(job, turn, request, plan, outputs, handle.send_pos, handle.rank_prefix_matrix, handle.dispatch_id, True)
    outputs.own()
    job.count(outputs.is_windowed, "dispatch")
    return DispatchOutcome(outputs.rows(request.x), outputs.scales(request.scales))


def _outputs_in_advance(job: Job, turn: CudaTurn, sizes: Sizes, num_worst_tokens: int) -> Outputs | None:
    """Outputs for as many rows as there will be at most, or as there are likely to be, if the arena has room."""
    if num_worst_tokens:
        return Outputs.of(job, turn, sizes, num_worst_tokens, True)
    return Outputs.in_arena(job, turn, sizes, job.forecast.rows) if job.forecast.rows else None


def _await_counts(
    job: Job,
    turn: CudaTurn,
    request: DispatchRequest,
    plan: _MovePlan,
    outputs: Outputs | None,
    send_pos: ArrayView,
    prefix: ArrayView,
    tag: int,
) -> Outputs:
    """Wait for the exchange; `outputs` if they will do, else others, and another move into them."""
    page = job.page
    page.await_tag(tag, job.check_job)
    if page.is_void:
        job.is_in_step = True
        _raise_answers(job)
    num_received = page.num_received
    job.forecast.note(num_received)
    if outputs is not None and page.has_room:
        outputs.resize(num_received)
        return outputs
    # All ranks come here, or those without outputs do while the others move. From here to the launch the GPU is idle.
    try:
        outputs = Outputs.of(job, turn, plan.sizes, num_received, True)
    except Exception:  # no memory: the others are on their way, and must not wait for this rank
        reject_move(job, turn)
        job.is_in_step = True
        raise
    _move(job, turn, request, plan, outputs, send_pos, prefix, tag, True)
    return outputs


def _exchange(
    job: Job, turn: CudaTurn, request: DispatchRequest, send_pos: ArrayView, prefix: ArrayView, capacity: int
) -> int:
    marks, per_rank, per_expert = request.is_token_in_rank, request.num_tokens_per_rank, request.num_tokens_per_expert
    agreed = dispatch_values(request)
    tag = job.next_tag()
    fields = (
        marks.ptr,
        per_rank.ptr if per_rank is not None else 0,
        per_expert.ptr if per_expert is not None else 0,
        send_pos.ptr,
        prefix.ptr,
        marks.shape[0],
        request.num_experts // job.size,
        0,
        tag,
        not request.num_worst_tokens,
        capacity,
        *(value & 0xFFFFFFFF for value in agreed),
        *[0] * (NUM_AGREED - len(agreed)),
    )
    job.launch.exchange(turn.stream, fields)
    return tag


class _MovePlan:
    """What a move needs apart from addresses and the number of received rows. Made once for all that are alike.

    Attributes:
        shapes: of the launch, by whether outputs are filled through the window.
        payload: what the ranks agree on about their rows.
        strides: of the scales.
        window, slot_fields, rows: fields of the kernel.

    Raises:
        CapacityError: the window has no room for a row.
    """

    def __init__(
        self,
        job: Job,
        x: ArraySpec,
        scales: ArraySpec | None,
        topk_idx: ArraySpec | None,
        topk_weights: ArraySpec | None,
        num_experts: int,
        num_sms: int,
    ) -> None:
        self.sizes = sizes = Sizes.of(x, scales, topk_idx, topk_weights)
        self.blocks = job.placement.blocks(num_sms)
        self.window = job.window.cut(sizes.slot.num_bytes)
        self.payload = dispatch_payload(x, scales)
        self.slot_fields = sizes.slot.fields
        self.strides = (0, 0) if scales is None else (*scales.strides, 0)[:2]
        self.shapes = [
            kernel.shape(
                sizes.row_bytes, job.launch.stage_memory, self.blocks * job.placement.ranks_on_gpu, is_windowed
            )
            for is_windowed in (False, True)
        ]
        num_local = num_experts // job.size
        self.rows = (sizes.num_scales, sizes.scale_bytes, sizes.num_topk, sizes.index_bytes, num_local)


def _move(
    job: Job,
    turn: CudaTurn,
    request: DispatchRequest,
    plan: _MovePlan,
    outputs: Outputs,
    send_pos: Any,
    prefix: Any,
    dispatch_id: int,
    is_forced: bool,
) -> None:
    """Launch the move. Unless it is forced, the last exchange says whether it moves anything."""
    scales, topk_idx, weights = request.scales, request.topk_idx, request.topk_weights
    shape = plan.shapes[outputs.is_windowed]
    agreed = values_with_handle(plan.payload, dispatch_id, request.config)
    fields = (
        *plan.window,
        *outputs.offsets,
        plan.sizes.num_tokens,
        0,
        *agreed,
        *_NOTHING[len(agreed) :],
        *plan.slot_fields,
        request.x.ptr,
        0 if scales is None else scales.ptr,
        *plan.strides,
        0 if topk_idx is None else topk_idx.ptr,
        0 if weights is None else weights.ptr,
        send_pos.ptr,
        prefix.ptr,
        *outputs.addresses,
        *shape.pieces,
        shape.pieces.piece_bytes,
        *plan.rows,
        request.num_worst_tokens,
        is_forced,
        plan.sizes.has_weights,
    )
    job.launch.dispatch(turn.stream, plan.blocks, shape, fields)


def _raise_answers(job: Job) -> None:
    """Raise because a rank rejected its input, or the ranks disagree. All ranks come to the same answer."""
    status = job.page.status().tolist()
    if any(status):
        own = contradiction() if status[job.rank] == STATUS_COUNTS else None
        error = _rejection(job, status, str(own) if own else "")
        raise own or error
    check_agreed("dispatch", DISPATCH, job.page.agreed().tolist())


def contradiction() -> RoutingError:
    """What `STATUS_COUNTS` means on the rank that has it."""
    return RoutingError(
        "num_tokens_per_rank",
        got="counts that contradict is_token_in_rank",
        do="pass what get_dispatch_layout returned for this topk_idx",
    )


def _rejection(job: Job, status: list[int], own: str) -> PeerError:
    """The ranks that rejected their input say why, `own` if this is one; collective where all wait for counts."""
    texts = [ELSEWHERE] * job.size
    # Ranks whose calls wait for no counts hear of it later, in `check`, so they are not here to talk.
    if not job.page.agreed()[:, DISPATCH.index("num_worst_tokens")].any():
        texts = job.comm.allgather(own)
    return PeerError("dispatch", {rank: texts[rank] for rank, code in enumerate(status) if code})


def reject_exchange(job: Job, turn: CudaTurn, error: Exception) -> None:
    """Take part in the exchange of a dispatch only to tell the peers that this rank's input is bad."""
    tag = job.next_tag()
    job.launch.exchange(turn.stream, (*_NO_MARKS, _STATUS_REJECTED, tag, True, 0, *(0,) * NUM_AGREED))
    job.page.await_tag(tag, job.check_job)
    _rejection(job, job.page.status().tolist(), str(error) or repr(error))


def reject_move(job: Job, turn: CudaTurn) -> None:
    """Enter the move of a dispatch only to say that this rank cannot take part."""
    shape, slot = kernel.shape(16, job.launch.stage_memory, job.placement.ranks_on_gpu, False), kernel.slot(16, 0, 0, 0)
    fields = (
        *job.window.cut(slot.num_bytes),
        REJECTED,
        NO_BLOCK,
        *_NOTHING_TO_AGREE_ON,
        *slot.fields,
        *_NO_ARRAYS,
        *shape.pieces,
        shape.pieces.piece_bytes,
        *_NOTHING_BESIDE,
        0,
        True,
        False,
    )
    job.launch.dispatch(turn.stream, 1, shape, fields)
