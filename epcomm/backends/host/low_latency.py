"""Low-latency dispatch and combine: rows grouped by local expert, send and receive halves apart.

A combine with ``pre_reduce`` gives the right bits here, but saves no bytes: an owner would have to wait for weights,
which lie at the sources, before it can send. So the source takes all rows, and rounds the part of each rank itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty
from epcomm.backends.agreement import (
    LOW_LATENCY_COMBINE,
    LOW_LATENCY_DISPATCH,
    low_latency_combine_values,
    low_latency_dispatch_values,
)
from epcomm.backends.host.delivery import Delivery
from epcomm.backends.host.exchange import Exchange
from epcomm.backends.host.fields import Field, as_bytes, by_index, by_range, to_all
from epcomm.backends.host.header import Operation
from epcomm.backends.host.turn import HostTurn
from epcomm.backends.protocol import (
    LowLatencyCombineRequest,
    LowLatencyDispatchOutcome,
    LowLatencyDispatchRequest,
)
from epcomm.errors import RoutingError
from epcomm.layout import Ring
from epcomm.numerics import (
    BFLOAT16,
    FP8_BLOCK,
    FP8_E4M3,
    accumulate,
    accumulate_weighted,
    cast_fp8,
    decode_logfmt,
    encode_logfmt,
    num_packed_scales,
    round_to,
)

__all__ = ["combine", "dispatch"]


def _add_waits(stats: NDArray[np.int64] | None, delivery: Delivery) -> None:
    if stats is not None:
        stats += (delivery.waited_s * 1e9).astype(np.int64)


def _expert_mask(topk_idx: NDArray[Any], first: int, num_experts: int) -> NDArray[np.bool_]:
    """bool ``[num_experts, T]``: which tokens chose which of the experts from `first` on."""
    mask = np.zeros((num_experts, len(topk_idx)), np.bool_)
    token, choice = np.nonzero((topk_idx >= first) & (topk_idx < first + num_experts))
    mask[topk_idx[token, choice] - first, token] = True
    return mask


def _allocate(request: LowLatencyDispatchRequest, num_ranks: int) -> LowLatencyDispatchOutcome:
    """Outputs of the documented shapes; scales with the token dimension fastest in memory."""
    terms = request.terms
    num_local, hidden = terms.num_experts // num_ranks, terms.hidden
    max_rows = num_ranks * terms.num_max_dispatch_tokens_per_rank
    scales = None
    if terms.use_fp8:
        width = num_packed_scales(hidden) if terms.use_ue8m0 else hidden // FP8_BLOCK
        dtype = np.int32 if terms.use_ue8m0 else np.float32
        scales = empty((num_local, width, max_rows), dtype).transpose(0, 2, 1)
    return LowLatencyDispatchOutcome(
        recv_x=empty((num_local, max_rows, hidden), FP8_E4M3 if terms.use_fp8 else BFLOAT16),
        recv_scales=scales,
        recv_count=empty((num_local,), np.int32, fill=0),
        src_info=empty((num_local, max_rows), np.int32, fill=-1),
        recv_ranges=empty((num_local, num_ranks, 2), np.int32, fill=0),
    )


def _receive(delivery: Delivery, rank: int, request: LowLatencyDispatchRequest, out: LowLatencyDispatchOutcome) -> None:
    """Place the rows of every source: for each local expert by source rank, then token."""
    num_local, max_rows, _ = out.recv_x.shape
    flat_x = as_bytes(out.recv_x.reshape(num_local * max_rows, -1))
    num_topk = request.topk_idx.shape[1]
    for source in range(out.recv_ranges.shape[1]):
        out.recv_ranges[:, source, 1] = out.recv_count
        if source not in delivery.headers:
            continue  # masked
        topk_idx = delivery.rows(source, 0).reshape(-1).view(np.int64).reshape(-1, num_topk)
        mask = _expert_mask(topk_idx, rank * num_local, num_local)
        expert, token = np.nonzero(mask)
        counts = mask.sum(axis=1, dtype=np.int32)
        out.recv_ranges[:, source, 0] = counts
        row = np.arange(len(token)) - np.repeat(np.cumsum(counts) - counts, counts) + out.recv_count[expert]
        out.src_info[expert, row] = token
        flat_x[expert * max_rows + row] = delivery.rows(source, 1)[token]
        if out.recv_scales is not None:
            scales = delivery.rows(source, 2).reshape(-1).view(out.recv_scales.dtype)
            out.recv_scales[expert, row] = scales.reshape(-1, out.recv_scales.shape[2])[token]
        out.recv_count[...] += counts


def dispatch(
    exchange: Exchange, request: LowLatencyDispatchRequest
) -> tuple[LowLatencyDispatchOutcome, Callable[[HostTurn], None]]:
    """Send half now; the second result is the receive half."""
    size, terms = exchange.comm.size, request.terms
    everyone = to_all(len(request.x), size)
    payload = [request.x]
    if terms.use_fp8:
        payload = list(cast_fp8(request.x, round_scale=terms.round_scale, use_ue8m0=terms.use_ue8m0))
    fields = [Field(request.topk_idx.astype(np.int64, copy=False), everyone), *(Field(p, everyone) for p in payload)]
    agreed = dict(zip(LOW_LATENCY_DISPATCH, low_latency_dispatch_values(terms), strict=True))
    ticket = exchange.post(Operation.LOW_LATENCY_DISPATCH, Ring.LOW_LATENCY_DISPATCH, agreed, fields)
    outcome = _allocate(request, size)
    outcome.dispatch_id = ticket.sequence

    def receive(_: HostTurn) -> None:
        with exchange.collect(ticket) as delivery:
            _add_waits(request.wait_stats, delivery)
            _receive(delivery, exchange.comm.rank, request, outcome)
        if request.expert_stats is not None:
            np.add(request.expert_stats, outcome.recv_count, out=request.expert_stats)

    return outcome, receive


def _send_fields(request: LowLatencyCombineRequest) -> list[Field]:
    """Rows for each source rank: by local expert, then token. Copied together unless they lie in the window as sent."""
    handle = request.handle
    num_local, num_ranks, _ = handle.recv_ranges.shape
    num_rows, begin = handle.recv_ranges[..., 0], handle.recv_ranges[..., 1]
    rows = request.x.reshape(num_local * request.x.shape[1], -1)
    first_row = np.arange(num_local)[:, None] * request.x.shape[1] + begin
    counts = num_rows.sum(axis=0, dtype=np.int64)
    order = [
        np.arange(first_row[expert, source], first_row[expert, source] + num_rows[expert, source])
        for source in range(num_ranks)
        for expert in range(num_local)
    ]
    indices = np.concatenate(order).astype(np.int32)
    if request.terms.zero_copy and not request.terms.use_logfmt:
        return [Field(rows, by_index(indices, counts))]
    chosen = rows.view(np.uint16)[indices]  # NumPy copies integers faster
    sent = encode_logfmt(chosen.view(BFLOAT16)) if request.terms.use_logfmt else chosen
    return [Field(sent, by_range(np.cumsum(counts) - counts, counts))]


def combine(exchange: Exchange, request: LowLatencyCombineRequest) -> Callable[[HostTurn], None]:
    """Send half now; the result is the receive half."""
    values = (*low_latency_combine_values(request.terms), request.handle.dispatch_id)
    agreed = dict(zip(LOW_LATENCY_COMBINE, values, strict=True))
    fields = _send_fields(request)
    ticket = exchange.post(Operation.LOW_LATENCY_COMBINE, Ring.LOW_LATENCY_COMBINE, agreed, fields)

    def receive(_: HostTurn) -> None:
        with exchange.collect(ticket) as delivery:
            _add_waits(request.wait_stats, delivery)
            _reduce(exchange, delivery, request)

    return receive


@np.errstate(all="ignore")  # Inf and NaN are results here, not events to warn about
def _reduce(exchange: Exchange, delivery: Delivery, request: LowLatencyCombineRequest) -> None:
    """Weighted sum of every token's rows, in the order of its choices or, with pre_reduce, rank by rank."""
    rows, row_of, owners = _arrived(exchange, delivery, request)
    if not request.terms.pre_reduce:
        return round_to(_weighted_sum(rows, row_of, request), request.out)
    acc, partial = np.zeros(request.out.shape, np.float32), np.empty(request.out.shape, BFLOAT16)
    for owner in range(exchange.comm.size):
        # +0 for the tokens that do not visit it, which changes no bit: a sum from +0 is never -0.
        round_to(_weighted_sum(rows, np.where(owners == owner, row_of, -1), request), partial)
        accumulate(acc, partial)
    return round_to(acc, request.out)


