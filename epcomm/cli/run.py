"""``epcomm run -n N -- COMMAND``: the right mpirun, and a job that ends when one of its ranks fails."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from epcomm.bootstrap import mps
from epcomm.bootstrap.launcher import TIMED_OUT, run_ranks

__all__ = ["add_parser", "main", "rank_command"]

DESCRIPTION = """\
Start COMMAND on N MPI ranks of this machine.

The mpirun is that of EPCOMM_MPIRUN, else of this Python environment, else the one on PATH. If COMMAND is Python
(`python ...`, a .py file, or a script that starts with a python #! line) the ranks run it under `python -m mpi4py`:
an exception or sys.exit(1) on one rank then ends the whole job, where plain Python would leave the other ranks
waiting for it. Standard input is empty. The exit status is the job's; 124 if its time ran out.

Ranks that share a GPU run at the same time only under the CUDA Multi-Process Service. --mps starts one for this job
and stops it afterwards; if one is running already (CUDA_MPS_PIPE_DIRECTORY), the ranks use that.
"""

EXAMPLES = """\
examples:
  epcomm run -n 4 -- python train.py --steps 10
  epcomm run -n 8 --timeout 60 -- examples/01_hello.py
  epcomm run -n 8 --mps -- python train.py
"""

# Interpreter options that take the next argument as their value.
_OPTIONS_WITH_VALUE = {"-W", "-X", "--check-hash-based-pycs"}

# Letters such as -u, -Im or -cTEXT: c and m end the options and start what is run.
_CLUSTER = re.compile(r"-([^cm]*)([cm]?)(.*)", re.DOTALL)


def add_parser(subparsers: Any) -> None:
    """Add the ``run`` command to the ``epcomm`` program."""
    parser = subparsers.add_parser(
        "run",
        help="start a command on N MPI ranks, so that the job ends when a rank fails",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="epcomm run -n N [--timeout S] [--mps] -- COMMAND [ARGS]",
    )
    parser.add_argument("-n", type=_positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--timeout", type=float, metavar="S", help="end the job after S seconds")
    parser.add_argument("--mps", action="store_true", help="let ranks share a GPU: start MPS for the job")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND [ARGS]", help="what every rank runs")
    parser.set_defaults(func=main, parser=parser)


def main(args: argparse.Namespace) -> int:
    """Run the job; its exit status."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        args.parser.error("COMMAND is missing")
    service: AbstractContextManager[dict[str, str]] = mps.running() if args.mps else nullcontext({})
    with service as changes:
        returncode, note = run_ranks(args.n, rank_command(command), timeout_s=args.timeout, env=changes)
    if returncode == TIMED_OUT:
        print(note, end="", file=sys.stderr)
    return returncode if returncode >= 0 else 128 - returncode  # as shells report signals


def rank_command(command: Sequence[str]) -> list[str]:
    """What each rank runs: `command`, under ``python -m mpi4py`` if it is Python."""
    program, arguments = command[0], list(command[1:])
    if re.fullmatch(r"(python|pypy)[0-9.]*", Path(program).name):
        options, rest = _split_interpreter_options(arguments)
        if not rest or rest[:2] == ["-m", "mpi4py"]:
            return list(command)
        return [program, *options, "-m", "mpi4py", *rest]
    script = program if Path(program).is_file() else shutil.which(program)
    if program.endswith(".py") or (script is not None and _has_python_line(Path(script))):
        return [sys.executable, "-m", "mpi4py", script or program, *arguments]
    return list(command)


def _split_interpreter_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of the interpreter, what it runs and its arguments): ``-u -X dev | -m pkg``, ``-I | -c text``."""
    options: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining[0]
        if argument == "-" or not argument.startswith("-"):
            break
        if argument in _OPTIONS_WITH_VALUE:
            options += remaining[:2]
            del remaining[:2]
        elif argument.startswith(("--", "-W", "-X")):
            options.append(remaining.pop(0))
        else:
            match = _CLUSTER.fullmatch(argument)
            assert match is not None
            flags, letter, value = match.groups()
            options += [f"-{flags}"] if flags else []
            del remaining[0]
            if letter:
                return options, [f"-{letter}", *([value] if value else []), *remaining]
    return options, remaining


def _has_python_line(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(200)
    return line.startswith(b"#!") and b"python" in line


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one rank")
    return number
