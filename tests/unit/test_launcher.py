"""Which mpirun is found, how a job ends, what `epcomm run` makes of a command. No MPI: the launchers are scripts."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epcomm import cli, env
from epcomm.bootstrap import abort, launcher
from epcomm.bootstrap.communicator import SoloCommunicator
from epcomm.bootstrap.local import LocalGroup
from epcomm.cli import run
from epcomm.errors import MpiMissing

# Starts its command once; "mpirun -n N command".
FAKE = '#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\nshift 2\n{prefix}exec "$@"\n'

TREE = Path(__file__).parents[2]


def make_launcher(folder: Path, version: str = "HYDRA build details", prefix: str = "", name: str = "mpirun") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(FAKE.format(version=version, prefix=prefix))
    path.chmod(0o755)
    return path


@pytest.fixture
def no_launchers(monkeypatch, tmp_path):
    """Neither the environment's scripts folder nor PATH has an mpirun."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.delenv("EPCOMM_MPIRUN", raising=False)
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda name, *_: str(empty))
    return monkeypatch


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", "mpich"),
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18", "intel"),
        ("slurmfoo 3", "unknown"),
    ],
    ids=["mpich", "openmpi", "intel", "other"],
)
def test_kind_of_launcher(version, kind, tmp_path, no_launchers):
    path = make_launcher(tmp_path / "bin", version)
    no_launchers.setenv("EPCOMM_MPIRUN", str(path))
    assert launcher.find_mpirun() == launcher.Mpirun(str(path), kind, version)


def test_order_of_search(tmp_path, no_launchers):
    with pytest.raises(MpiMissing, match=r"pip install 'epcomm\[mpi\]'"):
        launcher.find_mpirun()
    on_path = make_launcher(tmp_path / "path")
    no_launchers.setenv("PATH", str(on_path.parent))
    assert launcher.find_mpirun().path == str(on_path)
    in_scripts = make_launcher(tmp_path / "scripts")
    no_launchers.setattr(launcher.sysconfig, "get_path", lambda name, *_: str(in_scripts.parent))
    assert launcher.find_mpirun().path == str(in_scripts)
    chosen = make_launcher(tmp_path / "chosen", name="srun")
    no_launchers.setenv("EPCOMM_MPIRUN", str(chosen))
    assert launcher.find_mpirun().path == str(chosen)
    no_launchers.setenv("EPCOMM_MPIRUN", "/nonexistent/mpirun")
    with pytest.raises(MpiMissing, match="EPCOMM_MPIRUN"):
        launcher.find_mpirun()


