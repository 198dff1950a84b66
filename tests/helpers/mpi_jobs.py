"""Multi-rank tests: ``@pytest.mark.ranks(4)`` runs a test on 4 MPI ranks.

Pytest itself stays one serial process that never loads MPI. When it comes to the first ranks test of a file, all
selected tests of that file with the same number of ranks run in **one** job

    mpirun -n N python -m mpi4py -m pytest -x FILE

whose ranks (`helpers.mpi_child`) write records that become the reports of those tests here, one by one. A test that
fails, crashes or hangs on any rank ends its job; the tests after it get a new one. ``ranks(n, isolated=True)`` gives a
test a job of its own; ``ranks((1, 2, 4), slow=(4,))`` makes one test for each number, and marks those of `slow` as
slow; ``ranks(n, env={...})`` changes the environment of its job. The ranks of tests marked ``gpu`` run under MPS
(`helpers.gpu.MpsService`).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers.gpu import MpsService
from helpers.mpi_child import JOB_VARIABLE, RankPlugin, timeout_of

from epcomm.bootstrap import launcher
from epcomm.errors import MpiMissing

# Seconds a job may take to start its first test, and to end after its last.
START_LIMIT_S, END_LIMIT_S = 120.0, 30.0
# Seconds a job goes on after a test failed (its other ranks may be waiting for the one that failed), and after
# a test's time was up (the ranks write their stacks then).
FAILURE_GRACE_S = 2.0
POLL_S = 0.02

SERVICE = pytest.StashKey[MpsService]()


def register(config: pytest.Config) -> None:
    """Add the plugin for this process's part: the serial parent, or one rank of a job."""
    config.addinivalue_line(
        "markers", "ranks(n, timeout=120, isolated=False, slow=(), env=None): run the test on n MPI ranks"
    )
    config.addinivalue_line("markers", "gpu: the ranks that the test starts use GPUs, which they may share")
    job = os.environ.get(JOB_VARIABLE)
    if job is None:
        service = config.stash[SERVICE] = MpsService()
        config.add_cleanup(service.stop)
        config.pluginmanager.register(ParentPlugin(config), "epcomm-ranks")
    else:
        rank = RankPlugin(Path(job))
        rank.configure(config)
        config.pluginmanager.register(rank, "epcomm-ranks")
    config.pluginmanager.register(_Parametrize(), "epcomm-ranks-parametrize")


@dataclass
class RankRecord:
    """What one rank wrote about its tests."""

    started: dict[str, int] = field(default_factory=dict)  # test -> size of the output when it started
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    output: str = ""
    stacks: str = ""

    @classmethod
    def read(cls, job: Path, rank: int) -> RankRecord:
        record = cls()
        for line in _text(job / f"rank{rank}.jsonl").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # still being written
            entry = json.loads(line)
            if "start" in entry:
                record.started[entry["start"]] = entry["output"]
            elif "done" in entry:
                record.done.add(entry["done"])
            else:
                record.reports.setdefault(entry["report"]["nodeid"], []).append(entry["report"])
        record.output, record.stacks = _text(job / f"rank{rank}.out"), _text(job / f"rank{rank}.stacks")
        return record

    def failed(self, nodeid: str) -> bool:
        return any(report["outcome"] == "failed" for report in self.reports.get(nodeid, ()))

    def output_of(self, nodeid: str) -> str:
        starts = sorted(self.started.values())
        first = self.started.get(nodeid, 0)
        return self.output[first : next((s for s in starts if s > first), len(self.output))]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: a sentence, whether that was orderly, what mpirun printed, and the ranks' records."""

    story: str
    is_clean: bool
    console: str
    ranks: list[RankRecord]


