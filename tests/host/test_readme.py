"""The README's examples do what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from helpers.readme import program


def test_numpy_example(tmp_path: Path, run_ranks: Callable[..., tuple[int, str]]) -> None:
    script = tmp_path / "example.py"
    script.write_text(program("import ml_dtypes"))
    assert run_ranks(3, [sys.executable, "-m", "mpi4py", str(script)]) == (0, "")
