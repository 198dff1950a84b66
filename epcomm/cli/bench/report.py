"""The bench's table, and the same as JSON lines."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from epcomm.cli.bench.case import Case
from epcomm.cli.bench.links_report import LinkRow, fields, is_told, notes, rows_to_nodes, table
from epcomm.cli.bench.measure import Measured, Run
from epcomm.cli.bench.throughput import PAIR

__all__ = ["environment", "to_json_lines", "to_text"]

GOAL = 2.0  # of the pair against that of Alltoallv, on the host backend

_BYTES = {
    "throughput": (
        "logical: bytes a rank receives, from itself included, mean of the ranks: rows,",
        "fp8 scales and, in dispatch but not when cached, expert indices and weights.",
    ),
    "low-latency": (
        "logical: bytes for a rank's experts, from itself included, mean of the ranks:",
        "one row, with its fp8 scales, for each token and chosen expert.",
    ),
}
_ALLTOALLV = (
    "Alltoallv: bare mpi4py on MPI.COMM_WORLD, the same bytes between every two",
    "ranks, packed, and receive memory allocated, beforehand. x MPI: p50 / its p50.",
)


def environment() -> dict[str, Any]:
    """Versions and machine, as in the JSON lines."""
    mpi = sys.modules.get("mpi4py.MPI")
    library = mpi.Get_library_version().strip("\0 \n").splitlines()[0].partition(",")[0] if mpi is not None else ""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi4py": metadata.version("mpi4py") if mpi is not None else None,
        "mpi": " ".join(library.replace("Version:", "").split()) or None,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }


def to_text(case: Case, run: Run) -> str:
    """The table, of 80 columns."""
    lines = [*_header(case, run), "", *_table(run.measured, case.ranks), ""]
    lines += [f"  {line}" for line in _BYTES[case.mode]]
    lines += ["  wire: those of them from other ranks. GB/s: bytes of a rank / p50.", ""]
    if is_told(case):
        lines += [*_links(case, run), ""]
    ratio = _ratios(run.measured).get(PAIR)
    if ratio is not None:
        lines += [f"  {line}" for line in _ALLTOALLV]
        lines += ["", f"{PAIR}: {ratio:.2f} x the Alltoallv pair (goal: at most {GOAL:g})"]
    return "\n".join(lines).rstrip()


def to_json_lines(case: Case, run: Run) -> list[str]:
    """One JSON object an operation: its result, all parameters, versions and machine."""
    ratios = _ratios(run.measured)
    parameters = {
        "mode": case.mode,
        "backend": run.backend,
        "ranks": case.ranks,
        "ranks_per_node": run.topology.ranks_per_node,
        "tokens_per_rank": case.tokens,
        "hidden": case.hidden,
        "topk": case.topk,
        "experts": case.experts,
        "dtype": case.dtype,
        "routing": case.routing,
        "repeats": case.repeats,
        **environment(),
    }
    lines = []
    for result in run.measured:
        operation = result.operation
        logical, wire = operation.logical_bytes / case.ranks, operation.wire_bytes / case.ranks
        record = {
            "operation": operation.name,
            "p50_us": result.p50_s * 1e6,
            "p99_us": result.p99_s * 1e6,
            "logical_bytes_per_rank": logical,
            "wire_bytes_per_rank": wire,
            "logical_gb_per_s": logical / result.p50_s / 1e9,
            "wire_gb_per_s": wire / result.p50_s / 1e9,
            "ratio_to_alltoallv": ratios.get(operation.name),
            **fields(case, result.p50_s, operation.links),
        }
        lines.append(json.dumps({**record, **parameters}))
    return lines


def _header(case: Case, run: Run) -> Iterator[str]:
    found = environment()
    num_nodes = run.topology.num_nodes
    nodes = "1 node" if num_nodes == 1 else f"{num_nodes} nodes"
    ranks = "1 rank" if case.ranks == 1 else f"{case.ranks} ranks"
    where = "host backend (NumPy, no GPU)" if run.backend == "host" else f"{run.backend} backend"
    mpi = f", mpi4py {found['mpi4py']}, {found['mpi']}" if found["mpi"] else ""
    dtype = "bf16 and fp8" if case.mode == "low-latency" else case.dtype
    yield f"epcomm bench, {case.mode}: {ranks} on {nodes}, {where}"
    yield f"  {found['cpu']:.60s}, {found['cores']} cores"
    yield f"  Python {found['python']}, NumPy {found['numpy']}{mpi}"
    yield f"  {case.tokens} tokens a rank, hidden {case.hidden}, {dtype}, top-{case.topk} of {case.experts} experts"
    yield f"  {case.routing} routing; all operations in turn, {case.repeats} times, ranks in step before each"
    yield "  before that, every result was bitwise equal to epcomm.reference"
    if run.backend == "host" and case.ranks > found["cores"]:
        yield "  more ranks than cores: they also wait for each other's turn"


def _table(measured: Sequence[Measured], num_ranks: int) -> Iterator[str]:
    ratios = _ratios(measured)
    yield f"{'':26s}{'ms, slowest rank':>16s}{'MB a rank':>16s}{'GB/s':>14s}"
    yield f"{'':26s}{'p50':>8s}{'p99':>8s}{'logical':>8s}{'wire':>8s}{'logical':>8s}{'wire':>6s}" + (
        f"{'x MPI':>7s}" if ratios else ""
    )
    for result in measured:
        operation = result.operation
        line = f"  {operation.name:24s}{result.p50_s * 1e3:8.3f}{result.p99_s * 1e3:8.3f}"
        if operation.logical_bytes:
            logical, wire = operation.logical_bytes / num_ranks, operation.wire_bytes / num_ranks
            line += f"{logical / 1e6:8.2f}{wire / 1e6:8.2f}"
            line += f"{logical / result.p50_s / 1e9:8.2f}{wire / result.p50_s / 1e9:6.2f}"
        if operation.name in ratios:
            line += f"{ratios[operation.name]:7.2f}"
        yield line


def _links(case: Case, run: Run) -> Iterator[str]:
    found = [(result.operation, result.p50_s) for result in run.measured]
    rows = [
        LinkRow(operation.name, p50_s, operation.links) for operation, p50_s in found if operation.links is not None
    ]
    yield from table(case, rows, "between ranks")
    yield ""
    yield from notes(case, "p50")
    if case.num_nodes > 1 and run.crossing is not None:
        yield ""
        yield from rows_to_nodes(case, run.crossing)


def _ratios(measured: Sequence[Measured]) -> dict[str, float]:
    """By operation that has a baseline: its median over that of the baseline."""
    medians = {result.operation.name: result.p50_s for result in measured}
    compared = [result.operation for result in measured if result.operation.baseline is not None]
    return {operation.name: medians[operation.name] / medians[str(operation.baseline)] for operation in compared}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
