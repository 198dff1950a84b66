"""``epcomm bench --report``: tests, then tables of all sizes, on all GPUs of this machine, in at most 9 minutes.

Each step is a child process with a time limit of its own: one that hangs takes its share and no more, and what has no
time left is named.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import epcomm
from epcomm.cli import job
from epcomm.cli.doctor import child
from epcomm.errors import InputError
from epcomm.jit import num_sms

__all__ = ["LINK_GB_PER_S", "Step", "main", "steps", "summary"]

LINK_GB_PER_S = 370.0  # what a rank can receive over the NVLink of H100 and H200
_TOTAL_S = 540.0
_TESTS = ("test_throughput.py", "test_low_latency.py", "test_low_latency_options.py", "test_low_latency_graphs.py")
_TESTS_S, _TABLE_S, _GRACE_S = 200.0, 100.0, 15.0
_THROUGHPUT_TOKENS, _LOW_LATENCY_TOKENS = (4096, 8192), (1, 16, 128, 512)
_THROUGHPUT_SMS, _LOW_LATENCY_SMS = (8, 16, 24, 32), (24, 64)
_EXPERTS_AND_SIZES = ("--hidden=7168", "--topk=8")
_MIN_EXPERTS = 256


@dataclass(frozen=True)
class Step:
    """One child process.

    Attributes:
        title: what it is.
        command: its command line; ``--json=FILE`` is added to that of a table.
        is_table: a bench, else the tests.
        limit_s: seconds it may take.
    """

    title: str
    command: tuple[str, ...]
    is_table: bool
    limit_s: float


def main(args: argparse.Namespace) -> int:
    """Run it, print each table as it comes and a summary; 0 when all that ran was right and nothing is missing."""
    try:
        (num_ranks, most_sms), tests = _check(args), _tests_folder()
    except InputError as error:
        print(f"epcomm bench: {error}", file=sys.stderr)
        return 2
    if tests is None:
        print(
            "tests: not run, they are neither beside this package nor here; run this in a checkout of the repository",
            flush=True,
        )
    end = time.monotonic() + _TOTAL_S
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for step in steps(num_ranks, most_sms, args.repeats, tests):
        found, problem = _run(step, min(step.limit_s, end - time.monotonic()))
        records += found
        if problem:
            problems.append(problem)
    print("\n".join(summary(records, problems)), flush=True)
    if args.json is not None:
        Path(args.json).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return 1 if problems else 0


def steps(num_ranks: int, most_sms: int, repeats: int, tests: Path | None) -> Iterator[Step]:
    """In their order. `most_sms`: that a rank may have. `tests`: the folder of the GPU tests."""
    if tests is not None and num_ranks > 1:
        # A rank for each GPU: more share GPUs, and are slow.
        sizes = " or ".join(f"np{n}" for n in range(2, num_ranks + 1))
        files = [str(tests / name) for name in _TESTS]
        pytest = (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", sizes, *files)
        yield Step(f"tests of 2 to {num_ranks} ranks", pytest, False, _TESTS_S)
    experts = -(-_MIN_EXPERTS // num_ranks) * num_ranks
    always = (f"--ranks={num_ranks}", "--backend=cuda", f"--experts={experts}", *_EXPERTS_AND_SIZES)
    for tokens in _LOW_LATENCY_TOKENS:
        sms = _sms(_LOW_LATENCY_SMS, most_sms)
        options = ("--mode=low-latency", f"--tokens={tokens}", sms, f"--repeats={repeats}", *always)
        yield Step(f"low latency, {_count(tokens)}", _bench(*options), True, _TABLE_S)
    for tokens in _THROUGHPUT_TOKENS:
        for dtype in ("bf16", "fp8"):
            sms = _sms(_THROUGHPUT_SMS, most_sms)
            rows = (f"--tokens={tokens}", f"--dtype={dtype}", sms, f"--repeats={repeats}")
            yield Step(f"throughput, {_count(tokens)}, {dtype}", _bench(*rows, *always), True, _TABLE_S)


def summary(records: list[dict[str, Any]], problems: list[str]) -> Iterator[str]:
    """The lines of one table of 80 columns, from what all steps measured; then what went wrong."""
    if records:
        first = records[0]
        copies = [record["peer_bytes_per_s"] / 1e9 for record in records if record["peer_bytes_per_s"]]
        yield f"report: {first['ranks']} ranks on {first['num_gpus']} x {first['gpu']}"
        if copies:
            yield f"  a plain copy to the next GPU, all at once: {max(copies):.0f} GB/s (the ceiling)"
        yield f"  us of the slowest rank; GB/s from other ranks, and % of {LINK_GB_PER_S:.0f}, by the time on"
        yield "  the device: that of a chain of calls; for low latency, of calls in graphs"
    for title, group in groupby(records, key=lambda record: record["step"]):
        yield ""
        yield f"  {title:27s}{'SMs':>4s}{'p50':>8s}{'p99':>8s}{'device':>8s}{'GB/s':>8s}{'%':>6s}"
        for _, rows in groupby(group, key=lambda record: record["sms"]):
            first, *others = rows
            yield from _ceilings(first)
            yield from map(_row, (first, *others))
    if problems:
        yield ""
        yield from (f"  {problem}" for problem in problems)


def _ceilings(record: dict[str, Any]) -> Iterator[str]:
    """What as many SMs move between the GPUs if they do nothing else."""
    for name in ("written", "read"):
        speed = record.get(f"rows_{name}_bytes_per_s")
        if speed:
            percent = 100 * speed / 1e9 / LINK_GB_PER_S
            yield f"  {f'rows alone, {name}':27s}{record['sms']:4d}{'':24s}{speed / 1e9:8.1f}{percent:6.1f}"


def _row(record: dict[str, Any]) -> str:
    device_us = record.get("graph_us") or record["chain_us"]
    line = (
        f"  {record['operation']:27s}{record['sms']:4d}{record['p50_us']:8.1f}{record['p99_us']:8.1f}{device_us:8.1f}"
    )
    if record["wire_bytes_per_rank"]:
        speed = record["wire_bytes_per_rank"] / device_us / 1e3
        line += f"{speed:8.1f}{100 * speed / LINK_GB_PER_S:6.1f}"
    return line


def _check(args: argparse.Namespace) -> tuple[int, int]:
    """Number of ranks: one for each GPU, or what the options say; and how many SMs each may have."""
    if job.backend_here("auto" if args.backend == "auto" else args.backend) != "cuda":
        raise InputError("--report", got="the host backend", wanted="a machine with GPUs")
    if args.json is not None:
        job.check_output_file("--json", args.json)
    if args.ranks is not None and args.ranks < 1:
        raise InputError("--ranks", got=args.ranks, wanted="at least 1")
    import cupy

    num_gpus = int(cupy.cuda.runtime.getDeviceCount())
    num_ranks = int(args.ranks or num_gpus)
    return num_ranks, min(map(num_sms, range(num_gpus))) // -(-num_ranks // num_gpus)


def _sms(wanted: tuple[int, ...], most: int) -> str:
    """The option, with what there is room for."""
    return "--sms=" + ",".join(map(str, dict.fromkeys(min(sms, most) for sms in wanted)))


def _tests_folder() -> Path | None:
    """Beside the package, or in the current folder if the package is installed elsewhere."""
    for root in (Path(next(iter(epcomm.__path__))).parent, Path.cwd()):
        folder = root / "tests" / "cuda"
        if all((folder / name).is_file() for name in _TESTS):
            return folder
    return None


def _count(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def _bench(*options: str) -> tuple[str, ...]:
    return tuple(child.command("epcomm.__main__", "bench", *options))


def _run(step: Step, limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """(what it measured, what went wrong)."""
    print(f"== {step.title}", flush=True)
    if limit_s <= 0:
        return [], f"{step.title}: not run, the time was up"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        command = [*step.command, f"--json={file}"] if step.is_table else list(step.command)
        status, output = _call(command, limit_s)
        print(output if step.is_table else "\n".join(output.splitlines()[-3:]), flush=True)
        if status != 0:
            reason = f"ended after {limit_s:.0f} s" if status is None else f"failed with status {status}"
            return [], f"{step.title}: {reason}"
        lines = file.read_text().splitlines() if step.is_table else []
    return [{**json.loads(line), "step": step.title} for line in lines], ""


def _call(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """(exit status, or None if its time was up; standard output)."""
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends its ranks
            try:
                output, _ = process.communicate(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            return None, output
