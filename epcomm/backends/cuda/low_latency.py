"""Low-latency dispatch and combine: rows grouped by expert on arrival, send and receive halves apart."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

from epcomm.backends.agreement import LOW_LATENCY_COMBINE, low_latency_combine_values, low_latency_dispatch_values
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.slots import LowLatency, Ring
from epcomm.backends.cuda.turn import BlockLayout, CudaTurn, output_spec
from epcomm.backends.protocol import (
    LowLatencyCombineRequest,
    LowLatencyCombineTerms,
    LowLatencyDispatchOutcome,
    LowLatencyDispatchRequest,
    LowLatencyDispatchTerms,
    Rejectable,
)
from epcomm.config import (
    COMBINE_LANES,
    LowLatencyNeed,
    low_latency_bytes,
    low_latency_combine_need,
    low_latency_combine_pieces,
    low_latency_dispatch_need,
    low_latency_dispatch_pieces,
    low_latency_row_stride,
)
from epcomm.errors import CapacityError
from epcomm.kernels import low_latency_combine as combine_kernel
from epcomm.kernels import low_latency_dispatch as kernel
from epcomm.kernels.arguments import divisor
from epcomm.kernels.layout import MAX_LOCAL_EXPERTS, MAX_RANKS, NUM_ENTRY_AGREED
from epcomm.kernels.low_latency import MAX_EXPERTS, MAX_TOKENS, RECEIVE, SEND
from epcomm.numerics import BFLOAT16, FP8_BLOCK, FP8_E4M3, logfmt_row_bytes, num_packed_scales

__all__ = ["combine", "dispatch", "pass_over", "reject_combine", "reject_dispatch"]

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_SCALES = (kernel.EXACT, kernel.POWER_OF_TWO, kernel.EXPONENTS)
_NOTHING = (0,) * (2 + NUM_ENTRY_AGREED)
_VALUES = struct.Struct(f"<{NUM_ENTRY_AGREED}I")
_DIGEST_BITS = 0x7FFFFFFE  # one bit of a word tells how rows travel; with the first one it means something else
_DISPATCH_FACTOR = 0x9E3779B2  # even, and of two numbers below 2^30 the products differ in those bits

Receive = Callable[[CudaTurn], None]


class _DispatchPlan:
    """What a dispatch needs apart from addresses. Made once for all that are alike, see `Job.plan`.

    Attributes:
        rows: the large arrays of `LowLatencyDispatchOutcome`: recv_x and, with fp8, recv_scales.
        beside: the others, which a handle keeps for longer: recv_count, src_info, recv_ranges, send_info, messages,
            num_messages.
        before, after: fields of the kernel, between the slot's and the addresses, and behind those.
    """

    def __init__(self, job: Job, terms: LowLatencyDispatchTerms) -> None:
        _check_dispatch(job, terms)
        area, hidden, num_topk, use_fp8 = job.low_latency.area, terms.hidden, terms.num_topk, terms.use_fp8
        num_local, max_tokens = terms.num_experts // job.size, terms.num_max_dispatch_tokens_per_rank
        pieces = low_latency_dispatch_pieces(hidden, max_tokens, use_fp8)
        words = kernel.num_words(terms.num_tokens, num_local, job.size, num_topk)
        self.use_fp8 = use_fp8
        self.blocks = job.placement.blocks(terms.num_sms)
        self.shared_bytes = kernel.shared_bytes(num_local, job.size, num_topk, words)
        self.before = (
            *_agreed(low_latency_dispatch_values(terms), area.far),
            area.row_lane_bytes,
            area.cell_lane_bytes,
            low_latency_row_stride(hidden, use_fp8),
        )
        self.after = (
            *divisor(num_topk),
            *divisor(num_local),
            *divisor(pieces.num_pieces),
            _SCALES[terms.round_scale + terms.use_ue8m0],
            *pieces,
            words,
            hidden,
            terms.num_tokens,
            num_topk,
            terms.index_bytes,
            num_local,
            max_tokens,
        )
        max_rows, device = job.size * max_tokens, job.device
        rows = [output_spec((num_local, max_rows, hidden), FP8_E4M3 if use_fp8 else BFLOAT16, device)]
        if use_fp8:  # scales have the token dimension fastest in memory
            width = num_packed_scales(hidden) if terms.use_ue8m0 else hidden // FP8_BLOCK
            dtype, strides = _INT32 if terms.use_ue8m0 else _FLOAT32, (width * max_rows, 1, max_rows)
            rows.append(output_spec((num_local, max_rows, width), dtype, device, strides))
        self.rows = BlockLayout(*rows)
        beside = (
            (num_local,),
            (num_local, max_rows),
            (num_local, job.size, 2),
            (terms.num_tokens, num_topk, 2),
            (job.size, max_tokens, 1 + num_topk),
            (job.size + 1,),
        )
        self.beside = BlockLayout(*[output_spec(shape, _INT32, device) for shape in beside])


def dispatch(job: Job, turn: CudaTurn, request: LowLatencyDispatchRequest) -> tuple[LowLatencyDispatchOutcome, Receive]:
    """The send half, and the receive half too unless it is postponed. Does not wait for anybody on the host."""
    low = job.low_latency
    slot = low.dispatches.next_slot()
    plan = job.plan(_DispatchPlan, request.terms)
    recv_x, *scales = turn.new_arrays(plan.rows)
    recv_scales = scales[0] if scales else None
    recv_count, src_info, recv_ranges, send_info, messages, num_messages = turn.new_arrays(plan.beside)

    def launch(stream: int, halves: int) -> None:
        fields = (
            *low.slot_fields(low.dispatches, slot, halves),
            *plan.before,
            low.area.dispatch_staging(slot),
            request.x.ptr,
            request.topk_idx.ptr,
            send_info.ptr,
            recv_x.ptr,
            0 if recv_scales is None else recv_scales.ptr,
            recv_count.ptr,
            src_info.ptr,
            recv_ranges.ptr,
            messages.ptr,
            num_messages.ptr,
            0 if request.expert_stats is None else request.expert_stats.ptr,
            0 if request.wait_stats is None else request.wait_stats.ptr,
            *plan.after,
        )
        low.launch.dispatch(stream, plan.use_fp8, plan.blocks, plan.shared_bytes, fields)

    outcome = LowLatencyDispatchOutcome(
        recv_x,
        recv_scales,
        recv_count,
        src_info,
        recv_ranges,
        send_info,
        messages,
        num_messages,
        low.dispatches.next_number,
    )
    return outcome, _launch_halves(low, low.dispatches, slot, turn, request.is_postponed, launch)


class _CombinePlan:
    """What a combine needs apart from addresses. Made once for all that are alike, see `Job.plan`.

    Attributes:
        payload: what travels, see the kernel.
        blocks, send_blocks: of a launch, and of one that only sends.
        digest: of what ranks compare, but for the dispatch.
        far: ranks that are behind the network, a bit each.
        agreed, unused: what they compare, but for that, and how many fields are left.
        after: fields of the kernel, behind the addresses.
    """

    def __init__(self, job: Job, terms: LowLatencyCombineTerms) -> None:
        _check_combine(job, terms)
        hidden, max_tokens = terms.hidden, terms.num_max_dispatch_tokens_per_rank
        num_local, pieces = terms.num_experts // job.size, low_latency_combine_pieces(hidden, max_tokens)
        self.payload = _payload(terms)
        is_pulled = terms.zero_copy and self.payload == combine_kernel.ROWS
        self.blocks = job.placement.blocks(terms.num_sms)
        # Whoever only says where its rows are does that in one block.
        self.send_blocks = 1 if is_pulled and not job.low_latency.area.far else self.blocks
        self.shared_bytes = combine_kernel.shared_bytes(self.payload, terms.num_experts)
        self.digest, self.far, *values = _agreed(low_latency_combine_values(terms), job.low_latency.area.far)
        self.agreed, self.unused = (
            tuple(values[: len(LOW_LATENCY_COMBINE) - 1]),
            (0,) * (NUM_ENTRY_AGREED - len(LOW_LATENCY_COMBINE)),
        )
        self.after = (
            2 * hidden,
            logfmt_row_bytes(hidden) if terms.use_logfmt else 2 * hidden,
            *pieces,
            is_pulled,
            terms.num_tokens,
            terms.num_topk,
            terms.index_bytes,
            num_local,
            max_tokens,
            *divisor(num_local),
            *divisor(pieces.num_pieces),
        )


def combine(job: Job, turn: CudaTurn, request: LowLatencyCombineRequest) -> Receive:
    """The send half, and the receive half too unless it is postponed. Does not wait for anybody on the host."""
    low, handle = job.low_latency, request.handle
    slot = low.combines.next_slot()
    plan = job.plan(_CombinePlan, request.terms)
    turn.pin(handle.recv_ranges, handle.send_info, handle.messages, handle.num_messages)
    buffers = low.combine_addresses[slot]  # when the receive half is launched there may be others
    dispatch_id = handle.dispatch_id
    digest = (plan.digest + _DISPATCH_FACTOR * dispatch_id) & _DIGEST_BITS

    def launch(stream: int, halves: int) -> None:
        fields = (
            *low.slot_fields(low.combines, slot, halves),
            digest,
            plan.far,
            *plan.agreed,
            dispatch_id,
            *plan.unused,
            *buffers,
            *low.area.combine_staging(slot),
            request.x.ptr,
            request.topk_idx.ptr,
            request.topk_weights.ptr,
            handle.send_info.ptr,
            handle.recv_ranges.ptr,
            handle.messages.ptr,
            handle.num_messages.ptr,
            request.out.ptr,
            0 if request.wait_stats is None else request.wait_stats.ptr,
            *plan.after,
        )
        blocks = plan.send_blocks if halves == SEND else plan.blocks
        low.launch.combine(stream, plan.payload, blocks, plan.shared_bytes, fields)

    return _launch_halves(low, low.combines, slot, turn, request.is_postponed, launch)


def _launch_halves(
    low: LowLatency, ring: Ring, slot: int, turn: CudaTurn, is_postponed: bool, launch: Callable[[int, int], None]
) -> Receive:
    """Launch the send half, or both; what launches the receive half."""
    is_combine = ring is low.combines
    turn.has_entered = True
    launch(turn.stream, SEND if is_postponed else SEND | RECEIVE)
    send = low.pulls.note_send(turn.capture)
    if is_combine:
        low.pulls.note_combine(slot, send, turn.capture, is_postponed=is_postponed)
    if not is_postponed:
        ring.pass_over(slot)
        low.pulls.note_received(send, turn.capture)
        return _received
    number = ring.take(slot)

    def receive(later: CudaTurn) -> None:
        is_overtaken = ring.give_back(slot, number)
        later.use_outputs_of(turn)
        launch(later.stream, RECEIVE)
        low.pulls.note_received(send, later.capture)
        if is_overtaken and is_combine:
            # Peers that wait for this buffer need not hear of it from the next call, which may wait for them.
            low.launch.service(later.stream)

    return receive


def _received(later: CudaTurn) -> None:
    """The receive half was launched with the send half."""


def pass_over(job: Job, operation: Rejectable) -> None:
    """Use up a slot, as the other ranks do, for a call that this one does not take part in."""
    if not job.has_low_latency:
        return
    if operation is Rejectable.LOW_LATENCY_DISPATCH:
        job.low_latency.dispatches.pass_over(job.low_latency.dispatches.next_slot())
    elif operation is Rejectable.LOW_LATENCY_COMBINE:
        job.low_latency.combines.pass_over(job.low_latency.combines.next_slot())


def reject_dispatch(job: Job, turn: CudaTurn) -> None:
    """Take part in a dispatch only to say that this rank's input is bad."""
    low = job.low_latency
    slot = low.dispatches.next_slot()
    fields = low.slot_fields(low.dispatches, slot, SEND | RECEIVE, is_rejected=True)
    low.launch.dispatch(turn.stream, False, 1, 0, (*fields, *_NOTHING, *(0,) * 32))
    low.dispatches.pass_over(slot)


