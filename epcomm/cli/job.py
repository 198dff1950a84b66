"""A sub-command that is an MPI job: it starts its own ranks, or finds itself to be one of them.

`run` takes two functions of the command. ``prepare`` checks the options and makes the *task*, a picklable object with
all that the ranks need; it runs before any rank is started, so wrong options cost nothing, and again on rank 0, which
gives the task to the others: only rank 0 reads files. ``program`` is what every rank does with it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

from epcomm import env
from epcomm.bootstrap import Communicator, SoloCommunicator, as_communicator, discover, mps, run_ranks
from epcomm.cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from epcomm.errors import EpcommError, InputError

__all__ = ["Task", "add_arguments", "backend_here", "check_output_file", "failing_together", "run"]

DEFAULT_RANKS = 4

# What argparse put there that is no option of the command.
_NOT_OPTIONS = ("func", "ranks", "started", "mps")


class Task(Protocol):
    """What `prepare` makes."""

    @property
    def backend(self) -> str:
        """As for a Buffer."""


TaskT = TypeVar("TaskT", bound=Task)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all such commands have: ``--ranks`` and ``--backend``."""
    parser.add_argument("--ranks", type=int, metavar="N", help=f"number of ranks (default: {DEFAULT_RANKS})")
    parser.add_argument("--backend", choices=("auto", "host", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--mps",
        choices=("auto", "on", "off"),
        default="auto",
        help="start MPS, without which ranks that share a GPU take turns (default: auto, where they share one)",
    )
    # Given to the ranks that `run` starts: even under a launcher that tells them nothing they start no others.
    parser.add_argument("--started", action="store_true", help=argparse.SUPPRESS)


def run(
    command: str,
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, int], TaskT],
    program: Callable[[Communicator, TaskT], int],
) -> int:
    """Run `command` on ``args.ranks`` ranks, or take part in the job that this process belongs to. Blocks the host.

    A single rank outside of a job runs in this process and needs no MPI.

    Args:
        command: name of the sub-command.
        args: its options, those of `add_arguments` included.
        prepare: ``prepare(args, num_ranks)`` is the task; raises InputError for options that cannot be.
        program: ``program(comm, task)`` is the exit status, the same on all ranks.

    Returns:
        The exit status; 2 after an InputError of `prepare`, which is printed as one line.

    Raises:
        EpcommError: there is no mpirun, or no MPS that was asked for, or a single rank failed. A rank of a job does not
            raise, it ends the job.
    """
    if args.started or any(env.lookup(name) for name in env.LAUNCHER_SIZE_VARIABLES):
        return _run_rank(command, args, prepare, program)
    num_ranks = DEFAULT_RANKS if args.ranks is None else args.ranks
    try:
        task = prepare(args, _positive(num_ranks))
    except InputError as error:
        return _refuse(command, str(error))
    if num_ranks == 1:
        return program(SoloCommunicator(), task)
    with _service(command, args.mps, task.backend, num_ranks) as changes:
        returncode, _ = run_ranks(num_ranks, _rank_command(command, args, num_ranks), env=changes)
    return returncode if returncode >= 0 else 128 - returncode  # as shells report signals


def backend_here(wanted: str) -> str:
    """The backend, "host" or "cuda", that a Buffer of one rank would have on this machine. Makes no CUDA context.

    Raises:
        UnsupportedOption: `wanted` is not there; once, and not from every rank.
    """
    from epcomm.buffer.construction import choose_backend

    comm = SoloCommunicator()
    return choose_backend(comm, discover(comm, 1), wanted)


def _service(command: str, choice: str, backend: str, num_ranks: int) -> AbstractContextManager[dict[str, str]]:
    """MPS for the job where its ranks share GPUs; gives changes to the ranks' environment."""
    if choice == "off" or (choice == "auto" and not _is_gpu_shared(backend, num_ranks)):
        return nullcontext({})
    if choice == "auto" and not mps.is_installed():
        print(
            f"epcomm {command}: no {mps.PROGRAM} on PATH: ranks that share a GPU take turns, about 3000 times slower",
            file=sys.stderr,
        )
        return nullcontext({})
    return mps.running()


def _is_gpu_shared(backend: str, num_ranks: int) -> bool:
    if backend_here(backend) != "cuda":
        return False
    import cupy

    return num_ranks > int(cupy.cuda.runtime.getDeviceCount())


def check_output_file(option: str, path: str) -> None:
    """Raise InputError unless `path` can be written, as far as that can be told before the work is done."""
    file = Path(path).absolute()
    writable = os.access(file, os.W_OK) if file.exists() else os.access(file.parent, os.W_OK)
    if file.is_dir() or not file.parent.is_dir() or not writable:
        raise InputError(option, got=path, wanted="a file that can be written, in a folder that exists")


def _positive(num_ranks: int) -> int:
    if num_ranks < 1:
        raise InputError("--ranks", got=num_ranks, wanted="at least 1")
    return num_ranks


def _refuse(command: str, problem: str) -> int:
    print(f"epcomm {command}: {problem}", file=sys.stderr)
    return EXIT_USAGE


def _rank_command(command: str, args: argparse.Namespace, num_ranks: int) -> list[str]:
    """The command line of every rank: this program, from the very tree that this process runs from."""
    from epcomm.cli.doctor import child

    options = {name: value for name, value in vars(args).items() if name not in _NOT_OPTIONS and value is not None}
    texts = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return child.command("epcomm.__main__", command, "--started", f"--ranks={num_ranks}", *texts)


def _run_rank(
    command: str,
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, int], TaskT],
    program: Callable[[Communicator, TaskT], int],
) -> int:
    """The part of one rank."""
    comm = as_communicator(None)
    with failing_together(comm):
        task, problem, status = comm.bcast(_prepared(args, comm.size, prepare) if comm.rank == 0 else None)
        if task is None:
            if comm.rank == 0:
                print(f"epcomm{f' {command}' if status == EXIT_USAGE else ''}: {problem}", file=sys.stderr)
            return int(status)
        return program(comm, task)


@contextmanager
def failing_together(comm: Communicator) -> Iterator[None]:
    """A rank whose body raises says so and ends the job: the others may be waiting for it. Not collective.

    Raises:
        BaseException: what the body raised, where this is the only rank.
    """
    try:
        yield
    except BaseException as error:
        if comm.size == 1:
            raise
        _explain(error, comm.rank)
        comm.abort(EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_ERROR)
        raise


def _prepared(
    args: argparse.Namespace, num_ranks: int, prepare: Callable[[argparse.Namespace, int], TaskT]
) -> tuple[TaskT | None, str, int]:
    """(task, problem, exit status): what rank 0 tells the others; the task is None when there is a problem."""
    try:
        if args.ranks not in (None, num_ranks):
            raise InputError("--ranks", got=args.ranks, wanted=f"{num_ranks}, the ranks of this job, or nothing")
        return prepare(args, num_ranks), "", 0
    except InputError as error:
        return None, str(error), EXIT_USAGE
    except EpcommError as error:
        return None, str(error), EXIT_ERROR


def _explain(error: BaseException, rank: int) -> None:
    if isinstance(error, EpcommError):
        print(f"epcomm: rank {rank}: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
