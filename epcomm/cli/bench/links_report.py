"""What the links between ranks carry, and the floors of given link rates: a table, and fields of the JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from epcomm.cli.bench.case import Case
from epcomm.cli.bench.links import Crossing, LinkTraffic
from epcomm.cli.plan.routing import expected_rows
from epcomm.cli.plan.times import link_s

__all__ = ["LinkRow", "fields", "has_floors", "is_told", "notes", "rows_to_nodes", "table"]

_BYTES = {
    "throughput": (
        "network: what a rank sends to other nodes, mean of the ranks. rows: one for",
        "each token and other node; all: with scales, indices, weights, places,",
        "questions, words and counts, as the CUDA kernels send them. node: to other",
        "ranks of its node (NVLink), rows that it hands on for other nodes included.",
    ),
    "low-latency": (
        "network: what a rank sends to ranks of other nodes, mean of the ranks. rows:",
        "rows alone; all: with scales, without headers and counts. node: to other",
        "ranks of its node (NVLink). A row goes straight to its rank.",
    ),
}
_ALONE = ("node: what a rank sends to other ranks (NVLink), mean of the ranks, with what", "is beside its rows.")
_RATES = (
    "us: that of the busiest rank, sent or received, at --nic-gbs and --nvlink-gbs",
    "each way; floor: the larger one, without any latency.",
    "x: {time} / floor.",
)


class LinkRow(NamedTuple):
    """An operation that was measured: its name, how long it took, what it moved."""

    name: str
    time_s: float
    traffic: LinkTraffic


class Floors(NamedTuple):
    """Seconds of the busiest rank; None: the rate was not given, or there is no network."""

    network_s: float | None
    node_s: float | None

    @property
    def floor_s(self) -> float:
        """The larger one; 0 where nothing is known."""
        return max(self.network_s or 0.0, self.node_s or 0.0)

    @classmethod
    def of(cls, case: Case, traffic: LinkTraffic) -> Floors:
        nic_gbs = case.nic_gbs if case.num_nodes > 1 else None
        return cls(
            None if nic_gbs is None else link_s(traffic.most_network_bytes, nic_gbs),
            None if case.nvlink_gbs is None else link_s(traffic.most_nvlink_bytes, case.nvlink_gbs),
        )


def is_told(case: Case) -> bool:
    """Whether there is anything to say that the other tables do not."""
    return case.num_nodes > 1 or case.nvlink_gbs is not None


def has_floors(case: Case) -> bool:
    """Whether the rate of a link was given that this job has."""
    return (case.nic_gbs is not None and case.num_nodes > 1) or case.nvlink_gbs is not None


def fields(case: Case, time_s: float, traffic: LinkTraffic | None) -> dict[str, Any]:
    """For the JSON line of an operation. Bytes and operations are named, and counted, as those of ``epcomm plan``."""
    if traffic is None or not is_told(case):
        return {}
    mean, floors = traffic.mean, Floors.of(case, traffic)
    return {
        "network_row_bytes_per_rank": mean.row_bytes,
        "network_other_bytes_per_rank": mean.other_bytes,
        "nic_operations_per_rank": mean.nic_operations or None,
        "nvlink_bytes_per_rank": mean.nvlink_bytes,
        "network_bytes_of_busiest": traffic.most_network_bytes,
        "nvlink_bytes_of_busiest": traffic.most_nvlink_bytes,
        "nic_gbs": case.nic_gbs,
        "nvlink_gbs": case.nvlink_gbs,
        "network_us": _us(floors.network_s),
        "nvlink_us": _us(floors.node_s),
        "link_floor_us": _us(floors.floor_s or None),
        "ratio_to_link_floor": time_s / floors.floor_s if floors.floor_s else None,
    }


def table(case: Case, rows: Sequence[LinkRow], title: str) -> Iterator[str]:
    """Of 80 columns; `rows` are those that move anything."""
    has_network, has_rates = case.num_nodes > 1, has_floors(case)
    yield from _head(case, title, has_network, has_rates)
    for row in rows:
        mean, floors = row.traffic.mean, Floors.of(case, row.traffic)
        line = f"  {row.name:25s}"
        if has_network:
            line += f"{mean.row_bytes / 1e6:7.2f}{mean.network_bytes / 1e6:7.2f}"
        line += f"{mean.nvlink_bytes / 1e6:7.2f}"
        if has_rates:
            line += f"{_cell(floors.network_s):>9s}" if has_network else ""
            line += f"{_cell(floors.node_s):>8s}{_cell(floors.floor_s):>8s}"
            line += f"{_ratio(row.time_s, floors.floor_s):>7s}"
        yield line


def notes(case: Case, time: str) -> Iterator[str]:
    """What its columns mean; `time` names the times of its rows."""
    yield from (f"  {text}" for text in (_BYTES[case.mode] if case.num_nodes > 1 else _ALONE))
    if has_floors(case):
        yield from (f"  {text.format(time=time)}" for text in _RATES)


def rows_to_nodes(case: Case, crossing: Crossing) -> Iterator[str]:
    """Rows between nodes: from the routing, counted by the backend, expected."""
    rows, width = crossing.by_rank, 54
    mean = f"{sum(rows) / len(rows):.1f} ({min(rows)}, {max(rows)})"
    yield f"  {'rows of a rank to other nodes, mean (least, most)':{width}s}{mean}"
    yield f"  {'  counted by the backend, and as sums that came back':{width}s}the same, every rank"
    if case.routing == "uniform":
        per_node = case.ranks // case.num_nodes
        expected = expected_rows(case.num_nodes, per_node, case.tokens, case.experts, case.topk).crossing
        yield f"  {'  expected by epcomm plan':{width}s}{expected:.1f}"
    yield f"  {'  if a row went to each rank by itself':{width}s}{crossing.for_each_rank:.1f}"


def _head(case: Case, title: str, has_network: bool, has_rates: bool) -> Iterator[str]:
    first, second = f"  {title:25s}", f"{'':27s}"
    first += f"{'network, MB':>14s}{'node':>7s}" if has_network else f"{'node':>7s}"
    second += f"{'rows':>7s}{'all':>7s}{'MB':>7s}" if has_network else f"{'MB':>7s}"
    if has_rates:
        given = [f"{rate:g}" for rate in (case.nic_gbs if has_network else None, case.nvlink_gbs) if rate is not None]
        first += f"{'us at ' + ', '.join(given) + ' GB/s':>{25 if has_network else 19}s}"
        second += f"{'network':>9s}" if has_network else ""
        second += f"{'node':>8s}{'floor':>8s}{'x':>7s}"
    yield first
    yield second


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _cell(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f}" if seconds < 9999e-6 else f"{seconds * 1e6:.0f}"


def _ratio(time_s: float, floor_s: float) -> str:
    if not floor_s:
        return "-"
    return f"{time_s / floor_s:.2f}" if time_s < 100 * floor_s else f"{time_s / floor_s:.0f}"
