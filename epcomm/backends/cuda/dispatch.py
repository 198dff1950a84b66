"""High-throughput dispatch: counts to everybody, then rows to their final places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.backends.agreement import DISPATCH, cached_dispatch_values, check_agreed, dispatch_values
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import DispatchOutcome, DispatchRequest, LayoutOutcome
from epcomm.errors import CapacityError, InputError, PeerError, RoutingError
from epcomm.kernels import dispatch as kernel
from epcomm.kernels.exchange import STATUS_COUNTS
from epcomm.kernels.layout import (
    MAX_LOCAL_EXPERTS,
    NO_BLOCK,
    NUM_AGREED,
    NUM_ENTRY_AGREED,
    REJECTED,
    THROUGH_WINDOW,
    UNIT,
    MetadataLayout,
    scales_offset,
)
from epcomm.memory import Block

__all__ = ["ELSEWHERE", "contradiction", "dispatch", "dispatch_layout", "reject_exchange", "reject_move"]

_BOOL, _INT32, _FLOAT32 = np.dtype(np.bool_), np.dtype(np.int32), np.dtype(np.float32)
_STATUS_REJECTED = 1
ELSEWHERE = "an error there says why"

# Arguments of kernels that are launched only to say no.
_NO_MARKS = (0,) * 7  # no arrays, no tokens, no experts
_NOTHING_TO_AGREE_ON = (0, 0, *(0,) * NUM_ENTRY_AGREED)  # of no tokens
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
    )
    return LayoutOutcome(per_rank, None, per_expert, marks)


@dataclass(slots=True)
class _Sizes:
    """What the kernels need to know of a request, apart from addresses."""

    num_tokens: int
    row_bytes: int
    scale_bytes: int  # of one scale
    num_scales: int
    num_topk: int
    index_bytes: int
    has_weights: bool

    @classmethod
    def of(cls, request: DispatchRequest) -> _Sizes:
        x, scales, topk_idx = request.x, request.scales, request.topk_idx
        return cls(
            num_tokens=x.shape[0],
            row_bytes=x.shape[1] * x.dtype.itemsize,
            scale_bytes=1 if scales is None else scales.dtype.itemsize,
            num_scales=0 if scales is None else math.prod(scales.shape[1:]),
            num_topk=0 if topk_idx is None else topk_idx.shape[1],
            index_bytes=8 if topk_idx is None else topk_idx.dtype.itemsize,
            has_weights=request.topk_weights is not None,
        )

    @property
    def slot(self) -> kernel.Slot:
        return kernel.slot(
            self.row_bytes,
            self.num_scales * self.scale_bytes,
            self.num_topk * self.index_bytes,
            self.num_topk * 4 if self.has_weights else 0,
        )


class _Places:
    """Where a rank's outputs are: in the arena, where peers write them, or outside, filled through the window."""

    def __init__(self, job: Job, turn: CudaTurn, sizes: _Sizes, num_rows: int, has_metadata: bool) -> None:
        stream = turn.stream
        self._scales = scales_offset(num_rows, sizes.row_bytes)
        num_bytes = self._scales + num_rows * sizes.num_scales * sizes.scale_bytes
        self._beside = MetadataLayout(num_rows, sizes.num_topk, sizes.index_bytes, sizes.has_weights)
        rows = job.arena.allocate(num_bytes, stream)
        metadata: Block | None = None
        if has_metadata and rows is not None:
            metadata = job.arena.allocate(self._beside.num_bytes, stream, high=True)
        self.is_windowed = rows is None or (has_metadata and metadata is None)
        if self.is_windowed:
            rows = job.outputs.allocate(num_bytes, stream)
            if has_metadata:
                metadata = job.outputs.allocate(self._beside.num_bytes, stream)
            self.offsets = (THROUGH_WINDOW, THROUGH_WINDOW)
        else:
            assert rows is not None
            in_region = job.arena_offset // UNIT
            self.offsets = (
                in_region + rows.offset // UNIT,
                NO_BLOCK if metadata is None else in_region + metadata.offset // UNIT,
            )
        assert rows is not None
        self._rows, self._metadata, self._turn, self._sizes, self._num_rows = rows, metadata, turn, sizes, num_rows

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """By field of the kernel: row, scales, topk_idx, topk_weights, source."""
        rows, metadata = self._rows.ptr, 0 if self._metadata is None else self._metadata.ptr
        if not metadata:
            return (rows, rows + self._scales, 0, 0, 0)
        beside = self._beside
        return (rows, rows + self._scales, metadata + beside.topk_idx, metadata + beside.topk_weights, metadata)

    def rows(self, like: ArrayView) -> ArrayView:
        return self._turn.over(self._rows, 0, (self._num_rows, like.shape[1]), like.dtype)

    def scales(self, like: ArrayView | None) -> ArrayView | None:
        if like is None:
            return None
        return self._turn.over(self._rows, self._scales, (self._num_rows, *like.shape[1:]), like.dtype)

    def topk_idx(self, like: ArrayView | None) -> ArrayView | None:
        if like is None or self._metadata is None:
            return None
        return self._turn.over(self._metadata, self._beside.topk_idx, (self._num_rows, like.shape[1]), like.dtype)

    def topk_weights(self, like: ArrayView | None) -> ArrayView | None:
        if like is None or self._metadata is None:
            return None
        shape = (self._num_rows, like.shape[1])
        return self._turn.over(self._metadata, self._beside.topk_weights, shape, _FLOAT32)

    def src_idx(self, num_received: int) -> ArrayView:
        assert self._metadata is not None
        return self._turn.over(self._metadata, 0, (num_received,), _INT32)


