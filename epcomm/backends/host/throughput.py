"""High-throughput dispatch and combine when every rank reaches every other directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty
from epcomm.backends.agreement import (
    CACHED_DISPATCH,
    COMBINE,
    DISPATCH,
    combine_payload,
    dispatch_payload,
    dispatch_values,
    values_with_handle,
)
from epcomm.backends.host.delivery import Delivery
from epcomm.backends.host.exchange import Exchange
from epcomm.backends.host.fields import Field, Selection, as_bytes, by_range, to_all
from epcomm.backends.host.header import Operation
from epcomm.backends.host.rows import OrderedSum, keep_first, select_tokens
from epcomm.backends.protocol import CombineOutcome, CombineRequest, DispatchOutcome, DispatchRequest
from epcomm.errors import HandleError
from epcomm.handle import DispatchHandle
from epcomm.layout import Ring

__all__ = [
    "ReceivedRows",
    "agreed_for_combine",
    "agreed_for_dispatch",
    "combine",
    "delivered",
    "dispatch",
    "expert_counts",
    "payload_fields",
    "surviving_counts",
]


def agreed_for_dispatch(request: DispatchRequest) -> tuple[Operation, dict[str, int]]:
    """Operation and agreed values of a dispatch's header."""
    if request.handle is None:
        return Operation.DISPATCH, dict(zip(DISPATCH, dispatch_values(request), strict=True))
    payload = dispatch_payload(request.x, request.scales)
    values = values_with_handle(payload, request.handle.dispatch_id, request.config)
    return Operation.CACHED_DISPATCH, dict(zip(CACHED_DISPATCH, values, strict=True))


def agreed_for_combine(request: CombineRequest) -> dict[str, int]:
    """Agreed values of a combine's header."""
    x, weights = request.x, request.topk_weights
    payload = combine_payload(x.shape[1], x.dtype, 0 if weights is None else weights.shape[1])
    values = values_with_handle(payload, request.handle.dispatch_id, request.config)
    return dict(zip(COMBINE, values, strict=True))


def payload_fields(request: DispatchRequest, selection: Selection) -> dict[str, Field]:
    """The arrays that travel with a token, by name, in the order in which they are posted."""
    arrays = {
        "x": request.x,
        "scales": request.scales,
        "topk_idx": request.topk_idx,
        "topk_weights": request.topk_weights,
    }
    return {name: Field(array, selection) for name, array in arrays.items() if array is not None}


def surviving_counts(counts: NDArray[np.int64], num_worst_tokens: int) -> NDArray[np.int64]:
    """Rows of each (source, destination) that fit, from ``[R, R]`` counts: later rows are dropped first."""
    if num_worst_tokens == 0:
        return counts
    room = np.maximum(num_worst_tokens - (np.cumsum(counts, axis=0) - counts), 0)
    kept: NDArray[np.int64] = np.minimum(room, counts)
    return kept


