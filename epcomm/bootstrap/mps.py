"""A CUDA Multi-Process Service for one job: several ranks on one GPU run at the same time only under MPS.

The daemon gets folders of its own, so it is this job's alone, and it ends with the job, whatever becomes of that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from epcomm import env
from epcomm.bootstrap.launcher import _deferred_signals
from epcomm.errors import BootstrapError, MissingDependency

__all__ = ["PROGRAM", "is_installed", "running"]

PROGRAM = "nvidia-cuda-mps-control"

# Seconds: until a new daemon answers, for one question to it, and from `quit` until it is killed.
START_S, ANSWER_S, STOP_S = 20.0, 5.0, 10.0

# After which a daemon that quits ends servers that still have clients.
SERVER_GRACE_S = 3

POLL_S = 0.02

# The pipes are unix sockets, whose paths may have 107 bytes; MPS adds names of up to about 40.
_MAX_FOLDER_LENGTH = 40


def is_installed() -> bool:
    """Whether this machine has the daemon's program."""
    return shutil.which(PROGRAM) is not None


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Have MPS for the processes that are started inside. Blocks the host while it starts and stops.

    A daemon that already answers (that of ``CUDA_MPS_PIPE_DIRECTORY``, or of the default folder) is used and left
    alone. Otherwise one is started; at the end it is told to quit, and killed if it does not within seconds.
    Inside, and in the main thread, SIGTERM raises SystemExit, so that it stops the daemon too.

    Yields:
        Changes to the environment of processes that are to use it, for ``run_ranks(env=...)``.

    Raises:
        MissingDependency: there is no MPS on this machine.
        BootstrapError: it does not start; has what it said.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise MissingDependency(
            "MPS", got=f"no {PROGRAM} on PATH", wanted="that program of the NVIDIA driver", do="install it"
        )
    if _answer(program, "get_server_list", {}) is not None:
        yield {}
        return
    with _deferred_signals() as deliver:
        folder = _make_folder()
        try:
            changes = _start(program, folder)
            deliver()
            yield changes
        finally:
            with _deferred_signals():  # an impatient second Ctrl-C must not leave the daemon behind
                _stop(program, folder)


def _make_folder() -> Path:
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="epcomm-mps-", dir=parent if len(parent) <= _MAX_FOLDER_LENGTH else "/tmp"))
    for path in (_pipes(folder), _logs(folder)):
        path.mkdir(mode=0o700)
    return folder


def _pipes(folder: Path) -> Path:
    return folder / "pipe"


def _logs(folder: Path) -> Path:
    return folder / "log"


def _variables(folder: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(_pipes(folder)), "CUDA_MPS_LOG_DIRECTORY": str(_logs(folder))}


def _start(program: str, folder: Path) -> dict[str, str]:
    """Start a daemon; the environment of its clients."""
    changes = _variables(folder)
    environment = env.child_environment(changes)
    # It would number the GPUs anew, and the ranks' own CUDA_VISIBLE_DEVICES would then mean others.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    said = folder / "said"
    deadline = time.monotonic() + START_S
    try:
        # To a file: the daemon keeps its standard output open.
        with said.open("wb") as output:
            returncode = subprocess.run(
                [program, "-d"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                timeout=START_S,
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        raise _not_started(folder, f"no end of `{PROGRAM} -d` in {START_S:g} s") from None
    except OSError as error:
        raise _not_started(folder, str(error)) from error
    if returncode != 0:
        raise _not_started(folder, f"exit status {returncode} of `{PROGRAM} -d`")
    while _answer(program, "get_server_list", changes) is None:
        if time.monotonic() > deadline:
            raise _not_started(folder, f"no answer in {START_S:g} s")
        time.sleep(POLL_S)
    return changes


def _not_started(folder: Path, problem: str) -> BootstrapError:
    files = [folder / "said", *sorted(_logs(folder).glob("*.log"))]
    texts = [file.read_text(errors="replace").strip() for file in files if file.exists()]
    last_lines = [line for text in texts for line in text.splitlines()[-5:]]
    said = "\n".join(["", *last_lines, ""]) if last_lines else ""
    return BootstrapError("MPS", got=f"{problem}{said}", wanted="a daemon that answers", do="look at `epcomm doctor`")


def _stop(program: str, folder: Path) -> None:
    """End the daemon of `folder` and its servers, and remove the folder. Bounded."""
    deadline = time.monotonic() + STOP_S
    if _processes(folder):
        _answer(program, f"quit -t {SERVER_GRACE_S}", _variables(folder))
    while (processes := _processes(folder)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for pid in processes:
        with contextlib.suppress(OSError):  # it ended meanwhile
            os.kill(pid, signal.SIGKILL)
    while _processes(folder) and time.monotonic() < deadline + ANSWER_S:
        time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def _answer(program: str, question: str, changes: dict[str, str]) -> str | None:
    """What the control daemon says to `question`; None if there is no daemon, or it does not answer in time."""
    try:
        done = subprocess.run(
            [program],
            input=question + "\n",
            env=env.child_environment(changes),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _processes(folder: Path) -> list[int]:
    """Processes of MPS, the daemon and its servers alike, that were started for `folder`.

    They are told by their environment: a daemon leaves its process group, and one that hangs cannot be asked.
    """
    mark = f"CUDA_MPS_PIPE_DIRECTORY={_pipes(folder)}".encode()
    name = PROGRAM[:15].encode()  # as much as the kernel keeps; servers are called nvidia-cuda-mps-server
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended, or another user's
                is_mps = (entry / "comm").read_bytes().strip() == name
                if is_mps and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
