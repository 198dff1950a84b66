"""Which links the rows of a run cross, counted token by token from the routing that is run.

The bytes are those of ``epcomm.cli.plan.messages``: what the CUDA kernels send between ranks behind a network, whatever
runs here, so that a plan, the host backend and virtual nodes can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epcomm.buffer import Buffer
from epcomm.cli.bench.case import DTYPES, Case
from epcomm.cli.plan.messages import Sizes, Traffic, combine_sends, dispatch_sends

__all__ = [
    "CaseLinks",
    "LinkTraffic",
    "MovedRows",
    "RoutedRows",
    "count_differences",
    "crossings",
    "direct",
    "sizes_of",
]


@dataclass(frozen=True, eq=False)
class MovedRows:
    """``epcomm.cli.plan.messages.Moved``, counted.

    Attributes:
        far: bool ``[T, N - 1]``, whether a token of a rank crosses to (or from) each other node.
        over_nvlink: rows between GPUs of the node, forwarded ones included.
    """

    far: NDArray[np.bool_]
    over_nvlink: int

    @property
    def crossing(self) -> int:
        return int(self.far.sum())

    def messages(self, unit_tokens: int) -> tuple[int, int]:
        firsts = range(0, len(self.far), unit_tokens)
        filled = sum(int(self.far[first : first + unit_tokens].any(axis=0).sum()) for first in firsts)
        return len(firsts) * self.far.shape[1], filled


class RoutedRows:
    """The rows of one dispatch of all ranks. Rank (n, l) is local rank l of node n.

    Args:
        is_token_in_rank: bool ``[R, T, R]``, by source rank, token and destination.
        ranks_per_node: L.
    """

    def __init__(self, is_token_in_rank: NDArray[np.bool_], ranks_per_node: int) -> None:
        num_ranks, num_tokens, _ = is_token_in_rank.shape
        self.num_ranks, self.ranks_per_node = num_ranks, ranks_per_node
        by_node = (num_ranks, num_tokens, num_ranks // ranks_per_node, ranks_per_node)
        self._in_node: NDArray[np.bool_] = np.logical_or.reduce(is_token_in_rank.reshape(by_node), axis=3)
        #: int64 ``[R, R]``, from rank i to rank j, whoever hands them on.
        self.rows: NDArray[np.int64] = is_token_in_rank.sum(axis=1, dtype=np.int64)
        # Rows that rank (n, l) writes to the ranks of its node: those of the tokens of all ranks (m, l).
        rails = self.rows.reshape(-1, ranks_per_node, num_ranks).sum(axis=0)
        node = np.arange(num_ranks) // ranks_per_node
        self._handed = np.where(node[:, None] == node, np.tile(rails, (len(rails[0]) // ranks_per_node, 1)), 0)

    def sent(self, rank: int) -> MovedRows:
        """What `rank` sends in a dispatch."""
        node = rank // self.ranks_per_node
        return MovedRows(np.delete(self._in_node[rank], node, axis=1), self._between(self._handed[rank], rank))

    def received(self, rank: int) -> MovedRows:
        """What it gets, to hand it on or for its experts."""
        node, local = divmod(rank, self.ranks_per_node)
        from_rail = self._in_node[local :: self.ranks_per_node, :, node]
        return MovedRows(np.delete(from_rail, node, axis=0).T, self._between(self._handed[:, rank], rank))

    @staticmethod
    def _between(rows: NDArray[np.int64], rank: int) -> int:
        return int(rows.sum() - rows[rank])


@dataclass(frozen=True)
class LinkTraffic:
    """What one operation moves between ranks.

    Attributes:
        sent, received: by rank.
    """

    sent: tuple[Traffic, ...]
    received: tuple[Traffic, ...]

    @property
    def mean(self) -> Traffic:
        """Of a rank; as much is sent as received."""
        total = sum(self.sent[1:], self.sent[0])
        return total.scaled(1 / len(self.sent))

    @property
    def most_network_bytes(self) -> float:
        """Of the rank that has most to send or to receive."""
        return max(traffic.network_bytes for traffic in (*self.sent, *self.received))

    @property
    def most_nvlink_bytes(self) -> float:
        """Likewise; it may be another rank."""
        return max(traffic.nvlink_bytes for traffic in (*self.sent, *self.received))

    def __add__(self, other: LinkTraffic) -> LinkTraffic:
        """Of both operations."""
        both = ((self.sent, other.sent), (self.received, other.received))
        return LinkTraffic(*(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in both))


def direct(rows: NDArray[np.int64], ranks_per_node: int, row_bytes: int, beside_bytes: int = 0) -> LinkTraffic:
    """Where every row goes straight to its rank: an Alltoallv, low latency. Operations of the NIC are not counted.

    Args:
        rows: ``[R, R]``, from rank i to rank j.
        ranks_per_node: L.
        row_bytes: of a row alone.
        beside_bytes: of what travels with it.
    """
    node = np.arange(len(rows)) // ranks_per_node
    is_near = (node[:, None] == node) & ~np.eye(len(rows), dtype=bool)
    far, near = np.where(node[:, None] != node, rows, 0), np.where(is_near, rows, 0)

    def traffic(axis: int) -> Iterator[Traffic]:
        for across, within in zip(far.sum(axis).tolist(), near.sum(axis).tolist(), strict=True):
            yield Traffic(across * row_bytes, across * beside_bytes, 0, within * (row_bytes + beside_bytes))

    return LinkTraffic(tuple(traffic(1)), tuple(traffic(0)))


def sizes_of(case: Case, ranks_per_node: int) -> Sizes:
    """Of what the bench moves in `case`."""
    return Sizes(
        num_nodes=case.ranks // ranks_per_node,
        gpus=ranks_per_node,
        experts=case.experts,
        topk=case.topk,
        dispatch_row_bytes=case.hidden * DTYPES[case.dtype].itemsize,
        scales_bytes=case.scale_bytes if case.dtype == "fp8" else 0,
        combine_row_bytes=case.hidden * case.combine_dtype.itemsize,
    )


class Crossing(NamedTuple):
    """Rows between nodes.

    Attributes:
        by_rank: that a dispatch of the rank sends to other nodes, once for each; its combine gets as many sums back.
        for_each_rank: mean of the ranks, if a row went to every rank by itself.
    """

    by_rank: tuple[int, ...]
    for_each_rank: float


class CaseLinks:
    """What the operations of the throughput mode move.

    Args:
        case: the sizes.
        routed: its rows.
    """

    def __init__(self, case: Case, routed: RoutedRows) -> None:
        self.routed, self._sizes = routed, sizes_of(case, routed.ranks_per_node)
        ranks = range(routed.num_ranks)
        self._sent, self._received = [routed.sent(rank) for rank in ranks], [routed.received(rank) for rank in ranks]

    def dispatch(self, *, has_handle: bool = False) -> LinkTraffic:
        """Counts included, unless there is a handle."""
        sizes = self._sizes.with_handle() if has_handle else self._sizes
        return LinkTraffic(*(tuple(dispatch_sends(sizes, one) for one in way) for way in (self._sent, self._received)))

    def combine(self) -> LinkTraffic:
        """Whoever sent rows in the dispatch gets their sums."""
        pairs = list(zip(self._sent, self._received, strict=True))
        return LinkTraffic(
            tuple(combine_sends(self._sizes, sent, received) for sent, received in pairs),
            tuple(combine_sends(self._sizes, received, sent) for sent, received in pairs),
        )

    @property
    def crossing(self) -> Crossing:
        """How many of its rows cross."""
        rows, per_node = self.routed.rows, self.routed.ranks_per_node
        node = np.arange(len(rows)) // per_node
        far = int(rows[node[:, None] != node].sum())
        return Crossing(tuple(moved.crossing for moved in self._sent), far / len(rows))


def crossings(buffer: Buffer) -> tuple[int, int]:
    """What the backend has counted so far: rows to other nodes, sums from there. Waits for nothing."""
    stats = buffer.stats
    return stats["rows_to_other_nodes"], stats["rows_from_other_nodes"]


def count_differences(name: str, before: tuple[int, int], after: tuple[int, int], crossing: int) -> Iterator[str]:
    """What is wrong with the rows between nodes that one call has counted, a dispatch or a combine by its `name`.

    Args:
        name: of the operation.
        before, after: `crossings` on both sides of the call.
        crossing: how many rows of this rank's dispatch cross by the routing.
    """
    wanted = (crossing, 0) if name.startswith("dispatch") else (0, crossing)
    counted = (now - then for now, then in zip(after, before, strict=True))
    for what, got, want in zip(("rows sent to", "sums brought back from"), counted, wanted, strict=True):
        if got != want:
            yield f"{got} {what} other nodes by stats, {want} by the routing"
