"""The bench on GPUs: arrays of CuPy, times of CUDA events.

::

    data.py          rows that any rank can make for any token of any rank
    checks.py        what every rank must have received and summed, bit by bit
    calls.py         the measured operations
    timing.py        chains of calls, events, Python's time, the GPU's copy speed
    construction.py  how long a Buffer takes to construct, in a process of its own
    run.py           check, measure, check again
    report.py        the table, the JSON lines
    low_latency.py, low_latency_run.py   the same for low latency
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator
    from epcomm.cli.bench.case import Case

__all__ = ["main"]


def main(comm: Communicator, case: Case) -> int:
    """Run it and print the result on rank 0. Collective, blocks the host. The exit status, the same on all ranks."""
    if case.mode == "low-latency":
        from epcomm.cli.bench.cuda import low_latency_run

        low = low_latency_run.run_low_latency(comm, case)
        return _tell(
            comm,
            case,
            low.differences,
            lambda: low_latency_run.to_text(case, low),
            lambda: low_latency_run.to_json_lines(case, low),
        )
    from epcomm.cli.bench.cuda.report import to_json_lines, to_text
    from epcomm.cli.bench.cuda.run import run

    result = run(comm, case)
    return _tell(comm, case, result.differences, lambda: to_text(case, result), lambda: to_json_lines(case, result))


def _tell(
    comm: Communicator,
    case: Case,
    differences: Sequence[str],
    to_text: Callable[[], str],
    to_json_lines: Callable[[], list[str]],
) -> int:
    if comm.rank == 0:
        for difference in differences:
            print(f"epcomm bench: {difference}", file=sys.stderr)
        if differences:
            print("epcomm bench: the results are wrong; no times", file=sys.stderr)
        else:
            print(to_text(), flush=True)
            if case.json is not None:
                Path(case.json).write_text("".join(f"{line}\n" for line in to_json_lines()))
    return 1 if differences else 0