def reject_combine(job: Job, turn: CudaTurn) -> None:
    """Take part in a combine only to say that this rank's input is bad."""
    low = job.low_latency
    slot = low.combines.next_slot()
    fields = low.slot_fields(low.combines, slot, SEND | RECEIVE, is_rejected=True)
    low.launch.combine(turn.stream, combine_kernel.ROWS, 1, 0, (*fields, *_NOTHING, *(0,) * (MAX_RANKS + 25)))
    low.combines.pass_over(slot)


def _payload(terms: LowLatencyCombineTerms) -> int:
    if terms.use_logfmt:
        return combine_kernel.ENCODED_ROWS
    return combine_kernel.PARTIAL_SUMS if terms.pre_reduce else combine_kernel.ROWS


def _agreed(values: tuple[int, ...], far: int) -> tuple[int, ...]:
    """What ranks compare: a digest, and the values, which they look at when the digests differ; between them `far`."""
    padded = (*values, *(0,) * (NUM_ENTRY_AGREED - len(values)))
    return zlib.crc32(_VALUES.pack(*padded)) & _DIGEST_BITS, far, *padded


def _check_dispatch(job: Job, terms: LowLatencyDispatchTerms) -> None:
    """Raise CapacityError for sizes that the kernel, or the area, has no room for."""
    max_tokens, num_local = terms.num_max_dispatch_tokens_per_rank, terms.num_experts // job.size
    if max_tokens > MAX_TOKENS:
        raise CapacityError("num_max_dispatch_tokens_per_rank", got=str(max_tokens), wanted=f"at most {MAX_TOKENS}")
    if num_local > MAX_LOCAL_EXPERTS or terms.num_experts > MAX_EXPERTS:
        raise CapacityError(
            "num_experts",
            got=f"{terms.num_experts}, {num_local} a rank",
            wanted=f"at most {MAX_EXPERTS}, {MAX_LOCAL_EXPERTS} a rank",
        )
    hidden, num_topk = terms.hidden, terms.num_topk
    need = low_latency_dispatch_need(max_tokens, hidden, job.size, terms.num_experts, num_topk, terms.use_fp8)
    _check_room(job, need, max_tokens, hidden, terms.num_experts, num_topk)


def _check_combine(job: Job, terms: LowLatencyCombineTerms) -> None:
    """Raise CapacityError where the rows of all choices have no room."""
    max_tokens, hidden, num_topk = terms.num_max_dispatch_tokens_per_rank, terms.hidden, terms.num_topk
    need = low_latency_combine_need(max_tokens, hidden, job.size, terms.num_experts, num_topk, terms.pre_reduce)
    _check_room(job, need, max_tokens, hidden, terms.num_experts, num_topk)


def _check_room(job: Job, need: LowLatencyNeed, max_tokens: int, hidden: int, num_experts: int, num_topk: int) -> None:
    area = job.low_latency.area
    if need.rows <= area.row_lane_bytes and need.cells <= area.cell_lane_bytes:
        return
    needed = low_latency_bytes(max_tokens, hidden, job.size, num_experts, num_topk=max(num_topk, COMBINE_LANES))
    raise CapacityError(
        "num_rdma_bytes",
        got=f"{area.num_bytes} bytes",
        wanted=f"at least {needed} for {max_tokens} tokens of {hidden} channels and {num_topk} choices",
        do="size the Buffer with get_low_latency_rdma_size_hint",
    )
