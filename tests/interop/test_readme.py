"""The README's PyTorch and JAX examples do what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.readme import program


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_example(framework: str, tmp_path: Path, run_ranks: Callable[..., tuple[int, str]]) -> None:
    pytest.importorskip(framework)
    script = tmp_path / "example.py"
    script.write_text(program(f"import {framework}\n"))
    assert run_ranks(2, [sys.executable, "-m", "mpi4py", str(script)]) == (0, "")
