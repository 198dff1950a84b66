"""``epcomm bench``: times of dispatch and combine, checked bit by bit before they are measured.

::

    case.py          parameters and data
    measure.py       comparison with the reference; interleaved timing
    throughput.py    beside a bare Alltoallv of the same bytes
    low_latency.py
    links.py         which links the rows cross, counted from the routing
    report.py        the table, the JSON lines
    links_report.py  bytes between and within nodes, floors of link rates
    suite.py         tests and tables of all sizes, in one report
    cuda/            both modes on GPUs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epcomm.cli import job
from epcomm.errors import InputError

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator
    from epcomm.cli.bench.case import Case

__all__ = ["add_parser", "main"]

_DESCRIPTION = """\
Measures dispatch and combine of a Buffer. First every result is compared bit by bit with epcomm.reference; a difference
ends the run with status 1 and no times. Then all operations run in turn: throughput mode beside a bare mpi4py Alltoallv
of the same bytes, low-latency mode with bfloat16 and fp8 rows. On the CUDA backend every row of every rank is compared
on the GPU, and times are those of CUDA events. Starts its own ranks, or takes part in the job it finds itself in.
"""

# (tokens, hidden, experts): decode batches are small, and a CPU has not all day.
_DEFAULTS = {
    ("throughput", "host"): (512, 1024, 64),
    ("throughput", "cuda"): (4096, 7168, 256),
    ("low-latency", "host"): (128, 1024, 64),
    ("low-latency", "cuda"): (128, 7168, 256),
}
_MODES = ("throughput", "low-latency")
_MAX_TOPK = 32


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``bench`` to the sub-commands of ``epcomm``."""
    parser = subparsers.add_parser("bench", help="measure dispatch and combine", description=_DESCRIPTION)
    job.add_arguments(parser)
    parser.add_argument("--mode", choices=_MODES, default="throughput", help="(default: throughput)")
    parser.add_argument(
        "--tokens", type=int, metavar="T", help="tokens of a rank (default: 512; CUDA: 4096; low latency: 128)"
    )
    parser.add_argument("--hidden", type=int, metavar="H", help="channels of a row (default: 1024; CUDA: 7168)")
    parser.add_argument("--topk", type=int, default=8, metavar="K", help="experts of a token (default: 8)")
    parser.add_argument("--experts", type=int, metavar="E", help="experts of all ranks (default: 64; CUDA: 256)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32", "fp8"), help="rows of the throughput mode (default: bf16)"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="make virtual nodes of N ranks; for several nodes the bytes between and within them are told apart",
    )
    for name, link in (("--nic-gbs", "NIC"), ("--nvlink-gbs", "NVLinks")):
        text = f"of the {link} of one GPU, each way, as in epcomm plan; floors of these links are told"
        parser.add_argument(name, type=float, metavar="GB/S", help=text)
    parser.add_argument(
        "--routing", choices=("uniform", "zipf", "grouped"), default="uniform", help="(default: uniform)"
    )
    parser.add_argument("--sms", metavar="N[,N...]", help="CUDA: SMs of an operation (default: the Buffer's)")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="measured calls (default: 50)")
    parser.add_argument("--json", metavar="FILE", help="also write one JSON object a measured row")
    parser.add_argument(
        "--report",
        action="store_true",
        help="CUDA: the tests, then tables of all sizes, in at most 9 minutes; a rank for each GPU. "
        "Of the other options --ranks, --repeats and --json have a meaning",
    )
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the bench; 0 when the results were right."""
    if args.report:
        from epcomm.cli.bench import suite

        return suite.main(args)
    del args.report  # the ranks are started with the other options
    return job.run("bench", args, _prepare, _program)


def _prepare(args: argparse.Namespace, num_ranks: int) -> Case:
    from epcomm.cli.bench.case import Case
    from epcomm.cli.plan import check_rates

    backend = job.backend_here(args.backend)
    tokens, hidden, experts = (
        default if given is None else given
        for given, default in zip((args.tokens, args.hidden, args.experts), _DEFAULTS[args.mode, backend], strict=True)
    )
    _check_sizes(args, num_ranks, tokens, experts)
    if args.mode == "low-latency" and args.dtype not in (None, "bf16"):
        raise InputError("--dtype", got=args.dtype, wanted="bf16", do="low-latency mode measures bf16 and fp8")
    dtype = args.dtype or "bf16"
    channels = {"fp8": 128, "fp32": 4}.get(dtype, 8)
    if hidden < 1 or hidden % channels:
        raise InputError("--hidden", got=hidden, wanted=f"a multiple of {channels} for {dtype}")
    check_rates(args, "nic_gbs", "nvlink_gbs")
    if args.json is not None:
        job.check_output_file("--json", args.json)
    return Case(
        mode=args.mode,
        backend=backend,
        ranks=num_ranks,
        ranks_per_node=args.ranks_per_node,
        tokens=tokens,
        hidden=hidden,
        topk=args.topk,
        experts=experts,
        dtype=dtype,
        routing=args.routing,
        repeats=args.repeats,
        json=args.json,
        sms=_parse_sms(args.sms, backend),
        nic_gbs=args.nic_gbs,
        nvlink_gbs=args.nvlink_gbs,
    )


def _check_sizes(args: argparse.Namespace, num_ranks: int, tokens: int, experts: int) -> None:
    for name, value in (("--tokens", tokens), ("--repeats", args.repeats)):
        if value < 1:
            raise InputError(name, got=value, wanted="at least 1")
    if experts < 1 or experts % num_ranks:
        raise InputError("--experts", got=experts, wanted=f"a multiple of the {num_ranks} ranks")
    if not 1 <= args.topk <= min(experts, _MAX_TOPK):
        limit = f"1 to {min(experts, _MAX_TOPK)}"
        raise InputError("--topk", got=args.topk, wanted=f"{limit} for {experts} experts")
    if args.ranks_per_node is not None and (args.ranks_per_node < 1 or num_ranks % args.ranks_per_node):
        raise InputError("--ranks-per-node", got=args.ranks_per_node, wanted=f"a divisor of the {num_ranks} ranks")


def _parse_sms(text: str | None, backend: str) -> tuple[int, ...]:
    if text is None:
        return ()
    if backend != "cuda":
        raise InputError("--sms", got=text, wanted="none with the host backend")
    try:
        sms = tuple(int(number) for number in text.split(","))
    except ValueError:
        sms = ()
    if not sms or min(sms) < 1:
        raise InputError("--sms", got=text, wanted="numbers of at least 1, with commas between them")
    return sms


def _program(comm: Communicator, case: Case) -> int:
    from epcomm.bootstrap import discover

    case = case.on_nodes(discover(comm, case.ranks_per_node))
    if case.backend == "cuda":
        from epcomm.cli.bench import cuda

        return cuda.main(comm, case)
    from epcomm.cli.bench import report
    from epcomm.cli.bench.low_latency import run_low_latency
    from epcomm.cli.bench.throughput import run_throughput

    result = (run_throughput if case.mode == "throughput" else run_low_latency)(comm, case)
    if comm.rank == 0:
        for difference in result.differences:
            print(f"epcomm bench: {difference}; nothing was measured", file=sys.stderr)
        if not result.differences:
            print(report.to_text(case, result), flush=True)
            if case.json is not None:
                Path(case.json).write_text("".join(f"{line}\n" for line in report.to_json_lines(case, result)))
    return 1 if result.differences else 0