def dispatch(job: Job, turn: CudaTurn, request: DispatchRequest) -> DispatchOutcome:
    """Send every token once to each rank that owns one of its experts.

    Waits for the counts of all ranks, unless the request has a handle or `num_worst_tokens`.
    """
    sizes = _Sizes.of(request)
    if request.handle is not None:
        return _cached(job, turn, request, sizes)
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
    job.window.cut(sizes.slot.num_bytes)  # raises before peers count on this rank
    send_pos = turn.new((sizes.num_tokens, job.size), _INT32)
    prefix = turn.new((job.size, job.size), _INT32)
    turn.has_entered, job.is_in_step = True, False
    tag = _exchange(job, turn, request, send_pos, prefix)
    num_received, page = worst, job.page
    experts: list[int] = []
    if not worst:
        # From here to the launch the GPU is idle.
        page.await_tag(tag, job.check_job)
        if page.is_void:
            job.is_in_step = True
            _raise_answers(job)
        num_received = page.num_received
    try:
        places = _Places(job, turn, sizes, num_received, True)
    except Exception:  # no memory: the others are on their way, and must not wait for this rank
        reject_move(job, turn, is_cached=False)
        job.is_in_step = True
        raise
    _move(job, turn, request, sizes, places, send_pos, prefix, tag, False)
    job.is_in_step = True
    if not worst:
        unit = request.expert_alignment
        experts = [-(-count // unit) * unit for count in page.experts(num_local)]
    return DispatchOutcome(
        recv_x=places.rows(request.x),
        recv_scales=places.scales(request.scales),
        recv_topk_idx=places.topk_idx(request.topk_idx),
        recv_topk_weights=places.topk_weights(request.topk_weights),
        num_recv_tokens_per_expert=experts,
        rank_prefix_matrix=prefix,
        recv_src_idx=places.src_idx(num_received),
        is_token_in_rank=request.is_token_in_rank,
        forward_mask=None,
        forward_counts=None,
        dispatch_id=tag,
        num_dropped=0,  # with num_worst_tokens the page counts them
        num_sent=None if worst else page.num_sent,
        send_pos=send_pos,
    )


def _cached(job: Job, turn: CudaTurn, request: DispatchRequest, sizes: _Sizes) -> DispatchOutcome:
    handle = request.handle
    assert handle is not None
    turn.pin(handle.send_pos, handle.rank_prefix_matrix)
    job.window.cut(sizes.slot.num_bytes)
    places = _Places(job, turn, sizes, handle.num_rows, False)
    turn.has_entered = True
    _move(job, turn, request, sizes, places, handle.send_pos, handle.rank_prefix_matrix, handle.dispatch_id, True)
    return DispatchOutcome(
        recv_x=places.rows(request.x),
        recv_scales=places.scales(request.scales),
        recv_topk_idx=None,
        recv_topk_weights=None,
        num_recv_tokens_per_expert=[],
        rank_prefix_matrix=handle.rank_prefix_matrix,
        recv_src_idx=handle.recv_src_idx,
        is_token_in_rank=handle.is_token_in_rank,
        forward_mask=None,
        forward_counts=None,
        dispatch_id=handle.dispatch_id,
        num_dropped=0,
        num_sent=None,
        send_pos=handle.send_pos,
    )


def _exchange(job: Job, turn: CudaTurn, request: DispatchRequest, send_pos: ArrayView, prefix: ArrayView) -> int:
    marks, per_rank, per_expert = request.is_token_in_rank, request.num_tokens_per_rank, request.num_tokens_per_expert
    agreed = dispatch_values(request)
    tag = job.next_tag()
    job.launch.exchange(
        turn.stream,
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
        0,
        *(value & 0xFFFFFFFF for value in agreed),
        *[0] * (NUM_AGREED - len(agreed)),
    )
    return tag


def _move(
    job: Job,
    turn: CudaTurn,
    request: DispatchRequest,
    sizes: _Sizes,
    places: _Places,
    send_pos: Any,
    prefix: Any,
    dispatch_id: int,
    is_cached: bool,
) -> None:
    scales, topk_idx, weights = request.scales, request.topk_idx, request.topk_weights
    blocks, slot = job.placement.blocks(request.num_sms), sizes.slot
    shape = kernel.shape(
        sizes.row_bytes, job.launch.stage_memory, blocks * job.placement.ranks_on_gpu, places.is_windowed
    )
    strides = (0, 0) if scales is None else (scales.strides[0], scales.strides[1] if len(scales.strides) > 1 else 0)
    agreed = cached_dispatch_values(request, dispatch_id)
    job.launch.dispatch(
        turn.stream,
        blocks,
        shape,
        *job.window.cut(slot.num_bytes),
        *places.offsets,
        sizes.num_tokens,
        0,
        *agreed,
        *[0] * (NUM_ENTRY_AGREED - len(agreed)),
        *slot.fields,
        request.x.ptr,
        0 if scales is None else scales.ptr,
        *strides,
        0 if topk_idx is None else topk_idx.ptr,
        0 if weights is None else weights.ptr,
        send_pos.ptr,
        prefix.ptr,
        *places.addresses,
        *shape.pieces,
        shape.pieces.piece_bytes,
        sizes.num_scales,
        sizes.scale_bytes,
        sizes.num_topk,
        sizes.index_bytes,
        request.num_experts // job.size,
        request.num_worst_tokens,
        is_cached,
        sizes.has_weights,
    )
    job.count(places.is_windowed, "dispatch")


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
    job.launch.exchange(turn.stream, *_NO_MARKS, _STATUS_REJECTED, tag, True, 0, *(0,) * NUM_AGREED)
    job.page.await_tag(tag, job.check_job)
    _rejection(job, job.page.status().tolist(), str(error) or repr(error))


def reject_move(job: Job, turn: CudaTurn, is_cached: bool) -> None:
    """Enter the move of a dispatch only to say that this rank cannot take part."""
    shape, slot = kernel.shape(16, job.launch.stage_memory, job.placement.ranks_on_gpu, False), kernel.slot(16, 0, 0, 0)
    job.launch.dispatch(
        turn.stream,
        1,
        shape,
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
        is_cached,
        False,
    )
