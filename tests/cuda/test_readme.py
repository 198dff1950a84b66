"""The README's example for GPUs does what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.gpu import need_gpu
from helpers.readme import program

need_gpu()
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_cupy_example(tmp_path: Path, run_ranks: Callable[..., tuple[int, str]], num_ranks: int) -> None:
    script = tmp_path / "example.py"
    script.write_text(program("import cupy"))
    assert run_ranks(num_ranks, [sys.executable, "-m", "mpi4py", str(script)]) == (0, "")
