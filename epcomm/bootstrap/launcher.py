"""Find the mpirun that belongs to this Python environment, and run a job with it that surely ends."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from epcomm import env as environment
from epcomm.errors import MpiMissing

__all__ = ["TIMED_OUT", "Mpirun", "find_mpirun", "job_environment", "run_ranks", "start_ranks", "stop_ranks"]

MpiKind = Literal["mpich", "openmpi", "intel", "unknown"]

# Return code of a job that was killed because its time ran out; that of coreutils' timeout.
TIMED_OUT = 124

# Seconds between asking a job to end and killing it.
TERMINATION_GRACE_S = 5.0

_MARKS: tuple[tuple[str, MpiKind], ...] = (("Intel(R) MPI", "intel"), ("Open MPI", "openmpi"), ("HYDRA", "mpich"))


@dataclass(frozen=True)
class Mpirun:
    """A launcher.

    Attributes:
        path: absolute path of the program.
        kind: the MPI it belongs to. MPICH and Intel MPI start each other's programs; Open MPI's does not.
        version_text: what ``mpirun --version`` prints.
    """

    path: str
    kind: MpiKind
    version_text: str


def find_mpirun() -> Mpirun:
    """The launcher to use: ``EPCOMM_MPIRUN``, else that of the running Python environment, else that on PATH.

    mpi4py looks for an MPI library in the running environment first, so its launcher comes first too.

    Raises:
        MpiMissing: there is none; the message has the pip line.
    """
    chosen = environment.get("EPCOMM_MPIRUN")
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise MpiMissing("EPCOMM_MPIRUN", got=chosen, wanted="an executable", do="correct it, or unset it")
        return _identify(path)
    folders = [*_script_folders(), environment.lookup("PATH") or os.defpath]
    path = shutil.which("mpirun", path=os.pathsep.join(folders))
    if path is None:
        raise MpiMissing(
            "mpirun",
            got="none in the Python environment or on PATH",
            wanted="the launcher of an MPI library",
            do="pip install 'epcomm[mpi]'",
        )
    return _identify(path)


def job_environment() -> dict[str, str]:
    """Environment variables that make all MPI libraries start jobs alike. The user's own settings win.

    Open MPI refuses root and more ranks than cores unless told; its shared-memory windows print a harmless
    error line a rank. Ranks that share a host must not each start a thread a core. Intel's mpirun looks for
    its parts on PATH.
    """
    defaults = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_osc": "^ucx",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    missing = {name: value for name, value in defaults.items() if environment.lookup(name) is None}
    path = os.pathsep.join([*_script_folders(), environment.lookup("PATH") or os.defpath])
    return {**missing, "PATH": path}


def start_ranks(
    n: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, output: int | IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``mpirun -n N COMMAND`` in a session of its own, so that `stop_ranks` ends all of it.

    Args:
        n: number of ranks.
        command: program and arguments of every rank.
        env: changes to the environment, on top of `job_environment`.
        output: where standard output and error go together, as for ``subprocess``; None: this process's own.

    Raises:
        MpiMissing: there is no mpirun.
    """
    return subprocess.Popen(
        [find_mpirun().path, "-n", str(n), *command],
        env=environment.child_environment({**job_environment(), **(env or {})}),
        stdin=subprocess.DEVNULL,  # a session without a terminal cannot read from one
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def stop_ranks(process: subprocess.Popen[bytes]) -> None:
    """End a job of `start_ranks` and wait for it: TERM, on which launchers take their ranks down, then KILL."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(TERMINATION_GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ranks(
    n: int,
    command: Sequence[str],
    *,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    capture: bool = False,
) -> tuple[int, str]:
    """Run `command` on `n` ranks and wait for the end. Blocks the host.

    SIGINT and SIGTERM that reach this process end the job first; then they have their usual effect here.

    Args:
        n: number of ranks.
        command: program and arguments of every rank.
        timeout_s: seconds the job may take.
        env: changes to the environment, on top of `job_environment`.
        capture: return the output, standard output and error together; otherwise it goes to this process's own.

    Returns:
        The job's return code (`TIMED_OUT` if it was killed for time, negative for a signal), and its output.

    Raises:
        MpiMissing: there is no mpirun.
        KeyboardInterrupt: SIGINT. The job has ended by then.
        SystemExit: SIGTERM, likewise.
    """
    with _deferred_signals() as deliver:
        process = start_ranks(n, command, env=env, output=subprocess.PIPE if capture else None)
        try:
            deliver()
            data, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stop_ranks(process)
            data = _remaining_output(process)
            note = f"epcomm: the job of {n} ranks still ran after {timeout_s:g} s and was killed\n"
            return TIMED_OUT, data.decode(errors="replace") + note
        except BaseException:
            stop_ranks(process)
            raise
    return process.returncode, (data or b"").decode(errors="replace")


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], None]]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM SystemExit, but not before the yielded function was called.

    A signal while the job is being started would otherwise leave it running, with nobody who knows it.
    Python delivers signals to the main thread only: elsewhere this does nothing.
    """
    received: list[int] = []
    is_started = False

    def leave() -> None:
        nonlocal is_started
        is_started = True
        if received:
            raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if is_started:
            leave()

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored under nohup; None: not Python's
                previous[number] = signal.signal(number, on_signal)
    try:
        yield leave
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _remaining_output(process: subprocess.Popen[bytes]) -> bytes:
    """All output of a job that was stopped, even if an orphan of it still holds the pipe open."""
    try:
        data: bytes | None = process.communicate(timeout=TERMINATION_GRACE_S)[0]
    except subprocess.TimeoutExpired as held_open:
        data = held_open.output
    return data or b""


def _script_folders() -> list[str]:
    """Where pip puts programs: of the running environment, then of the user."""
    folders = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", f"{os.name}_user")]
    return [folder for folder in dict.fromkeys(folders) if folder and Path(folder).is_dir()]


@functools.cache
def _identify(path: str) -> Mpirun:
    try:
        done = subprocess.run(
            [path, "--version"],
            env=environment.child_environment(job_environment()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
        text = (done.stdout + done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        text = str(error)
    kind: MpiKind = next((kind for mark, kind in _MARKS if mark in text), "unknown")
    return Mpirun(str(Path(path).absolute()), kind, text)
