"""The NumPy examples, alone and on ranks, right and with broken operations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.examples import ROOT, examples, run_alone

EXAMPLES = [path for path in examples(frameworks=False) if "import cupy" not in path.read_text()]

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def test_there_are_as_many_as_expected():
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "04", "05", "06", "09"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_is_short_and_says_how_to_run_it(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name}\n" in text


@pytest.mark.slow
@every_example
def test_alone(path):
    done = run_alone(path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "check: " in done.stdout


QUICK = ("01", "04", "09")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.name.startswith(QUICK) else pytest.mark.slow, id=p.stem) for p in EXAMPLES],
)
def test_on_ranks(path, run_ranks):
    code, output = run_ranks(4, [sys.executable, "-m", "mpi4py", str(path)])
    assert code == 0, output
    # One rank reports; 06 makes its ranks itself, in each of the four processes.
    assert output.count("check: ") == (4 if path.name.startswith("06") else 1), output


@pytest.mark.slow
@every_example
def test_wrong_results_are_noticed(path):
    done = run_alone(path, broken=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.strip().startswith(("rank 0: ", "Traceback"))
    assert "check: " not in done.stdout
