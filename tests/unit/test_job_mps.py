"""Commands that start their ranks have MPS for them where they share GPUs. No MPS, no GPU, no MPI."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from epcomm import cli, env
from epcomm.bootstrap import mps
from epcomm.cli import job
from epcomm.cli.bench.cuda import construction

CHANGES = {"CUDA_MPS_PIPE_DIRECTORY": "here"}


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs and MPS, as far as commands look at it; has what ranks are started with."""
    for name in env.LAUNCHER_SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    started = SimpleNamespace(environments=[])
    runtime = SimpleNamespace(getDeviceCount=lambda: 2)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(job, "backend_here", lambda wanted, **_: "host" if wanted == "host" else "cuda")
    monkeypatch.setattr(job, "run_ranks", lambda _n, _command, env: (started.environments.append(env), (0, ""))[1])
    monkeypatch.setattr(mps, "is_installed", lambda: True)
    monkeypatch.setattr(mps, "running", lambda: contextlib.nullcontext(CHANGES))
    return started


@pytest.mark.parametrize("command", ["bench", "demo"])
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--ranks=3"], CHANGES),
        (["--ranks=3", "--backend=cuda"], CHANGES),
        (["--ranks=2"], {}),
        (["--ranks=2", "--mps=on"], CHANGES),
        (["--ranks=3", "--mps=off"], {}),
        (["--ranks=3", "--backend=host"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_ranks_that_share_a_gpu_have_mps(machine, command, options, changes):
    assert cli.main([command, "--experts=6", "--topk=2", *options]) == 0
    assert machine.environments == [changes]


def test_without_mps_they_take_turns_and_are_told(machine, monkeypatch, capsys):
    monkeypatch.setattr(mps, "is_installed", lambda: False)
    assert cli.main(["demo", "--ranks=3", "--experts=6", "--topk=2"]) == 0
    assert machine.environments == [{}]
    assert "take turns, about 3000 times slower" in capsys.readouterr().err


def test_mps_that_was_asked_for_must_be_there(machine, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(mps.shutil, "which", lambda _: None)
    monkeypatch.setattr(job, "run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    assert cli.main(["demo", "--ranks=3", "--experts=6", "--topk=2", "--backend=host", "--mps=on"]) == 1
    assert f"no {mps.PROGRAM} on PATH" in capsys.readouterr().err


# -- construction times -------------------------------------------------------------------------------------------


def test_construction_is_timed_in_two_processes_with_one_cache(monkeypatch):
    folders = []

    def run(_command, *, env, **_options):
        folders.append(env["EPCOMM_CACHE_DIR"])
        return SimpleNamespace(stdout=f"a library's words\n{construction._MARK}{3.0 / len(folders)}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert construction.construction_s() == (3.0, 1.5)
    assert folders[0] == folders[1]


@pytest.mark.parametrize("fails", ["silent", "slow"])
def test_a_construction_that_fails_has_no_time(monkeypatch, fails):
    def run(command, **_options):
        if fails == "slow":
            raise subprocess.TimeoutExpired(command, 1)
        return SimpleNamespace(stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    assert construction.construction_s() is None
