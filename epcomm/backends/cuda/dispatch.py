"""High-throughput dispatch: counts to everybody, then rows to their final outputs."""

from __future__ import annotations

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.backends.agreement import DISPATCH, check_agreed, dispatch_values
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.moves import MovePlan, Route, move_plan, reject_move
from epcomm.backends.cuda.outputs import Outputs, Sizes
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import DispatchOutcome, DispatchRequest, LayoutOutcome
from epcomm.errors import CapacityError, InputError, PeerError, RoutingError
from epcomm.kernels.exchange import ANY_CAPACITY, STATUS_COUNTS
from epcomm.kernels.layout import MAX_LOCAL_EXPERTS, NUM_AGREED

__all__ = ["ELSEWHERE", "contradiction", "dispatch", "dispatch_layout", "reject_exchange"]

_BOOL, _INT32 = np.dtype(np.bool_), np.dtype(np.int32)
_STATUS_REJECTED = 1
ELSEWHERE = "an error there says why"

# Of an exchange only to say no.
_NO_MARKS = (0,) * 8  # no arrays, no tokens, no experts


def dispatch_layout(job: Job, turn: CudaTurn, topk_idx: ArrayView, num_experts: int) -> LayoutOutcome:
    """Destinations of this rank's tokens. Local."""
    num_tokens, num_topk = topk_idx.shape
    per_rank = turn.new((job.size,), _INT32)
    per_node = turn.new((job.num_nodes,), _INT32) if job.num_nodes > 1 else None
    per_expert = turn.new((num_experts,), _INT32)
    marks = turn.new((num_tokens, job.size), _BOOL)
    job.launch.layout(
        turn.stream,
        num_tokens,
        num_experts + job.size + (job.num_nodes if per_node is not None else 0),
        (
            topk_idx.ptr,
            per_rank.ptr,
            0 if per_node is None else per_node.ptr,
            per_expert.ptr,
            marks.ptr,
            num_tokens,
            num_topk,
            topk_idx.dtype.itemsize,
            num_experts,
            job.size,
            job.ranks_per_node,
        ),
    )
    return LayoutOutcome(per_rank, per_node, per_expert, marks)


def dispatch(job: Job, turn: CudaTurn, request: DispatchRequest) -> DispatchOutcome:
    """Send every token once to each rank that owns one of its experts.

    Waits for the counts of all ranks, unless the request has a handle or `num_worst_tokens`.
    """
    scales, topk_idx, topk_weights = request.scales, request.topk_idx, request.topk_weights
    plan = job.plan(
        move_plan(job),
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
    counts = turn.new((job.num_nodes,), _INT32) if job.num_nodes > 1 else None
    turn.has_entered, job.is_in_step = True, False
    capacity = ANY_CAPACITY if worst else 0 if outputs is None else outputs.num_rows
    tag = _exchange(job, turn, request, send_pos, prefix, counts, capacity)
    route = Route(send_pos.ptr, prefix.ptr, 0 if counts is None else counts.ptr, tag)
    if outputs is not None:
        # In the wake of the exchange, which says whether it moves rows; meanwhile the host hears of the counts.
        plan.launch(job, turn, request, outputs, route, False)
    num_sent, experts = None, []
    if not worst:
        outputs = _await_counts(job, turn, request, plan, outputs, route)
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
        forward_counts=counts,
        dispatch_id=tag,
        num_dropped=0,  # with num_worst_tokens the page counts them
        num_sent=num_sent,
        send_pos=send_pos,
    )


def _cached(job: Job, turn: CudaTurn, request: DispatchRequest, plan: MovePlan) -> DispatchOutcome:
    handle = request.handle
    assert handle is not None
    turn.pin(handle.send_pos, handle.rank_prefix_matrix)
    outputs = Outputs.of(job, turn, plan.sizes, handle.num_rows, False)
    turn.has_entered = True
    route = Route(handle.send_pos.ptr, handle.rank_prefix_matrix.ptr, 0, handle.dispatch_id)
    plan.launch(job, turn, request, outputs, route, True)
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
    plan: MovePlan,
    outputs: Outputs | None,
    route: Route,
) -> Outputs:
    """Wait for the exchange; `outputs` if they will do, else others, and another move into them."""
    page = job.page
    page.await_tag(route.dispatch_id, job.check_job)
    if page.is_void:
        job.is_in_step = True
        _raise_answers(job)
    num_received = page.num_received
    job.forecast.note(num_received)
    if outputs is not None and outputs.num_rows >= num_received:
        outputs.resize(num_received)
        if not page.has_room:  # on another rank
            plan.launch(job, turn, request, outputs, route, True)
        return outputs
    if outputs is not None:
        outputs.give_back()  # nothing was written there, and the arena may need the room
    # All ranks come here, or those without outputs do while the others move. From here to the launch the GPU is idle.
    try:
        outputs = Outputs.of(job, turn, plan.sizes, num_received, True)
    except Exception:  # no memory: the others are on their way, and must not wait for this rank
        reject_move(job, turn)
        job.is_in_step = True
        raise
    plan.launch(job, turn, request, outputs, route, True)
    return outputs


def _exchange(
    job: Job,
    turn: CudaTurn,
    request: DispatchRequest,
    send_pos: ArrayView,
    prefix: ArrayView,
    node_counts: ArrayView | None,
    capacity: int,
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
        0 if node_counts is None else node_counts.ptr,
        marks.shape[0],
        request.num_experts // job.size,
        0,
        tag,
        not request.num_worst_tokens,
        capacity,
        *(value & 0xFFFFFFFF for value in agreed),
        *[0] * (NUM_AGREED - len(agreed)),
        job.num_nodes,
        0,
    )
    job.launch.exchange(turn.stream, fields)
    return tag


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
    job.launch.exchange(turn.stream, (*_NO_MARKS, _STATUS_REJECTED, tag, True, 0, *(0,) * NUM_AGREED, 0, 0))
    job.page.await_tag(tag, job.check_job)
    _rejection(job, job.page.status().tolist(), str(error) or repr(error))
