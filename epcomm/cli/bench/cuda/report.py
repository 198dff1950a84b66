"""The table of the GPU bench, and the same as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from epcomm.cli.bench.case import Case
from epcomm.cli.bench.cuda.run import CudaRun, Measured
from epcomm.cli.bench.links_report import LinkRow, fields, has_floors, is_told, notes, rows_to_nodes, table
from epcomm.cli.bench.report import environment

__all__ = ["to_json_lines", "to_text"]

_NOTES = """\
p50, p99: CUDA events around each call, which follows a device barrier.
chain: mean of a call in a row of [device barrier, call], less the barriers;
no events inside, which would slow down a GPU that processes share. A dispatch
without a handle waits for counts on the host: its times contain Python's,
each call also follows a barrier of the hosts, its chain has no barriers.
floor: source rows read once and received rows written once (combine: the
reverse) by all ranks of a GPU, at the copy speed measured here; where results
lie outside of the arena, received rows are written, read and written again.
Rows that cross to another node are also written to a ring, and read there.
% and GB/s: of the chain; of p50 for a dispatch without a handle.
logical: bytes a rank receives, from itself included, mean of the ranks: rows,
fp8 scales and, in dispatch without a handle, expert indices and weights.
wire: those of them from other ranks."""
_ROWS_ALONE = """\
rows alone: what as many SMs write to, or read from, all other GPUs at once if
they do nothing else; dispatch writes rows, combine reads them."""


def to_text(case: Case, run: CudaRun) -> str:
    """All of it, of 80 columns."""
    lines = [*_header(case, run), ""]
    for num_sms, group in groupby(run.measured, key=lambda result: result.num_sms):
        lines += [*_table(case, run, num_sms, list(group)), ""]
    lines += [f"  {line}" for line in _NOTES.splitlines()]
    if any(result.row_speeds for result in run.measured):
        lines += [f"  {line}" for line in _ROWS_ALONE.splitlines()]
    if is_told(case):
        lines += ["", *_links(case, run)]
    lines += ["", *_host_times(run)]
    return "\n".join(lines)


def floor_us(case: Case, run: CudaRun, result: Measured) -> float:
    """Time that no implementation in this memory can beat; ranks of several GPUs have a memory each."""
    share = run.machine.ranks_on_gpu / case.ranks
    return 1e6 * result.operation.floor_bytes * share / run.machine.copy_bytes_per_s


def to_json_lines(case: Case, run: CudaRun) -> list[str]:
    """One JSON object an operation and number of SMs: result, parameters, method, versions and machine."""
    machine = run.machine
    parameters = {
        "mode": case.mode,
        "backend": "cuda",
        "ranks": case.ranks,
        "ranks_per_node": case.ranks_per_node or case.ranks,
        "tokens_per_rank": case.tokens,
        "hidden": case.hidden,
        "topk": case.topk,
        "experts": case.experts,
        "dtype": case.dtype,
        "combine_dtype": case.combine_dtype.name,
        "scales": f"float32 [T, {case.scale_bytes // 4}]" if case.dtype == "fp8" else None,
        "routing": case.routing,
        "repeats": case.repeats,
        "own_rows_included": True,
        "rates_of": "chain_us; p50_us where the call waits on the host",
        **asdict(machine),
        "arena_bytes": run.arena_bytes,
        "construct_first_s": run.construct_s[0],
        "construct_another_s": run.construct_s[1],
        "construct_compiling_s": run.construction[0] if run.construction else None,
        "construct_from_disk_s": run.construction[1] if run.construction else None,
        **environment(),
    }
    return [json.dumps({**_record(case, run, result), **parameters}) for result in run.measured]


def _record(case: Case, run: CudaRun, result: Measured) -> dict[str, Any]:
    operation, seconds = result.operation, result.telling_us * 1e-6
    logical, wire = operation.logical_bytes / case.ranks, operation.wire_bytes / case.ranks
    floor = floor_us(case, run, result)
    return {
        "operation": operation.name,
        "sms": result.num_sms,
        "p50_us": result.p50_us,
        "p99_us": result.p99_us,
        "chain_us": result.chain_us,
        "python_us": result.python_us,
        "waits_on_host": operation.waits,
        "rows_written_bytes_per_s": result.row_speeds.written if result.row_speeds else None,
        "rows_read_bytes_per_s": result.row_speeds.read if result.row_speeds else None,
        "floor_us": floor or None,
        "floor_percent": 100 * floor / result.telling_us if floor else None,
        "logical_bytes_per_rank": logical,
        "wire_bytes_per_rank": wire,
        "logical_gb_per_s": logical / seconds / 1e9,
        "wire_gb_per_s": wire / seconds / 1e9,
        **fields(case, seconds, operation.links),
    }


def _header(case: Case, run: CudaRun) -> Iterator[str]:
    machine, found = run.machine, environment()
    ranks = "1 rank" if case.ranks == 1 else f"{case.ranks} ranks"
    gpus = "one GPU" if machine.num_gpus == 1 else f"{machine.num_gpus} GPUs"
    shared = f", {machine.ranks_on_gpu} ranks a GPU" if machine.ranks_on_gpu > 1 else ""
    service = ", under MPS" if machine.mps else (", without MPS: they take turns" if machine.ranks_on_gpu > 1 else "")
    scales = f" with float32 scales [T, {case.scale_bytes // 4}]" if case.dtype == "fp8" else ""
    back = "" if case.dtype != "fp8" else "; combine in bf16"
    mpi = f", mpi4py {found['mpi4py']}, {found['mpi']}" if found["mpi"] else ""
    virtual = "virtual " if case.hosts < case.num_nodes else ""
    nodes = "1 node" if case.num_nodes == 1 else f"{case.num_nodes} {virtual}nodes"
    yield f"epcomm bench, {case.mode}: {ranks} on {gpus} of {nodes}, cuda backend"
    yield f"  {machine.gpu}, {machine.num_sms} SMs{shared}{service}"
    yield f"  driver {machine.driver}, CUDA {machine.cuda}, CuPy {machine.cupy}, NumPy {found['numpy']}"
    yield f"  Python {found['python']}{mpi}"
    yield f"  {found['cpu']:.60s}, {found['cores']} cores"
    yield f"  {case.tokens} tokens a rank, hidden {case.hidden}, top-{case.topk} of {case.experts} experts"
    yield f"  {case.dtype}{scales}{back}; {case.routing} routing; arena {run.arena_bytes / 1e6:.0f} MB"
    yield f"  {case.repeats} calls of each; copy speed {machine.copy_bytes_per_s / 1e12:.2f} TB/s (read + written)"
    if machine.peer_bytes_per_s is not None:
        yield f"  a plain copy to the next GPU, all at once: {machine.peer_bytes_per_s / 1e9:.0f} GB/s"
    yield "  every row of every rank was right in all its bits, before and after"


def _table(case: Case, run: CudaRun, num_sms: int, measured: list[Measured]) -> Iterator[str]:
    sms = f"{num_sms} SMs" if num_sms > 1 else "1 SM"
    yield f"  {sms + ' an operation':25s}{'us, slowest rank':>21s}{'floor':>12s}{'GB/s a rank':>17s}"
    yield f"{'':27s}{'p50':>7s}{'p99':>7s}{'chain':>7s}{'us':>7s}{'%':>5s}{'logical':>10s}{'wire':>7s}"
    for result in measured:
        operation = result.operation
        line = f"  {operation.name:25s}{result.p50_us:7.0f}{result.p99_us:7.0f}{result.chain_us:7.0f}"
        if operation.logical_bytes:
            record = _record(case, run, result)
            line += f"{record['floor_us']:7.0f}{record['floor_percent']:5.0f}"
            line += f"{record['logical_gb_per_s']:10.1f}{record['wire_gb_per_s']:7.1f}"
        yield line
    speeds = measured[0].row_speeds
    if speeds is not None:
        yield f"  rows alone, GB/s between GPUs: {speeds.written / 1e9:.0f} written, {speeds.read / 1e9:.0f} read"


def _links(case: Case, run: CudaRun) -> Iterator[str]:
    """Of each number of SMs, if there are floors: times differ, bytes do not."""
    for num_sms, group in groupby(run.measured, key=lambda result: result.num_sms):
        found = [(result.operation, result.telling_us * 1e-6) for result in group]
        rows = [LinkRow(operation.name, time_s, operation.links) for operation, time_s in found if operation.links]
        sms = f", {num_sms} SMs" if num_sms > 1 else ", 1 SM"
        yield from table(case, rows, "between ranks" + sms * has_floors(case))
        yield ""
        if not has_floors(case):
            break
    yield from notes(case, "chain, or p50 of a dispatch without a handle,")
    if case.num_nodes > 1:
        yield ""
        yield from rows_to_nodes(case, run.crossing)


def _host_times(run: CudaRun) -> Iterator[str]:
    seen: dict[str, float] = {}
    for result in run.measured:
        if result.python_us is not None:
            seen.setdefault(result.operation.name, result.python_us)
    yield "  Python's time of a call in a row, median, us (slowest rank, CuPy arrays):"
    yield from (f"    {name:25s}{value:7.0f}" for name, value in seen.items())
    first, another = run.construct_s
    yield f"  constructing a Buffer: {first:.2f} s the first of a process, {another:.2f} s another one"
    if run.construction is not None:
        compiling, from_disk = run.construction
        yield f"    of one rank: {compiling:.2f} s compiling all kernels, {from_disk:.2f} s from the disk cache"
