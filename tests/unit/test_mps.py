"""An MPS daemon for one job: started, used, stopped. The daemon is a script that behaves, or does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from epcomm import cli, env
from epcomm.bootstrap import mps
from epcomm.errors import BootstrapError, MissingDependency

# As far as it matters: -d leaves a daemon behind, questions come on standard input, a daemon is needed to answer.
# {mode}: good, broken (does not start), dead (starts but never answers), stubborn (does not quit).
FAKE = """#!/bin/sh
pipe="$CUDA_MPS_PIPE_DIRECTORY"
if [ "$1" = -d ]; then
    [ -n "$CUDA_VISIBLE_DEVICES" ] && echo "daemon sees $CUDA_VISIBLE_DEVICES" >> {record}
    if [ {mode} = broken ]; then echo "cannot find a GPU"; exit 1; fi
    echo "started $pipe" >> {record}
    echo "log line" > "$CUDA_MPS_LOG_DIRECTORY/control.log"
    "$0" --daemon &
    exit 0
fi
if [ "$1" = --daemon ]; then
    echo $$ > "$pipe/pid"
    echo "pid $$" >> {record}
    [ {mode} = stubborn ] && trap '' TERM
    while [ ! -e "$pipe/quit" ]; do sleep 0.02; done
    exit 0
fi
read question
[ -n "$pipe" ] && [ -e "$pipe/pid" ] && [ {mode} != dead ] || exit 1
case "$question" in
    get_server_list) ;;
    quit*) echo "asked to $question" >> {record}; [ {mode} = stubborn ] || touch "$pipe/quit" ;;
esac
"""
MPIRUN = '#!/bin/sh\nif [ "$1" = --version ]; then exit 0; fi\nshift 2\nexec "$@"\n'


def runs(pid: str) -> bool:
    """Whether the process exists; one that has ended may stay listed where the init process collects no children."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Fake:
    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"

    def install(self, mode: str = "good") -> None:
        path = self.folder / mps.PROGRAM
        path.write_text(FAKE.format(mode=mode, record=self.record))
        path.chmod(0o755)

    @property
    def lines(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []

    def values(self, word: str) -> list[str]:
        return [line.removeprefix(word).strip() for line in self.lines if line.startswith(word)]

    def assert_nothing_is_left(self) -> None:
        assert self.values("started")
        assert [pid for pid in self.values("pid") if runs(pid)] == []
        assert [folder for folder in self.values("started") if Path(folder).parent.exists()] == []


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    mpirun = folder / "mpirun"
    mpirun.write_text(MPIRUN)
    mpirun.chmod(0o755)
    monkeypatch.setenv("EPCOMM_MPIRUN", str(mpirun))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    fake = Fake(folder)
    fake.install()
    return fake


def test_a_daemon_for_one_job(fake):
    with mps.running() as changes:
        assert set(changes) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
        pipes, logs = map(Path, changes.values())
        assert pipes.stat().st_mode & 0o777 == 0o700
        assert (logs / "control.log").exists()
        assert len(str(pipes)) < 60
        assert [runs(pid) for pid in fake.values("pid")] == [True]
        assert fake.values("asked") == []
    assert fake.values("asked") == [f"to quit -t {mps.SERVER_GRACE_S}"]
    fake.assert_nothing_is_left()


def test_the_daemon_sees_all_gpus(fake, monkeypatch):
    """The ranks' CUDA_VISIBLE_DEVICES would count among those that it sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with mps.running():
        assert env.lookup("CUDA_VISIBLE_DEVICES") == "3"
    assert fake.values("daemon sees") == []


def test_a_daemon_that_runs_is_used_and_left_alone(fake, monkeypatch):
    with mps.running() as outer:
        for name, value in outer.items():
            monkeypatch.setenv(name, value)
        with mps.running() as inner:
            assert inner == {}
        assert len(fake.values("started")) == 1
        assert fake.values("asked") == []
    fake.assert_nothing_is_left()


def test_a_variable_that_points_nowhere_gets_a_daemon(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "gone"))
    with mps.running() as changes:
        assert changes["CUDA_MPS_PIPE_DIRECTORY"] != str(tmp_path / "gone")
    fake.assert_nothing_is_left()


def test_long_temporary_folders_are_avoided(fake, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with mps.running() as changes:
        assert changes["CUDA_MPS_PIPE_DIRECTORY"].startswith("/tmp/epcomm-mps-")


def test_without_mps(fake, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingDependency, match=r"^MPS: got no nvidia-cuda-mps-control on PATH"), mps.running():
        pytest.fail("not reached")
    assert cli.main(["run", "-n", "2", "--mps", "--", "true"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err.startswith("epcomm: MPS: got no nvidia-cuda-mps-control on PATH")


def test_a_daemon_that_does_not_start(fake):
    fake.install("broken")
    folders = set(Path(tempfile.gettempdir()).glob("epcomm-mps-*"))
    said = r"(?s)^MPS: got exit status 1 of .*cannot find a GPU\n; wanted a daemon"
    with pytest.raises(BootstrapError, match=said), mps.running():
        pytest.fail("not reached")
    assert set(Path(tempfile.gettempdir()).glob("epcomm-mps-*")) <= folders


def test_a_daemon_that_never_answers(fake, monkeypatch):
    fake.install("dead")
    monkeypatch.setattr(mps, "START_S", 0.2)
    monkeypatch.setattr(mps, "STOP_S", 0.1)
    with pytest.raises(BootstrapError, match=r"(?s)^MPS: got no answer in 0.2 s\nlog line\n"), mps.running():
        pytest.fail("not reached")
    fake.assert_nothing_is_left()


def test_a_daemon_that_does_not_quit_is_killed(fake, monkeypatch):
    fake.install("stubborn")
    monkeypatch.setattr(mps, "STOP_S", 0.2)
    with mps.running():
        pass
    assert len(fake.values("asked")) == 1
    fake.assert_nothing_is_left()


def test_an_error_inside_stops_it_too(fake):
    with pytest.raises(ZeroDivisionError), mps.running():
        raise ZeroDivisionError
    fake.assert_nothing_is_left()


def test_epcomm_run(fake, capfd):
    script = 'echo "pipe=$CUDA_MPS_PIPE_DIRECTORY"; exit 7'
    assert cli.main(["run", "-n", "2", "--mps", "--", "sh", "-c", script]) == 7
    assert capfd.readouterr().out.strip() == f"pipe={fake.values('started')[0]}"
    fake.assert_nothing_is_left()
    fake.record.unlink()
    assert cli.main(["run", "-n", "2", "--", "sh", "-c", script]) == 7
    assert capfd.readouterr().out.strip() == "pipe="
    assert fake.lines == []


def test_a_job_whose_time_ran_out(fake, capfd):
    assert cli.main(["run", "-n", "1", "--timeout", "0.1", "--mps", "--", "sleep", "60"]) == 124
    assert "was killed" in capfd.readouterr().err
    fake.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(number, status, fake):
    script = "echo running; while :; do sleep 0.1; done"
    command = [sys.executable, "-m", "epcomm", "run", "-n", "2", "--mps", "--", "sh", "-c", script]
    changes = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env.child_environment(changes), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        assert process.wait(30) == status
    fake.assert_nothing_is_left()


def test_a_signal_while_it_starts_is_kept_until_it_runs(fake, monkeypatch):
    start = mps._start

    def start_and_be_interrupted(*args):
        changes = start(*args)
        signal.raise_signal(signal.SIGINT)
        return changes

    monkeypatch.setattr(mps, "_start", start_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt), mps.running():
        pytest.fail("not reached")
    fake.assert_nothing_is_left()