class ParentPlugin:
    """Runs the jobs and reports their tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results: dict[str, list[pytest.TestReport]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.get_closest_marker("ranks") is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        while item.nodeid not in self._results:
            group = [
                other
                for other in item.session.items
                if _group_of(other) == _group_of(item) and other.nodeid not in self._results
            ]
            self._run(group)
        for report in self._results[item.nodeid]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # What an earlier serial test of this file set up (module fixtures) ends with the file as usual.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def _run(self, items: Sequence[pytest.Item]) -> None:
        """Run one job; afterwards at least the first of `items` has its result."""
        try:
            with tempfile.TemporaryDirectory(prefix="epcomm-test-") as folder:
                end = run_job(self._config, items, Path(folder))
        except MpiMissing as missing:
            self._results.update({item.nodeid: [_failure(item, str(missing))] for item in items})
            return
        if not any(record.started for record in end.ranks):
            self._results.update({item.nodeid: [_failure(item, _post_mortem(item, end))] for item in items})
            return
        for item in items:
            failing = [rank for rank, record in enumerate(end.ranks) if record.failed(item.nodeid)]
            is_done = all(item.nodeid in record.done for record in end.ranks)
            is_culprit = bool(failing) or not is_done or (item is items[-1] and not end.is_clean)
            if failing:
                self._results[item.nodeid] = self._reports(item, end, failing[0])
            elif is_culprit:
                self._results[item.nodeid] = [_failure(item, _post_mortem(item, end))]
            else:
                skipping = [r for r, record in enumerate(end.ranks) if _is_skipped(record, item.nodeid)]
                self._results[item.nodeid] = self._reports(item, end, skipping[0] if skipping else 0)
            if is_culprit:
                return  # the tests after it did not run, or not to their end

    def _reports(self, item: pytest.Item, end: JobEnd, rank: int) -> list[pytest.TestReport]:
        """The reports of one rank, with the output of all."""
        reports = []
        for data in end.ranks[rank].reports[item.nodeid]:
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            if isinstance(report.longrepr, list):  # a skip's (path, line, reason), which JSON made a list
                report.longrepr = tuple(report.longrepr)
            if report.failed:
                where = (f"failed on rank {rank} of {len(end.ranks)}", "")
                report.sections = [where, *report.sections, *_outputs(item, end)]
            reports.append(report)
        return reports


class _Parametrize:
    """``ranks((1, 2, 4))`` is one test for each number of ranks."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        marker = metafunc.definition.get_closest_marker("ranks")
        if marker is not None and isinstance(marker.args[0], tuple):
            if "num_ranks" not in metafunc.fixturenames:
                metafunc.fixturenames.append("num_ranks")
            slow = marker.kwargs.get("slow", ())
            sizes = [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in marker.args[0]]
            metafunc.parametrize("num_ranks", sizes, ids=lambda n: f"np{n}")


def run_job(config: pytest.Config, items: Sequence[pytest.Item], folder: Path) -> JobEnd:
    """Run `items` (of one file, with one number of ranks) in one mpirun job."""
    size = _num_ranks(items[0])
    (folder / "tests.json").write_text(json.dumps([item.nodeid for item in items]))
    service = _service_of(items[0])
    environment = {
        **_environment_of(items[0]),
        **(service.environment() if service else {}),
        **_rank_environment(folder),
    }
    with (folder / "console").open("wb") as console:
        process = launcher.start_ranks(size, _pytest_command(config, items[0].path), env=environment, output=console)
        try:
            story = _watch(process, folder, size, {item.nodeid: timeout_of(item) for item in items})
        finally:
            launcher.stop_ranks(process)
    is_clean = story is None and process.returncode == 0
    if service is not None and not is_clean:
        service.stop()
    return JobEnd(
        story or f"the job of {size} ranks ended with return code {process.returncode}",
        is_clean,
        _text(folder / "console"),
        [RankRecord.read(folder, rank) for rank in range(size)],
    )


def _watch(process: subprocess.Popen[bytes], folder: Path, size: int, limits: dict[str, float]) -> str | None:
    """Wait for the job's end; the reason why it has to be ended, if so."""
    seen_bytes, deadline, reason = -1, time.monotonic() + START_LIMIT_S, "it did not start its first test"
    current: str | None = None
    while True:
        try:
            process.wait(POLL_S)
            return None
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > deadline:
            return f"the job of {size} ranks was killed: {reason}"
        paths = [folder / f"rank{rank}.jsonl" for rank in range(size)]
        num_bytes = sum(path.stat().st_size for path in paths if path.exists())
        if num_bytes == seen_bytes or num_bytes == 0:
            continue
        seen_bytes = num_bytes
        records = [RankRecord.read(folder, rank) for rank in range(size)]
        started = [test for test in limits if any(test in record.started for record in records)]
        if any(record.failed(test) for record in records for test in limits):
            deadline = min(deadline, time.monotonic() + FAILURE_GRACE_S)
            reason = "a test failed and the other ranks did not end"
        elif all(len(record.done) == len(limits) for record in records):
            deadline, reason = time.monotonic() + END_LIMIT_S, "it did not end after its last test"
        elif started and started[-1] != current:
            current = started[-1]
            deadline = time.monotonic() + limits[current] + FAILURE_GRACE_S
            reason = f"{current} took more than {limits[current]:g} s"


