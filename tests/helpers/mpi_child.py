"""The rank's side of the multi-rank tests: pytest inside an mpirun job that `helpers.mpi_jobs` started.

Each rank runs the tests it was told, in step with the others (a barrier after each), and writes what happens to
a file of its own: a JSON line when a test starts, one for each report, one when the test is done on this rank.
Standard output and error go to another file, not into pytest's memory, so that they survive a crash.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from epcomm.bootstrap import Communicator, as_communicator

# Names the job's folder, and by that tells pytest that it is a rank.
JOB_VARIABLE = "EPCOMM_TEST_JOB"


def timeout_of(item: pytest.Item) -> float:
    """Seconds a ranks test may take."""
    marker = item.get_closest_marker("ranks")
    return float(marker.kwargs.get("timeout", 120.0)) if marker else 120.0


class RankPlugin:
    """Runs the job's tests on this rank and writes the record of it."""

    def __init__(self, job: Path) -> None:
        from mpi4py import MPI

        # A duplicate: what the tests do on the world must not meet the barrier between them.
        self._world = MPI.COMM_WORLD.Dup()
        rank = self._world.Get_rank()
        self._tests: list[str] = json.loads((job / "tests.json").read_text())
        self._record = (job / f"rank{rank}.jsonl").open("a")
        self._stacks = (job / f"rank{rank}.stacks").open("a")
        self._output = (job / f"rank{rank}.out").open("a")
        self._basetemp = job / f"rank{rank}.tmp"
        self._config: pytest.Config | None = None

    def configure(self, config: pytest.Config) -> None:
        """Redirect this process's output, and give this rank its own temporary folder."""
        self._config = config
        config.option.basetemp = str(self._basetemp)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(self._output.fileno(), stream.fileno())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_id = {item.nodeid: item for item in items}
        items[:] = [by_id[nodeid] for nodeid in self._tests]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        failed_before = item.session.testsfailed
        self._write(start=item.nodeid, output=os.fstat(self._output.fileno()).st_size)
        # A hung rank shows where it is, and the parent then ends the job.
        faulthandler.dump_traceback_later(timeout_of(item), file=self._stacks)
        result = yield
        faulthandler.cancel_dump_traceback_later()
        if item.session.testsfailed == failed_before:
            self._write(done=item.nodeid)
            self._world.Barrier()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self._config is not None
        self._write(report=self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            sys.stderr.write(f"{report.longreprtext}\n")

    def _write(self, **fields: Any) -> None:
        self._record.write(json.dumps(fields) + "\n")
        self._record.flush()


@pytest.fixture
def comm() -> Communicator:
    """All ranks of the job."""
    if JOB_VARIABLE not in os.environ:
        pytest.fail("the comm fixture needs @pytest.mark.ranks(n)", pytrace=False)
    return as_communicator(None)


@pytest.fixture
def num_ranks(comm: Communicator) -> int:
    """Number of ranks of the job."""
    return comm.size
