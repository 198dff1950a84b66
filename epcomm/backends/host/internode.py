"""High-throughput dispatch and combine over several nodes: two hops, a row crosses once for each node.

Rank (n, l) is local rank l of node n. Dispatch: a token goes once to rank (n', l) of every node n' that wants
it, and that forwarder hands it to the local ranks that want it. Combine runs the hops backwards: the forwarder
sums its local ranks' rows to one row for each source token, and the source sums the nodes' rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty
from epcomm.backends.host.exchange import Exchange
from epcomm.backends.host.fields import Field, Selection, as_bytes, by_index, by_range, to_all
from epcomm.backends.host.header import Operation
from epcomm.backends.host.rows import OrderedSum, keep_first, select_tokens
from epcomm.backends.host.throughput import (
    ReceivedRows,
    agreed_for_combine,
    agreed_for_dispatch,
    delivered,
    expert_counts,
    payload_fields,
    surviving_counts,
)
from epcomm.backends.protocol import CombineOutcome, CombineRequest, DispatchOutcome, DispatchRequest
from epcomm.errors import HandleError
from epcomm.layout import Ring

__all__ = ["Crossings", "Nodes", "combine", "dispatch"]


@dataclass(frozen=True)
class Nodes:
    """This rank's place: node and local rank, and the ranks of its node and of its rail."""

    rank: int
    num_ranks: int
    ranks_per_node: int

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node

    @property
    def rail(self) -> slice:
        """The ranks with this rank's local index, one a node."""
        return slice(self.local_rank, None, self.ranks_per_node)

    @property
    def neighbours(self) -> slice:
        """The ranks of this rank's node."""
        first = self.rank - self.local_rank
        return slice(first, first + self.ranks_per_node)

    def by_node(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``[T, num_ranks]`` to ``[T, num_nodes]``: does any rank of the node take part."""
        grouped = mask.reshape(len(mask), self.num_nodes, self.ranks_per_node)
        return np.asarray(grouped.any(axis=2), np.bool_)

    def to_rail(self, by_node: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``[T, num_nodes]`` as a mask over ranks that is set for this rank's rail only."""
        mask = np.zeros((len(by_node), self.num_ranks), np.bool_)
        mask[:, self.rail] = by_node
        return mask

    def to_neighbours(self, by_local_rank: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``[F, ranks_per_node]`` as a mask over ranks that is set for this rank's node only."""
        mask = np.zeros((len(by_local_rank), self.num_ranks), np.bool_)
        mask[:, self.neighbours] = by_local_rank
        return mask


@dataclass
class Crossings:
    """What has crossed between nodes so far, of one rank's tokens.

    Attributes:
        sent: rows to forwarders of other nodes, in dispatches.
        returned: sums that came back from them, in combines.
    """

    sent: int = 0
    returned: int = 0


@dataclass(frozen=True, eq=False)
class _Forwarded:
    """Rows at the forwarder, by source node, then token, and what everybody learned in the first hop."""

    arrays: dict[str, NDArray[Any]]
    src_idx: NDArray[np.int32]
    mask: NDArray[np.bool_]  # [F, ranks_per_node]
    counts: NDArray[np.int32]  # [num_nodes]
    counts_by_rank: NDArray[np.int64]  # [R, R] rows from each source for each final destination
    tokens_per_expert: NDArray[np.int64]
    sequence: int


def _first_hop(exchange: Exchange, nodes: Nodes, request: DispatchRequest, crossings: Crossings) -> _Forwarded:
    """Send a row to this rank's rail once for each node that wants it, and take what the rail sends."""
    mask = request.is_token_in_rank
    selection = select_tokens(nodes.to_rail(nodes.by_node(mask)))
    fields = payload_fields(request, selection)
    everyone = to_all(1, nodes.num_ranks)
    posted = [*fields.values(), Field(mask, selection), Field(mask.sum(axis=0, dtype=np.int64)[None], everyone)]
    if request.num_tokens_per_expert is not None:
        posted.append(Field(request.num_tokens_per_expert[None], everyone))
    operation, agreed = agreed_for_dispatch(request)
    ticket = exchange.post(operation, Ring.THROUGHPUT, agreed, posted)
    with exchange.collect(ticket) as delivery:
        crossings.sent += int(selection.counts.sum() - selection.counts[nodes.rank])
        rail = range(*nodes.rail.indices(nodes.num_ranks))
        counts = np.array([delivery.count(source) for source in rail], np.int32)
        num_rows = int(counts.sum())
        named = {**fields, "mask": posted[len(fields)]}
        arrays = {name: empty((num_rows, *f.rows.shape[1:]), f.rows.dtype) for name, f in named.items()}
        src_idx = empty((num_rows,), np.int32)
        start = 0
        for source, count in zip(rail, counts, strict=True):
            for index, array in enumerate(arrays.values()):
                delivery.rows(source, index, out=as_bytes(array[start : start + count]))
            src_idx[start : start + count] = delivery.indices(source)
            start += count
        counts_by_rank = np.stack(
            [delivery.rows(s, len(named)).reshape(-1).view(np.int64).copy() for s in range(nodes.num_ranks)]
        )
        per_expert = np.zeros(request.num_experts, np.int64)
        if request.num_tokens_per_expert is not None:
            for source in range(nodes.num_ranks):
                per_expert += delivery.rows(source, len(named) + 1).reshape(-1).view(np.int32)
    local_mask = arrays.pop("mask")[:, nodes.neighbours]
    return _Forwarded(arrays, src_idx, local_mask, counts, counts_by_rank, per_expert, ticket.sequence)


def _drop_overflow(nodes: Nodes, rows: _Forwarded, kept: NDArray[np.int64]) -> _Forwarded:
    """Take rows that do not fit at their destination out of the forwarder's list."""
    first_row = np.cumsum(rows.counts) - rows.counts
    masks, counts = [], []
    for node, (start, count) in enumerate(zip(first_row, rows.counts, strict=True)):
        source = node * nodes.ranks_per_node + nodes.local_rank
        mask = keep_first(rows.mask[start : start + count], kept[source, nodes.neighbours])
        masks.append(mask)
        counts.append(mask.any(axis=1).sum())
    mask = np.concatenate(masks)
    used = mask.any(axis=1)
    return replace(
        rows,
        arrays={name: array[used] for name, array in rows.arrays.items()},
        src_idx=rows.src_idx[used],
        mask=mask[used],
        counts=np.array(counts, np.int32),
    )


def dispatch(exchange: Exchange, nodes: Nodes, request: DispatchRequest, crossings: Crossings) -> DispatchOutcome:
    """Send every token once to each node that owns one of its experts, and hand it out there."""
    rank = nodes.rank
    rows = _first_hop(exchange, nodes, request, crossings)
    counts = rows.counts_by_rank
    kept = surviving_counts(counts, request.num_worst_tokens)
    if (kept < counts).any():
        rows = _drop_overflow(nodes, rows, kept)
    start = np.cumsum(kept[:, rank]) - kept[:, rank]
    num_received = int(kept[:, rank].sum())

    selection = select_tokens(nodes.to_neighbours(rows.mask))
    fields = {name: Field(array, selection) for name, array in rows.arrays.items()}
    posted = [*fields.values(), Field(rows.src_idx, selection)]
    ticket = exchange.post(Operation.FORWARD_DISPATCH, Ring.THROUGHPUT, {}, posted)
    with exchange.collect(ticket) as delivery:
        received = ReceivedRows(fields, request.num_worst_tokens or num_received, num_received)
        for forwarder in range(*nodes.neighbours.indices(nodes.num_ranks)):
            src_idx = delivery.rows(forwarder, len(fields)).reshape(-1).view(np.int32)
            first = 0
            for source in range(forwarder % nodes.ranks_per_node, nodes.num_ranks, nodes.ranks_per_node):
                span = slice(first, first + int(kept[source, rank]))
                received.fill(delivery, forwarder, span, int(start[source]), src_idx[span])
                first = span.stop
    num_local = request.num_experts // nodes.num_ranks
    received.localize(rank * num_local, num_local)
    return DispatchOutcome(
        recv_x=received.arrays["x"],
        recv_scales=received.arrays.get("scales"),
        recv_topk_idx=received.arrays.get("topk_idx"),
        recv_topk_weights=received.arrays.get("topk_weights"),
        num_recv_tokens_per_expert=expert_counts(
            rows.tokens_per_expert, slice(rank * num_local, (rank + 1) * num_local), request
        ),
        rank_prefix_matrix=np.cumsum(counts, axis=0, dtype=np.int32),
        recv_src_idx=received.src_idx,
        # For the handle: the user may reuse the memory of the mask.
        is_token_in_rank=request.is_token_in_rank.copy(),
        num_sent=int(np.count_nonzero(request.is_token_in_rank)),
        forward_mask=rows.mask,
        forward_counts=rows.counts,
        dispatch_id=rows.sequence,
        num_dropped=int(counts[:, rank].sum()) - num_received,
    )


def _rows_by_forwarder(nodes: Nodes, received: NDArray[np.int64]) -> Selection:
    """The received rows, `received` from each source, grouped by the local rank that forwarded them."""
    stop = np.cumsum(received)
    start = stop - received
    order = [
        np.arange(start[source], stop[source], dtype=np.int32)
        for local_rank in range(nodes.ranks_per_node)
        for source in range(local_rank, nodes.num_ranks, nodes.ranks_per_node)
    ]
    counts = np.zeros(nodes.num_ranks, np.int64)
    counts[nodes.neighbours] = received.reshape(nodes.num_nodes, nodes.ranks_per_node).sum(axis=0)
    return by_index(np.concatenate(order), counts)


def _widths(request: CombineRequest) -> list[tuple[int, np.dtype[Any]]]:
    """Width and dtype of the summed fields: the rows, then the weights."""
    widths = [(request.x.shape[1], request.x.dtype)]
    if request.topk_weights is not None:
        widths.append((request.topk_weights.shape[1], np.dtype(np.float32)))
    return widths


def combine(exchange: Exchange, nodes: Nodes, request: CombineRequest, crossings: Crossings) -> CombineOutcome:
    """Sum each node's rows at the forwarder, rounded once, then the nodes' rows at the source."""
    handle, num_rows = request.handle, request.handle.num_recv_tokens
    assert handle.forward_mask is not None
    assert handle.forward_counts is not None
    widths = _widths(request)
    received, token_mask = delivered(handle, nodes.rank)
    selection = _rows_by_forwarder(nodes, received)
    fields = [Field(request.x[:num_rows], selection)]
    if request.topk_weights is not None:
        fields.append(Field(request.topk_weights[:num_rows], selection))
    ticket = exchange.post(Operation.COMBINE, Ring.THROUGHPUT, agreed_for_combine(request), fields)
    with exchange.collect(ticket) as delivery:
        local_ranks = range(*nodes.neighbours.indices(nodes.num_ranks))
        sums = OrderedSum(handle.forward_mask)
        partial = [
            sums.reduce([delivery.rows(r, index) for r in local_ranks], width, dtype)
            for index, (width, dtype) in enumerate(widths)
        ]

    counts = np.zeros(nodes.num_ranks, np.int64)
    counts[nodes.rail] = handle.forward_counts
    back = by_range(np.cumsum(counts) - counts, counts)
    ticket = exchange.post(Operation.FORWARD_COMBINE, Ring.THROUGHPUT, {}, [Field(p, back) for p in partial])
    with exchange.collect(ticket) as delivery:
        sums = OrderedSum(nodes.by_node(token_mask))
        rail = range(*nodes.rail.indices(nodes.num_ranks))
        for node, forwarder in enumerate(rail):
            if delivery.count(forwarder) != sums.counts[node]:
                raise HandleError(
                    "combine: handle",
                    got=f"{delivery.count(forwarder)} rows from node {node}",
                    wanted=str(sums.counts[node]),
                    do="pass the handle of the same dispatch on every rank",
                )
        combined = [
            sums.reduce([delivery.rows(r, index) for r in rail], width, dtype, request.biases if index == 0 else ())
            for index, (width, dtype) in enumerate(widths)
        ]
        crossings.returned += sum(delivery.count(forwarder) for forwarder in rail if forwarder != nodes.rank)
    return CombineOutcome(combined[0], combined[1] if len(combined) > 1 else None)
