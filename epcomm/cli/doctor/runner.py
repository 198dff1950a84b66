"""Runs the probes, each in a child process with a time limit, and never raises for what they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from epcomm import env
from epcomm.cli.doctor import child, packages
from epcomm.cli.doctor.findings import Finding

__all__ = ["NETWORK_PROBES", "PROBES", "Probe", "run_all", "run_probe"]

# Two frameworks import at once on a small machine; more threads would only make both slower.
_NUM_THREADS = 4
# Between TERM and KILL; longer than a launcher needs to end its ranks (bootstrap.launcher.TERMINATION_GRACE_S).
_GRACE_S = 8.0


@dataclass(frozen=True)
class Probe:
    """One entry of the table.

    Attributes:
        name: name of its line in the report when it gives no answer.
        target: ``package.module:function``, called without arguments in the child; returns findings.
        timeout_s: seconds until the child and everything it started are killed.
        advice: what to do when it gives no answer.
        last: run after all others and alone, because it needs the cores for itself.
    """

    name: str
    target: str
    timeout_s: float = 20.0
    advice: str = ""
    last: bool = False


_HERE = "epcomm.cli.doctor"

PROBES: tuple[Probe, ...] = (
    Probe("python", f"{_HERE}.machine:probe_python"),
    Probe("epcomm", f"{_HERE}.machine:probe_epcomm"),
    Probe("numpy", f"{_HERE}.machine:probe_numpy", advice="pip install --force-reinstall numpy ml-dtypes"),
    Probe("mpi", f"{_HERE}.mpi:probe_mpi", advice="pip install 'epcomm[mpi]'"),
    Probe("gpu", f"{_HERE}.gpu:probe_gpu"),
    Probe("mps", f"{_HERE}.gpu:probe_mps"),
    Probe("cupy", f"{_HERE}.cuda_packages:probe_cupy", advice=packages.pip_line("cuda", 0)),
    Probe("nvrtc", f"{_HERE}.cuda_packages:probe_compilers"),
    Probe("kernels", f"{_HERE}.cuda_backend:probe_kernels", timeout_s=60.0),
    Probe("nvshmem", f"{_HERE}.cuda_packages:probe_nvshmem"),
    Probe("nics", f"{_HERE}.network:probe_network"),
    Probe("nvshmem transports", f"{_HERE}.gpu_network:probe_gpu_network"),
    Probe("torch", f"{_HERE}.frameworks:probe_torch", timeout_s=60.0, advice="pip install --force-reinstall torch"),
    Probe("jax", f"{_HERE}.frameworks:probe_jax", timeout_s=60.0, advice="pip install --force-reinstall jax jaxlib"),
    Probe("shared memory", f"{_HERE}.machine:probe_shared_memory"),
    Probe("cache", f"{_HERE}.machine:probe_cache"),
    Probe("environment", f"{_HERE}.machine:probe_environment"),
    Probe("smoke test", f"{_HERE}.mpi:probe_smoke", timeout_s=60.0, last=True),
    Probe("gpu smoke test", f"{_HERE}.cuda_backend:probe_smoke", timeout_s=90.0, last=True),
)

# What hosts of one job should have alike.
NETWORK_PROBES = tuple(probe for probe in PROBES if probe.name in ("nvshmem", "nics", "nvshmem transports"))


def run_all(probes: Sequence[Probe], *, timeout_s: float | None = None) -> list[Finding]:
    """Findings of all probes in the order of the table. Blocks the caller for a few seconds.

    Args:
        probes: the table.
        timeout_s: limit of every probe, instead of its own.

    Raises:
        KeyboardInterrupt: after all children are gone.
    """
    together = [probe for probe in probes if not probe.last]
    alone = [[probe] for probe in probes if probe.last]
    answers: dict[Probe, list[Finding]] = {}
    children = _Children()
    with ThreadPoolExecutor(max_workers=_NUM_THREADS) as pool:
        try:
            for group in (together, *alone):
                work = [pool.submit(run_probe, probe, timeout_s=timeout_s, children=children) for probe in group]
                answers.update({probe: future.result() for probe, future in zip(group, work, strict=True)})
        except BaseException:
            children.end_all()  # they lead their own sessions, so the terminal's Ctrl-C did not reach them
            pool.shutdown(cancel_futures=True)
            raise
    return [finding for probe in probes for finding in answers[probe]]


def run_probe(probe: Probe, *, timeout_s: float | None = None, children: _Children | None = None) -> list[Finding]:
    """Findings of one probe, at least one; a probe that breaks is itself a finding."""
    limit_s = probe.timeout_s if timeout_s is None else timeout_s
    children = children or _Children()
    try:
        process = children.start(child.command(f"{_HERE}.child", probe.target))
    except OSError as error:
        return [Finding(probe.name, "FAIL", f"its process could not be started: {error}", probe.advice)]
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        children.end(process)
        _close_pipes(process)
        return [Finding(probe.name, "FAIL", f"no answer after {limit_s:g} s; killed", "allow more: --timeout SECONDS")]
    finally:
        children.forget(process)
    return _read_answer(probe, process.returncode, output, errors)


def _read_answer(probe: Probe, returncode: int, output: str, errors: str) -> list[Finding]:
    """Findings in the child's output, or one that says why there are none."""
    answers = [line.removeprefix(child.ANSWER) for line in output.splitlines() if line.startswith(child.ANSWER)]
    ending = _describe_exit(returncode)
    if not answers:
        return [
            Finding(probe.name, "FAIL", f"{ending} without an answer: {_telling_line(errors or output)}", probe.advice)
        ]
    try:
        records = json.loads(answers[-1])
        if not isinstance(records, list) or not records:
            raise ValueError("not a list of findings")
        findings = [Finding.from_record(record) for record in records]
    except ValueError as error:
        return [Finding(probe.name, "FAIL", f"an answer that makes no sense: {error}", probe.advice)]
    if returncode:
        findings.append(Finding(probe.name, "warn", f"{ending} after its answer: {_telling_line(errors)}"))
    return findings


def _describe_exit(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _telling_line(text: str) -> str:
    """The fault handler's headline if there is one, else the last line: of a traceback that is the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    crashes = [line for line in lines if line.startswith("Fatal Python error")]
    return [*lines, *crashes][-1][:300] if lines else "it printed nothing"


class _Children:
    """The running child processes, each the leader of its own session so that its children die with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._closed = False

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._closed:
                raise OSError("interrupted")
            process = subprocess.Popen(
                command,
                env=env.child_environment({"PYTHONFAULTHANDLER": "1"}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def forget(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.discard(process)

    def end(self, *processes: subprocess.Popen[str]) -> None:
        """Ends children with what they started: TERM, so that a launcher takes its ranks along, then KILL."""
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                # One that is stuck in the kernel cannot be waited for; the report goes on without it.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)

    def end_all(self) -> None:
        """Ends all children and refuses new ones; the threads that wait for them then return."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        self.end(*running)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    # The group may be gone already, and that is all that was wanted.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
