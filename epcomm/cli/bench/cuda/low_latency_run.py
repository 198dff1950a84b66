"""Check, measure, check again and report: the low-latency mode on GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from epcomm.bootstrap import Communicator
from epcomm.buffer import Buffer
from epcomm.cli.bench.case import Case
from epcomm.cli.bench.cuda.low_latency import LowLatencyCalls, LowLatencyOperation
from epcomm.cli.bench.cuda.run import Machine, machine_of
from epcomm.cli.bench.cuda.timing import Timer
from epcomm.cli.bench.links import LinkTraffic
from epcomm.cli.bench.links_report import LinkRow, fields, has_floors, is_told, notes, table
from epcomm.cli.bench.report import environment

__all__ = ["LowLatencyRun", "run_low_latency", "to_json_lines", "to_text"]

_CALLS_A_GRAPH = 10
_NOTES = """\
p50, p99: CUDA events around each call, which follows a device barrier.
row: mean of many calls back to back; graph: the same in graphs of 10.
Ranks wait for each other in every call, and in nothing else there.
send, recv: medians of the halves in hook mode, each after a device barrier.
host: Python's time of a call in a row, median. All of the slowest rank.
MB: from other ranks, mean of the ranks: in a dispatch a row, with its scales,
for each token and other rank; in a combine one for each choice there, in
10 bits a channel with LogFMT; pre-reduced, as in a dispatch."""


@dataclass(frozen=True)
class LowLatencyMeasured:
    """One operation with one number of SMs, in microseconds of the slowest rank."""

    name: str
    sms: int
    p50_us: float
    p99_us: float
    row_us: float
    graph_us: float
    send_us: float | None
    receive_us: float | None
    python_us: float
    links: LinkTraffic

    @property
    def wire_bytes_per_rank(self) -> float:
        return self.links.mean.network_bytes + self.links.mean.nvlink_bytes


@dataclass(frozen=True)
class LowLatencyRun:
    """What came out; if there are differences, nothing counts."""

    differences: list[str]
    machine: Machine
    measured: list[LowLatencyMeasured] = field(default_factory=list)


def run_low_latency(comm: Communicator, case: Case) -> LowLatencyRun:
    """All of it. Collective, blocks the host."""
    import cupy

    hint = Buffer.get_low_latency_rdma_size_hint(case.tokens, case.hidden, case.ranks, case.experts)
    num_rdma_bytes = hint * -(-max(case.topk, 10) // 10)  # the hint is for 10 choices
    with ExitStack() as stack:
        buffer = stack.enter_context(
            Buffer(
                comm,
                num_rdma_bytes=num_rdma_bytes,
                low_latency_mode=True,
                backend="cuda",
                ranks_per_node=case.ranks_per_node,
            )
        )
        stream = stack.enter_context(cupy.cuda.Stream(non_blocking=True))  # of the GPU that the Buffer has chosen
        calls = LowLatencyCalls(cupy, buffer, case)
        result = LowLatencyRun(_check(comm, calls, "before"), machine_of(comm, cupy, stream))
        if not result.differences:
            timer = Timer(cupy, comm, buffer, stream, result.machine.copy_bytes_per_s)
            for num_sms in case.sms or (None,):
                if num_sms is not None:
                    Buffer.set_num_sms(num_sms)
                sms = buffer._num_sms(None, is_low_latency=True)
                for operation in calls.operations():
                    result.measured.append(_measure(cupy, timer, stream, operation, case, sms))
                result.differences.extend(_check(comm, calls, "after"))
        stream.synchronize()
        comm.barrier()
        return result


def _check(comm: Communicator, calls: LowLatencyCalls, when: str) -> list[str]:
    found = comm.allgather(calls.differences())
    return [f"rank {rank}, {when}: {text}" for rank, texts in enumerate(found) for text in texts]


def _measure(
    cupy: Any, timer: Timer, stream: Any, operation: LowLatencyOperation, case: Case, num_sms: int
) -> LowLatencyMeasured:
    num_calls = operation.num_calls
    calls_us = timer.calls_us(operation.run, case.repeats, waits=False, num_calls=num_calls)
    row_us = timer.row_us(operation.run, case.repeats, num_calls)
    stream.begin_capture()
    for _ in range(_CALLS_A_GRAPH):
        operation.run()  # the memory of its results goes to the next call
    graph = stream.end_capture()
    replays = -(-case.repeats // _CALLS_A_GRAPH)
    graph_us = timer.row_us(lambda: graph.launch(stream), replays) / _CALLS_A_GRAPH
    send_us = receive_us = None
    if operation.send is not None:
        send_us, receive_us = timer.halves_us(operation.send, case.repeats, num_calls)
    return LowLatencyMeasured(
        operation.name,
        num_sms,
        float(np.percentile(calls_us, 50)),
        float(np.percentile(calls_us, 99)),
        row_us,
        graph_us,
        send_us,
        receive_us,
        timer.python_us(operation.run, case.repeats, num_calls),
        operation.links,
    )


def to_text(case: Case, run: LowLatencyRun) -> str:
    """The table, of 80 columns."""
    return "\n".join(_lines(case, run))


def _lines(case: Case, run: LowLatencyRun) -> Iterator[str]:
    machine = run.machine
    nodes = f" of {case.num_nodes} {'virtual ' * (case.hosts < case.num_nodes)}nodes" if case.num_nodes > 1 else ""
    yield f"epcomm bench, {case.mode}: {case.ranks} ranks on {machine.num_gpus} GPUs{nodes}, cuda backend"
    yield f"  {machine.gpu}, {machine.num_sms} SMs, {machine.ranks_on_gpu} ranks a GPU{', under MPS' * machine.mps}"
    yield f"  driver {machine.driver}, CUDA {machine.cuda}, CuPy {machine.cupy}"
    yield f"  {case.tokens} tokens a rank, hidden {case.hidden}, top-{case.topk} of {case.experts} experts"
    yield f"  {case.routing} routing; {case.repeats} calls of each"
    yield "  every row of every rank was right in all its bits, before and after"
    yield "  (with LogFMT: sums within its bound)"
    yield ""
    yield (
        f"  {'us, slowest rank':21s}{'SMs':>4s}{'p50':>7s}{'p99':>7s}{'row':>7s}{'graph':>7s}{'send':>7s}{'recv':>7s}"
        + (f"{'host':>6s}{'MB':>5s}")
    )
    for one in run.measured:
        halves = "".join(f"{'-' if us is None else f'{us:.1f}':>7s}" for us in (one.send_us, one.receive_us))
        times = f"{one.p50_us:7.1f}{one.p99_us:7.1f}{one.row_us:7.1f}{one.graph_us:7.1f}"
        yield f"  {one.name:21s}{one.sms:4d}{times}{halves}{one.python_us:6.0f}{one.wire_bytes_per_rank / 1e6:5.1f}"
    yield ""
    yield from (f"  {line}" for line in _NOTES.splitlines())
    if is_told(case):
        yield from _links(case, run)


def _links(case: Case, run: LowLatencyRun) -> Iterator[str]:
    """Of each number of SMs, if there are floors: times differ, bytes do not."""
    for sms, group in groupby(run.measured, key=lambda one: one.sms):
        rows = [LinkRow(one.name, one.graph_us * 1e-6, one.links) for one in group]
        yield ""
        yield from table(case, rows, "between ranks" + f", {sms} SMs" * has_floors(case))
        if not has_floors(case):
            break
    yield ""
    yield from notes(case, "graph")


def to_json_lines(case: Case, run: LowLatencyRun) -> list[str]:
    """One JSON object an operation and number of SMs: result, parameters, machine and versions."""
    parameters = {
        "mode": case.mode,
        "backend": "cuda",
        "ranks": case.ranks,
        "ranks_per_node": case.ranks_per_node or case.ranks,
        "tokens_per_rank": case.tokens,
        "hidden": case.hidden,
        "topk": case.topk,
        "experts": case.experts,
        "routing": case.routing,
        "repeats": case.repeats,
        **asdict(run.machine),
        **environment(),
    }
    return [json.dumps({**_record(case, one), **parameters}) for one in run.measured]


def _record(case: Case, one: LowLatencyMeasured) -> dict[str, Any]:
    own = {name: value for name, value in vars(one).items() if name != "links"}
    links = fields(case, one.graph_us * 1e-6, one.links)
    return {"operation": one.name, **own, "wire_bytes_per_rank": one.wire_bytes_per_rank, **links}
