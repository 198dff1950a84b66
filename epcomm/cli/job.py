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
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from epcomm import env
from epcomm.bootstrap import Communicator, SoloCommunicator, as_communicator, run_ranks
from epcomm.cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from epcomm.errors import EpcommError, InputError

__all__ = ["add_arguments", "check_backend", "check_output_file", "run"]

DEFAULT_RANKS = 4

# What argparse put there that is no option of the command.
_NOT_OPTIONS = ("func", "ranks", "started")

Task = TypeVar("Task")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all such commands have: ``--ranks`` and ``--backend``."""
    parser.add_argument("--ranks", type=int, metavar="N", help=f"number of ranks (default: {DEFAULT_RANKS})")
    parser.add_argument("--backend", choices=("auto", "host", "cuda"), default="auto", help="(default: auto)")
    # Given to the ranks that `run` starts: even under a launcher that tells them nothing they start no others.
    parser.add_argument("--started", action="store_true", help=argparse.SUPPRESS)


def run(
    command: str,
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, int], Task],
    program: Callable[[Communicator, Task], int],
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
        EpcommError: there is no mpirun, or a single rank failed. A rank of a job does not raise, it ends the job.
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
    returncode, _ = run_ranks(num_ranks, _rank_command(command, args, num_ranks))
    return returncode if returncode >= 0 else 128 - returncode  # as shells report signals


def check_backend(backend: str) -> None:
    """Raise what a Buffer of all ranks would raise for `backend`, once and not by every rank."""
    from epcomm.buffer import Buffer

    Buffer(SoloCommunicator(), backend=backend, ranks_per_node=1).destroy()


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
    prepare: Callable[[argparse.Namespace, int], Task],
    program: Callable[[Communicator, Task], int],
) -> int:
    """The part of one rank. If it fails it takes the job along: the others may be waiting for it."""
    comm = as_communicator(None)
    try:
        task, problem, status = comm.bcast(_prepared(args, comm.size, prepare) if comm.rank == 0 else None)
        if task is None:
            if comm.rank == 0:
                print(f"epcomm{f' {command}' if status == EXIT_USAGE else ''}: {problem}", file=sys.stderr)
            return int(status)
        return program(comm, task)
    except BaseException as error:
        if comm.size == 1:
            raise
        _explain(error, comm.rank)
        comm.abort(EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_ERROR)
        raise


def _prepared(
    args: argparse.Namespace, num_ranks: int, prepare: Callable[[argparse.Namespace, int], Task]
) -> tuple[Task | None, str, int]:
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
