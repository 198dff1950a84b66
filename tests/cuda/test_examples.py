"""The examples for GPUs, alone and on ranks, right and with broken operations."""

from __future__ import annotations

import sys

import pytest
from helpers.examples import examples, run_alone
from helpers.gpu import need_gpu

cupy = need_gpu()
pytestmark = pytest.mark.gpu

EXAMPLES = {path.stem: path for path in examples(frameworks=False) if "import cupy" in path.read_text()}


def need_cublas(name: str) -> None:
    if name == "12_overlap":
        try:
            cupy.ones((2, 2), cupy.float32) @ cupy.ones((2, 2), cupy.float32)
        except ImportError:
            pytest.skip("optional package nvidia-cublas is not installed")


def test_there_are_as_many_as_expected():
    assert sorted(EXAMPLES) == ["10_gpu_cupy", "11_graph", "12_overlap", "13_gpu_decode"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_alone(name):
    need_cublas(name)
    done = run_alone(EXAMPLES[name])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "check: " in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_on_ranks(name, run_ranks):
    need_cublas(name)
    code, output = run_ranks(2, [sys.executable, "-m", "mpi4py", str(EXAMPLES[name])], timeout_s=120)
    assert code == 0, output
    assert output.count("check: ") == 1, output


def test_wrong_results_are_noticed():
    done = run_alone(EXAMPLES["10_gpu_cupy"], broken=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 0: wrong rows" in done.stderr
    assert "check: " not in done.stdout
