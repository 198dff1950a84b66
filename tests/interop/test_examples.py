"""The PyTorch and JAX examples, alone and on ranks, right and with broken operations."""

from __future__ import annotations

import sys

import pytest
from helpers.examples import examples, run_alone

EXAMPLES = {path.stem.split("_")[1]: path for path in examples(frameworks=True)}  # by framework

every_example = pytest.mark.parametrize("framework", ["torch", "jax"])


@every_example
def test_alone(framework):
    pytest.importorskip(framework)
    done = run_alone(EXAMPLES[framework])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "check: " in done.stdout


@every_example
def test_on_ranks(framework, run_ranks):
    pytest.importorskip(framework)
    code, output = run_ranks(2, [sys.executable, "-m", "mpi4py", str(EXAMPLES[framework])], timeout_s=120)
    assert code == 0, output
    assert output.count("check: ") == 1, output


@every_example
def test_wrong_results_are_noticed(framework):
    pytest.importorskip(framework)
    done = run_alone(EXAMPLES[framework], broken=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 0: gradients are off" in done.stderr
    assert "check: " not in done.stdout