def test_job_environment_keeps_the_users_settings(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
    changes = launcher.job_environment()
    assert "OMP_NUM_THREADS" not in changes
    assert changes["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert changes["PATH"].split(os.pathsep)[0] == launcher.sysconfig.get_path("scripts")


@pytest.fixture
def fake_mpirun(tmp_path, monkeypatch):
    monkeypatch.setenv("EPCOMM_MPIRUN", str(make_launcher(tmp_path / "fake")))
    return monkeypatch


def test_run_ranks_returns_code_and_output(fake_mpirun):
    assert launcher.run_ranks(2, ["sh", "-c", "echo out; echo err >&2; exit 5"], capture=True) == (5, "out\nerr\n")
    assert launcher.run_ranks(2, ["sh", "-c", 'test "$X" = y'], env={"X": "y"}) == (0, "")


def test_run_ranks_gives_the_ranks_an_empty_standard_input(fake_mpirun):
    assert launcher.run_ranks(1, ["cat"], capture=True, timeout_s=30) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["", "trap '' TERM; "], ids=["ends_on_term", "needs_kill"])
def test_run_ranks_kills_a_job_whose_time_ran_out(trap, fake_mpirun):
    fake_mpirun.setattr(launcher, "TERMINATION_GRACE_S", 0.3)
    script = f"{trap}echo pid $$; while :; do sleep 0.1; done"
    returncode, output = launcher.run_ranks(2, ["sh", "-c", script], timeout_s=0.5, capture=True)
    assert returncode == launcher.TIMED_OUT
    assert output.endswith("epcomm: the job of 2 ranks still ran after 0.5 s and was killed\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(output.split()[1]), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_job_too(number, status, fake_mpirun):
    # The job tells its pid once it runs; then the parent gets the signal.
    script = "echo pid $$; while :; do sleep 0.1; done"
    command = [sys.executable, "-m", "epcomm", "run", "-n", "2", "--", "sh", "-c", script]
    changes = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env.child_environment(changes), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[1])
        process.send_signal(number)
        assert process.wait(30) == status
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_the_job_starts_ends_it_once_it_is_known(number, error, fake_mpirun):
    started = []

    def start_and_be_signalled(*args, **options):
        process = start_ranks(*args, **options)
        signal.raise_signal(number)  # before run_ranks has the process in hand
        started.append(process)
        return process

    start_ranks = launcher.start_ranks
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    fake_mpirun.setattr(launcher, "start_ranks", start_and_be_signalled)
    with pytest.raises(error):
        launcher.run_ranks(2, ["sleep", "60"])
    assert started[0].poll() is not None
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


PYTHON = sys.executable
MPI4PY = ["-m", "mpi4py"]


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["python", "a.py", "-x"], ["python", *MPI4PY, "a.py", "-x"]),
        (["/usr/bin/python3.12", "a.py"], ["/usr/bin/python3.12", *MPI4PY, "a.py"]),
        (["python3", "-u", "-X", "dev", "a.py", "-u"], ["python3", "-u", "-X", "dev", *MPI4PY, "a.py", "-u"]),
        (["python", "-Wignore", "-m", "pkg", "-c"], ["python", "-Wignore", *MPI4PY, "-m", "pkg", "-c"]),
        (["python", "-Im", "pkg"], ["python", "-I", *MPI4PY, "-m", "pkg"]),
        (["python", "-uc", "print(1)"], ["python", "-u", *MPI4PY, "-c", "print(1)"]),
        (["python", "-cprint(1)"], ["python", *MPI4PY, "-c", "print(1)"]),
        (["python", "-"], ["python", *MPI4PY, "-"]),
        (["python", "-V"], ["python", "-V"]),
        (["python"], ["python"]),
        (["python", "-m", "mpi4py", "a.py"], ["python", "-m", "mpi4py", "a.py"]),
        (["a.py", "1"], [PYTHON, *MPI4PY, "a.py", "1"]),
        (["hostname", "-f"], ["hostname", "-f"]),
        (["pythonic-tool"], ["pythonic-tool"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_python_runs_under_mpi4py(command, wanted):
    assert run.rank_command(command) == wanted


def test_python_scripts_are_known_by_their_first_line(tmp_path, monkeypatch):
    script = tmp_path / "tool"
    script.write_text("#!/usr/bin/env python3\nprint(1)\n")
    script.chmod(0o755)
    shell = make_launcher(tmp_path, name="shell-tool")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.rank_command(["tool", "a"]) == [PYTHON, *MPI4PY, str(script), "a"]
    assert run.rank_command([str(script)]) == [PYTHON, *MPI4PY, str(script)]
    assert run.rank_command([str(shell)]) == [str(shell)]


def test_exit_status_of_epcomm_run(fake_mpirun, capfd):
    assert cli.main(["run", "-n", "2", "--", "sh", "-c", "exit 9"]) == 9
    assert cli.main(["run", "-n", "2", "sh", "-c", "kill -KILL $$"]) == 128 + signal.SIGKILL
    assert cli.main(["run", "-n", "1", "--timeout", "0.2", "--", "sleep", "60"]) == launcher.TIMED_OUT
    assert "still ran after 0.2 s" in capfd.readouterr().err
    fake_mpirun.setenv("EPCOMM_MPIRUN", "/nonexistent")
    assert cli.main(["run", "-n", "1", "--", "true"]) == cli.EXIT_ERROR
    assert "epcomm: EPCOMM_MPIRUN: got /nonexistent" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "-n", "0", "--", "true"], ["run", "-n", "2"], ["run"], ["nothing"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.EXIT_USAGE
    assert "epcomm" in capsys.readouterr().err


def test_help_lists_all_commands_and_imports_none(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert cli.main([]) == cli.EXIT_USAGE
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    listed = capsys.readouterr().out
    assert all(f"\n    {name} " in listed for name in cli.COMMANDS)


def test_version_of_the_tree_is_that_of_the_project(monkeypatch, capsys):
    monkeypatch.setattr(cli.metadata, "version", lambda name: (_ for _ in ()).throw(cli.metadata.PackageNotFoundError))
    # As in a tree that was not installed, wherever the package under test lies.
    monkeypatch.setattr(cli, "__file__", str(TREE / "epcomm" / "cli" / "__init__.py"))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    told = capsys.readouterr().out.strip()
    assert f'version = "{told.removeprefix("epcomm ")}"' in (TREE / "pyproject.toml").read_text()


def test_run_does_not_load_mpi():
    program = "import sys; from epcomm.cli import run; print({'mpi4py', 'mpi4py.MPI'} & set(sys.modules))"
    changes = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [PYTHON, "-c", program], env=env.child_environment(changes), capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_run_parser_keeps_options_of_the_command():
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    options = parser.parse_args(["run", "-n", "3", "--", "python", "-n", "5", "--timeout", "1"])
    assert (options.n, options.timeout, options.command[-4:]) == (3, None, ["-n", "5", "--timeout", "1"])


class TwoRanks(SoloCommunicator):
    """Of which only `abort` is used."""

    size = 2

    def __init__(self) -> None:
        self.aborted: list[int] = []

    def abort(self, code: int) -> None:
        self.aborted.append(code)


@pytest.fixture
def fresh_hook(monkeypatch):
    """No hook installed yet; pytest's own excepthook is put back afterwards."""
    seen: list[type] = []
    monkeypatch.setattr(abort, "_installed", False)
    monkeypatch.setattr(sys, "excepthook", lambda kind, value, trace: seen.append(kind))
    monkeypatch.setenv("EPCOMM_ABORT", "1")
    return seen


def test_abort_hook_chains_and_is_installed_once(fresh_hook):
    first, second = TwoRanks(), TwoRanks()
    assert abort.install_abort_hook(first)
    assert abort.install_abort_hook(second)
    sys.excepthook(KeyError, KeyError("x"), None)
    assert (fresh_hook, first.aborted, second.aborted) == ([KeyError], [1], [])


@pytest.mark.parametrize("reason", ["one_rank", "thread_ranks", "switched_off"])
def test_abort_hook_is_not_installed_for(reason, fresh_hook, monkeypatch):
    before = sys.excepthook
    if reason == "switched_off":
        monkeypatch.setenv("EPCOMM_ABORT", "0")
    comm = {"one_rank": SoloCommunicator(), "thread_ranks": LocalGroup(2).comms[0], "switched_off": TwoRanks()}[reason]
    assert not abort.install_abort_hook(comm)
    assert sys.excepthook is before
