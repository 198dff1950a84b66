"""The multi-rank test plugin, by running pytest on small test files that pass, fail, hang, crash and skip."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from epcomm import env

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

HEAD = """
import os, signal, sys, threading
import pytest
JOBS = {jobs!r}

def note_job(comm, name):
    if comm.rank == 0:
        with open(JOBS, "a") as file:
            print(name, os.getppid(), file=file)
"""


class Project:
    """A test project in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, folder / "jobs.txt"
        (folder / "tests").mkdir()
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
        (folder / "tests" / "conftest.py").write_text(
            f"import importlib.util, sys\nsys.path.append({str(TESTS)!r})\n"
            f"spec = importlib.util.spec_from_file_location('shared_conftest', {str(TESTS / 'conftest.py')!r})\n"
            "shared = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(shared)\n"
            "pytest_configure, comm, num_ranks, run_ranks = "
            "shared.pytest_configure, shared.comm, shared.num_ranks, shared.run_ranks\n"
        )

    def run(self, body: str, *arguments: str, cwd: Path | None = None, **changes: str) -> tuple[dict[str, str], str]:
        """({test: outcome}, output) of pytest on a file with `body`."""
        (self.folder / "tests" / "test_it.py").write_text(HEAD.format(jobs=str(self.jobs)) + body)
        command = [sys.executable, "-m", "pytest", "-rA", "--import-mode=importlib", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *(arguments or (str(self.folder / "tests"),))],
            cwd=cwd or self.folder,
            env=env.child_environment({"PYTHONPATH": ":".join(sys.path), **changes}),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        found = re.findall(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) \S+?::(\S+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return {name: outcome.lower() for outcome, name in found}, done.stdout + done.stderr

    def num_jobs(self) -> int:
        """Number of different mpirun jobs in which tests noted themselves."""
        return len({line.split()[1] for line in self.jobs.read_text().splitlines()})


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_passing_tests_of_a_file_share_one_job_for_each_number_of_ranks(project):
    outcomes, output = project.run("""
@pytest.mark.ranks((1, 2))
def test_many(comm, num_ranks, tmp_path):
    note_job(comm, "many")
    assert comm.size == num_ranks
    assert len(set(comm.allgather(str(tmp_path)))) == num_ranks

@pytest.fixture(scope="module")
def serial_module_fixture():
    yield
    print("module teardown")

def test_serial(serial_module_fixture):
    assert "mpi4py" not in sys.modules

@pytest.mark.ranks(2)
@pytest.mark.parametrize("text", ["plain", "a::b"])
def test_parameters(comm, text):
    note_job(comm, text)

@pytest.mark.ranks(2, isolated=True)
def test_alone(comm):
    note_job(comm, "alone")
""")
    names = ["test_many[np1]", "test_many[np2]", "test_serial", "test_parameters[plain]", "test_parameters[a::b]"]
    assert outcomes == dict.fromkeys([*names, "test_alone"], "passed"), output
    assert project.num_jobs() == 3


def test_jobs_with_an_environment_of_their_own(project):
    outcomes, output = project.run("""
@pytest.mark.ranks(2)
def test_plain(comm):
    note_job(comm, "plain")
    assert "SOME_SETTING" not in os.environ

@pytest.mark.ranks(2, env={"SOME_SETTING": "1"})
@pytest.mark.parametrize("number", [1, 2])
def test_with_a_setting(comm, number):
    note_job(comm, number)
    assert os.environ["SOME_SETTING"] == "1"
""")
    names = ["test_plain", "test_with_a_setting[1]", "test_with_a_setting[2]"]
    assert outcomes == dict.fromkeys(names, "passed"), output
    assert project.num_jobs() == 2


GPU_JOBS = """
from helpers import mpi_jobs

class Service:
    num_starts = 0
    def environment(self):
        Service.num_starts += 1
        return {"MPS_NUMBER": str(Service.num_starts)}
    def stop(self):
        print("stopped", Service.num_starts)

def test_before(request):
    request.config.stash[mpi_jobs.SERVICE] = Service()

@pytest.mark.ranks(2)
def test_without(comm):
    assert "MPS_NUMBER" not in os.environ

@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_with(comm):
    assert os.environ["MPS_NUMBER"] == "1"

@pytest.mark.gpu
@pytest.mark.ranks(1)
def test_fails(comm):
    assert os.environ["MPS_NUMBER"] == "never"

@pytest.mark.gpu
def test_whole_job(run_ranks, capsys):
    with capsys.disabled():
        assert run_ranks(1, [sys.executable, "-c", "import os; print(os.environ['MPS_NUMBER'])"]) == (0, "3\\n")
"""


def test_ranks_that_use_gpus_get_mps(project):
    """And a new one after a job that ended badly."""
    outcomes, output = project.run(GPU_JOBS, "-s", str(project.folder / "tests"))
    wanted = {"test_before": "passed", "test_without": "passed", "test_with": "passed", "test_fails": "failed"}
    assert outcomes == {**wanted, "test_whole_job": "passed"}, output
    assert output.count("stopped") == 1, output
    assert "stopped 2" in output


def test_a_failure_a_crash_and_a_hang_take_no_other_test_with_them(project):
    outcomes, output = project.run("""
pytestmark = pytest.mark.ranks(2)

def test_before(comm):
    note_job(comm, "before")

def test_fails_on_rank_1(comm):
    print("seen on", comm.rank)
    assert comm.rank == 0, "the assertion"
    comm.barrier()

def test_crashes(comm):
    print("last words of", comm.rank)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()

@pytest.mark.ranks(2, timeout=0.5)
def test_hangs(comm):
    if comm.rank == 0:
        threading.Event().wait()
    comm.barrier()

@pytest.fixture
def collective_teardown(comm):
    yield
    comm.barrier()

def test_fails_before_a_collective_teardown(collective_teardown, comm):
    assert comm.rank == 1, "only rank 0"
    comm.barrier()

def test_exits_badly(comm):
    if comm.rank == 1:
        os._exit(0)

def test_after(comm):
    note_job(comm, "after")
""")
    assert outcomes == {
        "test_before": "passed",
        "test_fails_on_rank_1": "failed",
        "test_crashes": "failed",
        "test_hangs": "failed",
        "test_fails_before_a_collective_teardown": "failed",
        "test_exits_badly": "failed",
        "test_after": "passed",
    }, output
    assert "AssertionError: the assertion" in output
    assert "failed on rank 1 of 2" in output
    assert "seen on 0" in output
    assert "last words of 1" in output
    assert "test_hangs took more than 0.5 s" in output
    stacks = output[output.index("---- stacks of rank 0 ----") :]
    assert re.search(r"threading.py.* in wait\n.*test_it.py.* in test_hangs", stacks)
    assert project.num_jobs() == 2


def test_skips_and_expected_failures_are_reported_as_such(project):
    outcomes, output = project.run("""
pytestmark = pytest.mark.ranks(2)

@pytest.mark.skip(reason="by a mark")
def test_skip_mark(comm): ...

def test_skip_call(comm):
    pytest.skip("by a call")

@pytest.mark.xfail(reason="known")
def test_xfail(comm):
    raise ValueError

@pytest.mark.xfail(strict=True)
def test_xpass(comm): ...

def test_last(comm): ...
""")
    assert outcomes == {"test_xfail": "xfail", "test_xpass": "failed", "test_last": "passed"}, output
    assert re.search(r"SKIPPED \[1\] .*: by a mark", output)
    assert re.search(r"SKIPPED \[1\] .*: by a call", output)
    assert "1 failed, 1 passed, 2 skipped, 1 xfailed" in output


SELECT = """
@pytest.mark.slow
@pytest.mark.ranks((1, 2))
def test_one(comm): ...

@pytest.mark.ranks(2)
class TestGroup:
    def test_two(self, comm): ...
"""


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["-k", "np1"], ["test_one[np1]"]),
        (["-m", "slow", "-k", "np2"], ["test_one[np2]"]),
        (["tests/test_it.py::TestGroup::test_two"], ["TestGroup::test_two"]),
    ],
    ids=["k", "m", "node_id"],
)
def test_selection(arguments, names, project):
    (project.folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\nmarkers = slow: takes long\n")
    outcomes, output = project.run(SELECT, *arguments)
    assert outcomes == dict.fromkeys(names, "passed"), output


def test_from_another_folder_than_the_root(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = str(project.folder / "tests" / "test_it.py")
    (project.folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    outcomes, output = project.run(SELECT, path, "-k", "two", cwd=elsewhere)
    assert outcomes == {"TestGroup::test_two": "passed"}, output


def test_a_missing_mpirun_fails_with_the_pip_line(project):
    outcomes, output = project.run(
        "@pytest.mark.ranks(2)\ndef test_it(comm): ...\n", EPCOMM_MPIRUN="/nonexistent/mpirun"
    )
    assert outcomes == {"test_it": "failed"}
    assert "EPCOMM_MPIRUN: got /nonexistent/mpirun" in output


def test_the_comm_fixture_needs_the_mark(project):
    outcomes, output = project.run("def test_it(comm): ...\n")
    assert outcomes == {"test_it": "error"}
    assert "the comm fixture needs @pytest.mark.ranks(n)" in output


def test_a_job_that_cannot_collect_says_why(project):
    outcomes, output = project.run("""
if "EPCOMM_TEST_JOB" in os.environ:
    raise ImportError("only there")

@pytest.mark.ranks(2)
def test_it(comm): ...
""")
    assert outcomes == {"test_it": "failed"}
    assert "ImportError: only there" in output