def _pytest_command(config: pytest.Config, path: Path) -> list[str]:
    command = [sys.executable, "-m", "mpi4py", "-m", "pytest", str(path), "-x", f"--rootdir={config.rootpath}"]
    # Output goes to files (see mpi_child); addopts may hold options of plugins that are not loaded here.
    command += ["-s", "-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts="]
    command += [f"--import-mode={config.getoption('importmode')}"]
    if config.inipath is not None:
        command += ["-c", str(config.inipath)]
    return command


def _rank_environment(folder: Path) -> dict[str, str]:
    """The ranks import what this process imports, and nothing from their working folder."""
    import_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {
        JOB_VARIABLE: str(folder),
        "PYTHONPATH": import_path,
        "PYTHONSAFEPATH": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "PYTHONDONTWRITEBYTECODE": "",  # see conftest.py
    }


def _num_ranks(item: pytest.Item) -> int:
    marker = item.get_closest_marker("ranks")
    assert marker is not None
    if isinstance(marker.args[0], tuple):
        return int(item.callspec.params["num_ranks"])
    return int(marker.args[0])


def _environment_of(item: pytest.Item) -> dict[str, str]:
    """Changes to the environment of the item's job."""
    marker = item.get_closest_marker("ranks")
    return dict((marker and marker.kwargs.get("env")) or {})


def _service_of(item: pytest.Item) -> MpsService | None:
    """MPS, if the ranks that `item` starts use GPUs."""
    return item.config.stash[SERVICE] if item.get_closest_marker("gpu") else None


def _group_of(item: pytest.Item) -> tuple[object, ...] | None:
    """Tests of one group may share a job."""
    marker = item.get_closest_marker("ranks")
    if marker is None:
        return None
    alone = item.nodeid if marker.kwargs.get("isolated") else ""
    return item.path, _num_ranks(item), alone, _environment_of(item).items(), _service_of(item) is None


def _failure(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call", user_properties=[]
    )


def _post_mortem(item: pytest.Item, end: JobEnd) -> str:
    """Why a test that no rank reported as failed did fail."""
    lines = [end.story]
    for rank, record in enumerate(end.ranks):
        state = (
            "had finished"
            if item.nodeid in record.done
            else "was in"
            if item.nodeid in record.started
            else "was not in"
        )
        lines.append(f"rank {rank} {state} {item.nodeid}")
    for rank, record in enumerate(end.ranks):
        if record.stacks:
            lines.append(f"---- stacks of rank {rank} ----\n{_without_pytest(record.stacks)}")
    lines += [f"---- {title} ----\n{text}" for title, text in _outputs(item, end)]
    return "\n".join(lines)


def _without_pytest(stacks: str) -> str:
    """Stacks as far as they are the test's; below are pytest's and runpy's own frames."""
    lines, is_inside = [], False
    for line in stacks.splitlines():
        is_inside = (is_inside or "/_pytest/python.py" in line) and line.startswith("  File")
        if not is_inside:
            lines.append(line)
    return "\n".join(lines)


def _outputs(item: pytest.Item, end: JobEnd) -> list[tuple[str, str]]:
    by_rank = [(f"output of rank {r}", record.output_of(item.nodeid)) for r, record in enumerate(end.ranks)]
    return [(title, text) for title, text in [*by_rank, ("output of mpirun", end.console)] if text.strip()]


def _is_skipped(record: RankRecord, nodeid: str) -> bool:
    return any(report["outcome"] == "skipped" for report in record.reports.get(nodeid, ()))


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.fixture
def run_ranks(request: pytest.FixtureRequest) -> Callable[..., tuple[int, str]]:
    """``run_ranks(n, command, timeout_s=60, env=None) -> (return code, output)``: a whole job, which may fail."""

    def run(n: int, command: Sequence[str], *, timeout_s: float = 60.0, env: dict[str, str] | None = None) -> Any:
        service = _service_of(request.node)
        import_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = {"PYTHONPATH": import_path, **(service.environment() if service else {}), **(env or {})}
        returncode, output = launcher.run_ranks(n, command, timeout_s=timeout_s, env=environment, capture=True)
        if service is not None and returncode != 0:
            service.stop()
        if returncode == launcher.TIMED_OUT:
            pytest.fail(f"{shlex.join(command)} on {n} ranks\n{output}", pytrace=False)
        return returncode, output

    return run
