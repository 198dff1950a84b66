"""``epcomm demo``: one mixture-of-experts layer over real text, spread over ranks, checked and shown.

::

    text.py       the tokens
    model.py      embedding, gate, experts; the dense layer
    arrays.py     in host memory or on the GPU
    layer.py      the layer over the ranks, as a program with a Buffer writes it
    checks.py     transport bit for bit, layer within its roundings
    program.py    what each rank does, what rank 0 concludes
    report.py     the text   plot.py     the picture
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from epcomm.cli import job
from epcomm.errors import InputError, MissingDependency

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator
    from epcomm.cli.demo.program import Task

__all__ = ["add_parser", "main"]

_DESCRIPTION = """\
Runs a mixture-of-experts layer over the bytes of a text, with its experts spread over several ranks: gate,
get_dispatch_layout, dispatch, experts, combine. Checks that every row arrived with the bits it was sent with, and that
the layer gives what one process without ranks computes. Then shows the load of the experts, the bytes that moved and
the time of each phase.

Starts its own ranks, or takes part in the job it finds itself in (mpirun -n 4 python -m epcomm demo). The exit status
is 0 when all checks hold, 1 when one does not, 2 for wrong options.
"""

_EXPERTS_PER_RANK = 16
_MAX_TOPK = 32
_DEFAULT_TOPK = 8


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``demo`` to the sub-commands of ``epcomm``."""
    parser = subparsers.add_parser(
        "demo",
        help="send tokens through a small job and check every bit",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    job.add_arguments(parser)
    parser.add_argument(
        "--experts", type=int, metavar="E", help=f"experts of all ranks (default: {_EXPERTS_PER_RANK} a rank)"
    )
    parser.add_argument("--topk", type=int, default=_DEFAULT_TOPK, metavar="K", help="experts of a token (default: 8)")
    parser.add_argument("--hidden", type=int, default=256, metavar="H", help="channels of a row (default: 256)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, its first 4096 bytes (default: epcomm's README)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the weights (default: 0)")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw traffic and load (needs matplotlib)")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the demo; 0 when all checks hold."""
    return job.run("demo", args, _prepare, _program)


def _prepare(args: argparse.Namespace, num_ranks: int) -> Task:
    from epcomm.cli.demo.model import LayerConfig
    from epcomm.cli.demo.program import Task
    from epcomm.cli.demo.text import load_text

    num_experts = _EXPERTS_PER_RANK * num_ranks if args.experts is None else args.experts
    if num_experts < 1 or num_experts % num_ranks:
        raise InputError("--experts", got=num_experts, wanted=f"a multiple of the {num_ranks} ranks")
    if not 1 <= args.topk <= min(num_experts, _MAX_TOPK):
        limit = f"1 to {min(num_experts, _MAX_TOPK)}"
        raise InputError("--topk", got=args.topk, wanted=f"{limit} for {num_experts} experts")
    if args.hidden < 8 or args.hidden % 8:
        raise InputError("--hidden", got=args.hidden, wanted="a multiple of 8, which is 16 bytes of bfloat16")
    if args.seed < 0:
        raise InputError("--seed", got=args.seed, wanted="0 or more")
    if args.plot is not None:
        _check_plot(args.plot)
    text, name = load_text(args.text)
    job.backend_here(args.backend)
    return Task(LayerConfig(num_experts, args.topk, args.hidden, args.seed), text, name, args.backend, args.plot)


def _check_plot(path: str) -> None:
    job.check_output_file("--plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency(
            "--plot", got="no matplotlib in this environment", do="pip install 'epcomm[plot]', or leave --plot out"
        )


def _program(comm: Communicator, task: Task) -> int:
    from epcomm.cli.demo.program import run_ranks_part
    from epcomm.cli.demo.report import report

    outcome = run_ranks_part(comm, task)
    holds = False
    if outcome is not None:
        holds = outcome.holds
        print(report(outcome, sys.stdout.encoding or "ascii"))
        print(f"\n{'all checks hold' if holds else 'THE CHECK FAILED'}", flush=True)
        if task.plot is not None:
            from epcomm.cli.demo.plot import save_plot

            save_plot(outcome, task.plot)
            print(f"wrote {task.plot}", flush=True)
    return 0 if comm.bcast(holds) else 1
