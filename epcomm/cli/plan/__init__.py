"""``epcomm plan``: what dispatch and combine move between N nodes, and how long the links take at least.

::

    routing.py       expected rows: how often a token meets a rank and a node
    messages.py      bytes and NIC operations of a rank that moves given rows, by the messages of the kernels
    traffic.py       those of a job, in expectation
    times.py         times on the links, and which of them decides
    buffers.py       num_nvl_bytes and num_rdma_bytes
    report.py        the tables, the JSON lines

Nothing is measured here, and nothing of it is needed: neither GPU nor MPI. ``docs/cluster.md`` has the formulas, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epcomm.errors import InputError

if TYPE_CHECKING:
    from epcomm.cli.plan.times import Links
    from epcomm.cli.plan.traffic import Job

__all__ = ["DEFAULT_NODES", "add_parser", "check_rates", "main"]

DEFAULT_NODES = (2, 4, 8, 16, 32, 64, 128, 256)
_MAX_NODES = 4096  # beyond that it is a slip of the hand
_MAX_GPUS = 31  # a lane of a warp each, and one at least for the other nodes
_MAX_TOPK = 32

_DESCRIPTION = """\
Predicts throughput-mode dispatch and combine over several nodes: rows that cross the network (once for each token and
other node) and rows over NVLink, the bytes of both, what each link takes for them, which one decides, and buffer sizes.
Uniform routing: every set of experts equally likely; with --node-limit M, experts have random scores, and a token takes
the best ones of the M nodes whose best expert scores highest. Measures nothing; --nic-us, --nvlink-us and --nic-mops
are assumptions, to be replaced by what your machine does.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``plan`` to the sub-commands of ``epcomm``."""
    parser = subparsers.add_parser("plan", help="predict traffic and times on several nodes", description=_DESCRIPTION)
    parser.add_argument(
        "--nodes", metavar="N[,N...]", help=f"numbers of nodes (default: {','.join(map(str, DEFAULT_NODES))})"
    )
    integer, number = {"type": int}, {"type": float}
    for name, kind, default, metavar, text in (
        ("--gpus", integer, 8, "L", "GPUs of a node, a rank each"),
        ("--tokens", integer, 4096, "T", "tokens of a rank"),
        ("--hidden", integer, 7168, "H", "channels of a row"),
        ("--topk", integer, 8, "K", "experts of a token"),
        ("--experts", integer, 256, "E", "experts of all ranks; rounded up to a multiple of the ranks"),
        ("--nic-gbs", number, 50.0, "GB/S", "of the NIC of one GPU, each way"),
        ("--nvlink-gbs", number, 370.0, "GB/S", "of the NVLinks of one GPU, each way"),
        ("--nic-mops", number, 100.0, "M", "million puts and signals a second that the NIC of one GPU sends"),
        ("--nic-us", number, 5.0, "US", "microseconds from a put to its sight at another node"),
        ("--nvlink-us", number, 2.0, "US", "microseconds from a store to its sight at another GPU"),
    ):
        parser.add_argument(name, **kind, default=default, metavar=metavar, help=f"{text} (default: {default:g})")
    parser.add_argument(
        "--node-limit", type=int, metavar="M", help="most nodes on which a token has experts: a gate with groups"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp8"), default="bf16", help="rows of dispatch; combine: bf16 (default: bf16)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write one JSON object a node count and operation")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Print the plan; 0, or 2 after wrong options."""
    from epcomm.cli import EXIT_USAGE, job
    from epcomm.cli.plan import report
    from epcomm.cli.plan.times import predict

    try:
        if args.json is not None:
            job.check_output_file("--json", args.json)
        jobs, links = _jobs(args), _links(args)
    except InputError as error:
        print(f"epcomm plan: {error}", file=sys.stderr)
        return EXIT_USAGE
    plans = [predict(each, links) for each in jobs]
    one_node = predict(jobs[0].with_nodes(1), links)
    print(report.to_text(plans, one_node, links))
    if args.json is not None:
        Path(args.json).write_text("".join(f"{line}\n" for line in report.to_json_lines(plans, one_node, links)))
    return 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    """One for each number of nodes.

    Raises:
        InputError: sizes that epcomm does not take, or a node limit that leaves a token too few experts.
    """
    from epcomm.cli.plan.traffic import Job

    for name, value in (("--tokens", args.tokens), ("--experts", args.experts)):
        if value < 1:
            raise InputError(name, got=value, wanted="at least 1")
    for name, value, most in (("--gpus", args.gpus, _MAX_GPUS), ("--topk", args.topk, min(_MAX_TOPK, args.experts))):
        if not 1 <= value <= most:
            raise InputError(name, got=value, wanted=f"1 to {most}")
    channels = {"fp8": 128, "bf16": 8}[args.dtype]
    if args.hidden < 1 or args.hidden % channels:
        raise InputError("--hidden", got=args.hidden, wanted=f"a multiple of {channels} for {args.dtype}")
    sizes = args.gpus, args.tokens, args.hidden, args.topk, args.experts, args.dtype
    jobs = [Job(nodes, *sizes, args.node_limit) for nodes in _node_counts(args.nodes)]
    for job in jobs:
        _check_node_limit(job)
    return jobs


def _check_node_limit(job: Job) -> None:
    """Raise InputError where so few nodes have fewer experts than a token takes."""
    of_node = job.experts // job.num_nodes
    least = -(-job.topk // of_node)
    if job.node_limit is not None and job.node_limit < least:
        wanted = f"{least} or more: {job.num_nodes} nodes have {of_node} experts each, a token has {job.topk}"
        raise InputError("--node-limit", got=job.node_limit, wanted=wanted)


def _node_counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return DEFAULT_NODES
    try:
        counts = tuple(int(number) for number in text.split(","))
    except ValueError:
        counts = ()
    if not counts or not all(1 <= count <= _MAX_NODES for count in counts):
        raise InputError("--nodes", got=text, wanted=f"numbers from 1 to {_MAX_NODES}, with commas between them")
    return counts


def check_rates(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless those of these options that are given can be rates."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')}", got=value, wanted="more than 0")


def _links(args: argparse.Namespace) -> Links:
    from epcomm.cli.plan.times import Links

    check_rates(args, "nic_gbs", "nvlink_gbs", "nic_mops")
    for name in ("nic_us", "nvlink_us"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')}", got=value, wanted="0 or more")
    return Links(args.nic_gbs, args.nvlink_gbs, args.nic_mops, args.nic_us, args.nvlink_us)