def expert_counts(tokens_per_expert: NDArray[np.int64], local_experts: slice, request: DispatchRequest) -> list[int]:
    """Tokens of each local expert, rounded up to the alignment; empty when the caller must not wait for sizes."""
    if request.num_worst_tokens or request.handle is not None:
        return []
    unit = request.expert_alignment
    return [-(-count // unit) * unit for count in tokens_per_expert[local_experts].tolist()]


class ReceivedRows:
    """The output arrays of a dispatch while they are filled source by source.

    Args:
        fields: the posted fields, for names, shapes and dtypes.
        num_rows: rows of the outputs.
        num_received: real rows among them; the rest is padding, with -1 in ``topk_idx``.
    """

    def __init__(self, fields: Mapping[str, Field], num_rows: int, num_received: int) -> None:
        self.arrays = {name: empty((num_rows, *f.rows.shape[1:]), f.rows.dtype) for name, f in fields.items()}
        self.src_idx = empty((num_received,), np.int32)
        self._bytes = {name: as_bytes(array) for name, array in self.arrays.items()}
        if "topk_idx" in self.arrays:
            self.arrays["topk_idx"][num_received:] = -1

    def fill(self, delivery: Delivery, source: int, span: slice, start: int, src_idx: NDArray[np.int32]) -> None:
        """Write rows `span` of those from `source` to the rows from `start` on."""
        stop = start + len(src_idx)
        for index, target in enumerate(self._bytes.values()):
            delivery.rows(source, index, span, out=target[start:stop])
        self.src_idx[start:stop] = src_idx

    def localize(self, first_expert: int, num_local_experts: int) -> None:
        """Number experts from this rank's first; choices that live elsewhere become -1 with weight 0."""
        topk_idx = self.arrays.get("topk_idx")
        if topk_idx is None:
            return
        received = topk_idx[: len(self.src_idx)]
        received -= first_expert
        # As an unsigned number a negative index is large, too.
        elsewhere = received.view(f"u{received.itemsize}") >= num_local_experts
        np.putmask(received, elsewhere, -1)
        if (weights := self.arrays.get("topk_weights")) is not None:
            # As integers, because 0 * NaN is not 0; a masked store takes four times as long as a product.
            bits = weights[: len(self.src_idx)].view(np.uint32)
            np.multiply(bits, ~elsewhere, out=bits)


def dispatch(exchange: Exchange, request: DispatchRequest) -> DispatchOutcome:
    """Send every token once to each rank that owns one of its experts."""
    rank, size = exchange.comm.rank, exchange.comm.size
    selection = select_tokens(request.is_token_in_rank)
    fields = payload_fields(request, selection)
    posted = list(fields.values())
    if request.num_tokens_per_expert is not None:
        posted.append(Field(request.num_tokens_per_expert[None], to_all(1, size)))
    operation, agreed = agreed_for_dispatch(request)
    ticket = exchange.post(operation, Ring.THROUGHPUT, agreed, posted)
    with exchange.collect(ticket) as delivery:
        counts = np.array([delivery.routes[r][0, 0] for r in range(size)])
        kept: list[int] = surviving_counts(counts, request.num_worst_tokens)[:, rank].tolist()
        num_received = sum(kept)
        received = ReceivedRows(fields, request.num_worst_tokens or num_received, num_received)
        per_expert = np.zeros(request.num_experts, np.int64)
        start = 0
        for source, count in enumerate(kept):
            span = slice(0, count)
            received.fill(delivery, source, span, start, delivery.indices(source)[span])
            start += count
            if request.num_tokens_per_expert is not None:
                per_expert += delivery.rows(source, len(fields)).reshape(-1).view(np.int32)
    num_local = request.num_experts // size
    received.localize(rank * num_local, num_local)
    return DispatchOutcome(
        recv_x=received.arrays["x"],
        recv_scales=received.arrays.get("scales"),
        recv_topk_idx=received.arrays.get("topk_idx"),
        recv_topk_weights=received.arrays.get("topk_weights"),
        num_recv_tokens_per_expert=expert_counts(per_expert, slice(rank * num_local, (rank + 1) * num_local), request),
        rank_prefix_matrix=np.cumsum(counts, axis=0, dtype=np.int32),
        recv_src_idx=received.src_idx,
        # For the handle: the user may reuse the memory of the mask.
        is_token_in_rank=request.is_token_in_rank.copy(),
        num_sent=int(np.count_nonzero(request.is_token_in_rank)),
        forward_mask=None,
        forward_counts=None,
        dispatch_id=ticket.sequence,
        num_dropped=int(counts[:, rank].sum()) - num_received,
    )


def delivered(handle: DispatchHandle, rank: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What a dispatch delivered, dropped rows left out.

    Returns:
        int64 ``[R]`` rows that `rank` received from each source, and bool ``[T, R]`` where its tokens arrived.
    """
    counts = handle.rank_prefix_matrix.astype(np.int64)
    counts[1:] -= counts[:-1].copy()
    kept = surviving_counts(counts, handle.num_worst_tokens)
    mask = handle.is_token_in_rank
    return kept[:, rank], keep_first(mask, kept[rank]) if handle.num_worst_tokens else mask


def combine(exchange: Exchange, request: CombineRequest) -> CombineOutcome:
    """Bring rows back to the ranks their tokens came from and sum them in rank order."""
    rank, size, handle = exchange.comm.rank, exchange.comm.size, request.handle
    num_rows, width = handle.num_recv_tokens, request.x.shape[1]
    counts, mask = delivered(handle, rank)
    selection = by_range(np.cumsum(counts) - counts, counts)
    fields = [Field(request.x[:num_rows], selection)]
    if request.topk_weights is not None:
        fields.append(Field(request.topk_weights[:num_rows], selection))
    ticket = exchange.post(Operation.COMBINE, Ring.THROUGHPUT, agreed_for_combine(request), fields)
    with exchange.collect(ticket) as delivery:
        sums = OrderedSum(mask)
        for source in range(size):
            if delivery.count(source) != sums.counts[source]:
                raise HandleError(
                    "combine: handle",
                    got=f"{delivery.count(source)} rows from rank {source}",
                    wanted=f"{sums.counts[source]}",
                    do="pass the handle of the same dispatch on every rank",
                )
        weights: NDArray[Any] | None = None
        if request.topk_weights is not None:
            num_topk = request.topk_weights.shape[1]
            parts = [delivery.rows(source, 1) for source in range(size)]
            weights = sums.reduce(parts, num_topk, np.dtype(np.float32))
        parts = [delivery.rows(source, 0) for source in range(size)]
        combined = sums.reduce(parts, width, request.x.dtype, request.biases)
    return CombineOutcome(combined, weights)
