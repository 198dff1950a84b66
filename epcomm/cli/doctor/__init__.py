"""``epcomm doctor``: what works on this machine, and the line that mends what does not.

Every check runs in a child process with a time limit (`runner`), because the things it looks at
crash and hang: drivers, MPI libraries of another ABI, frameworks built for another CUDA. A broken
check is a line of the report; it never takes the report away.

::

    findings.py       one line of the report; text, JSON, the closing summary
    runner.py         the table of probes; starts them, reads them, ends them
    child.py          what runs inside the child process
    machine.py  mpi.py  gpu.py  cuda_packages.py  cuda_backend.py  frameworks.py      the probes
    network.py  gpu_network.py       probes of NICs, and of what NVSHMEM would need of them
    smoke.py          the two-rank program that is started last, for each backend
    nodes.py          --job: nodes and hosts of the job that this process belongs to
"""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser", "main"]

_DESCRIPTION = """\
Tells what works on this machine and how to mend what does not. Each check runs in its own process,
so nothing that it loads can crash or hang the report. The exit status is 0 when the host backend
works (two ranks exchanged tokens and the bits were right), else 1. A missing GPU or NIC is not an
error. With --job, started on all ranks by the launcher of a job: its nodes, and how their networks
differ; then the exit status is 0 when the ranks form nodes.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds ``doctor`` to the sub-commands of ``epcomm``."""
    parser = subparsers.add_parser("doctor", help="what works on this machine, and why not", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="seconds each check may take (default: 20; 60 to 90 for torch, jax, kernels, two-rank tests)",
    )
    parser.add_argument("--job", action="store_true", help="only the nodes of the job around it; on all its ranks")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Runs every check and prints the report. Not collective, but with ``--job``.

    Args:
        args: `json` and `job` (bool) and `timeout` (seconds, or None for each probe's own limit).

    Returns:
        0 when the host backend works, 1 when it does not, 130 after Ctrl-C. With ``--job`` 0 when the ranks form
        nodes, else 1.
    """
    from epcomm.cli.doctor import findings, runner

    if args.job:
        from epcomm.cli.doctor import nodes

        return nodes.show(as_json=args.json, timeout_s=args.timeout)
    try:
        found = runner.run_all(runner.PROBES, timeout_s=args.timeout)
    except KeyboardInterrupt:
        return 130
    print(findings.to_json(found) if args.json else findings.to_text(found, colour=findings.wants_colour()))
    return 0 if findings.host_works(found) else 1


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; wanted a positive number of seconds")
    return seconds