def _arrived(
    exchange: Exchange, delivery: Delivery, request: LowLatencyCombineRequest
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """What peers sent: rows, the row of each choice ``[T, K]``, -1 if it is skipped, and its owner ``[T, K]``."""
    num_experts, size = request.handle.num_experts, exchange.comm.size
    num_local = num_experts // size
    mask = _expert_mask(request.topk_idx, 0, num_experts)
    counts = mask.sum(axis=1)
    parts, present, first = [np.empty((0, request.handle.hidden), BFLOAT16)], np.zeros(num_experts, np.bool_), 0
    first_row = np.zeros(num_experts, np.int64)
    for owner in range(size):
        experts = slice(owner * num_local, (owner + 1) * num_local)
        if owner not in delivery.headers or delivery.count(owner) == 0:
            continue  # masked here, or this rank was masked there, or it owns none of the chosen experts
        expected = int(counts[experts].sum())
        if delivery.count(owner) != expected:
            raise RoutingError(
                "low_latency_combine: topk_idx",
                got=f"{delivery.count(owner)} rows from rank {owner} for {expected} choices",
                wanted="the topk_idx of the dispatch that made the handle",
            )
        sent = delivery.rows(owner, 0)
        parts.append(decode_logfmt(sent, request.handle.hidden) if request.terms.use_logfmt else sent.view(BFLOAT16))
        present[experts] = True
        first_row[experts] = first + np.cumsum(counts[experts]) - counts[experts]
        first += expected
    position = np.cumsum(mask, axis=1) - 1
    row_of = np.full(request.topk_idx.shape, -1, np.int64)
    token, choice = np.nonzero((request.topk_idx >= 0) & (request.topk_idx < num_experts))
    expert = request.topk_idx[token, choice]
    row_of[token, choice] = np.where(present[expert], first_row[expert] + position[expert, token], -1)
    return np.concatenate(parts), row_of, request.topk_idx // num_local


def _weighted_sum(
    rows: NDArray[Any], row_of: NDArray[np.int64], request: LowLatencyCombineRequest
) -> NDArray[np.float32]:
    """From +0, choice by choice: the rows ``row_of [T, K]`` of every token, by its weights; -1 adds nothing."""
    acc = np.zeros(request.out.shape, np.float32)
    for choice in range(row_of.shape[1]):
        token = np.flatnonzero(row_of[:, choice] >= 0)
        sums = acc[token]
        accumulate_weighted(sums, request.topk_weights[token, choice], rows[row_of[token, choice]])
        acc[token] = sums
    return acc
