"""The throughput mode of the bench on GPUs: arrays of CuPy, times of CUDA events.

::

    data.py          rows that any rank can make for any token of any rank
    checks.py        what every rank must have received and summed, bit by bit
    calls.py         the measured operations
    timing.py        chains of calls, events, Python's time, the GPU's copy speed
    construction.py  how long a Buffer takes to construct, in a process of its own
    run.py           check, measure, check again
    report.py        the table, the JSON lines
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator
    from epcomm.cli.bench.case import Case

__all__ = ["main"]


def main(comm: Communicator, case: Case) -> int:
    """Run it and print the result on rank 0. Collective, blocks the host. The exit status, the same on all ranks."""
    from epcomm.cli.bench.cuda.report import to_json_lines, to_text
    from epcomm.cli.bench.cuda.run import run

    result = run(comm, case)
    if comm.rank == 0:
        for difference in result.differences:
            print(f"epcomm bench: {difference}", file=sys.stderr)
        if result.differences:
            print("epcomm bench: the results are wrong; no times", file=sys.stderr)
        else:
            print(to_text(case, result), flush=True)
            if case.json is not None:
                Path(case.json).write_text("".join(f"{line}\n" for line in to_json_lines(case, result)))
    return 1 if result.differences else 0
