"""How the tests run a program of `examples/`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Adds 1, 4, 9, ... to what goes into the operations. No example's check may survive that.
_BREAK = """
import itertools, runpy, sys
import epcomm

offsets = (number * number for number in itertools.count(1))

def broken(method):
    return lambda buffer, x, *args, **options: method(buffer, x + next(offsets), *args, **options)

for name in ("dispatch", "combine", "low_latency_combine"):
    setattr(epcomm.Buffer, name, broken(getattr(epcomm.Buffer, name)))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def examples(*, frameworks: bool) -> list[Path]:
    """The examples that import PyTorch or JAX, or the others."""
    paths = sorted((ROOT / "examples").glob("*.py"))
    return [
        path for path in paths if frameworks == any(f"import {name}" in path.read_text() for name in ("torch", "jax"))
    ]


def import_path() -> str:
    """For programs that are to import what this process imports, the stand-ins of tests/emulator among it."""
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def run_alone(path: Path, *, broken: bool = False) -> subprocess.CompletedProcess[str]:
    """Run an example on one rank, without a launcher."""
    return subprocess.run(
        [sys.executable, *(["-c", _BREAK] if broken else []), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"},
    )
