"""The rooms of the package: who imports whom, what importing it loads, and where inline assembly lives."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import epcomm
from epcomm.jit.source import cuda_src_dir

PACKAGE = Path(epcomm.__file__).parent
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

# What a program that imports epcomm has in memory beside the standard library, and which of our rooms.
LOADED_PACKAGES = {"epcomm", "numpy", "ml_dtypes"}
LOADED_ROOMS = {
    "arrays",
    "backends",
    "bootstrap",
    "buffer",
    "config",
    "dlpack",
    "env",
    "errors",
    "event",
    "handle",
    "layout",
    "memory",
    "numerics",
}

# File, line to put there, and what the report says about it. The last one is a module that has no room.
VIOLATIONS = {
    "upwards": ("errors.py", "import epcomm.env", "epcomm.errors -> epcomm.env"),
    "from_backend_to_buffer": (
        "backends/host/rows.py",
        "import epcomm.buffer",
        "epcomm.backends.host.rows -> epcomm.buffer",
    ),
    "between_neighbours": ("handle.py", "import epcomm.bootstrap", "epcomm.handle -> epcomm.bootstrap"),
    "framework": ("arrays/view.py", "import torch", "epcomm.arrays.view -> torch"),
    "oracle": ("reference/formats.py", "import epcomm.numerics", "epcomm.reference.formats -> epcomm.numerics"),
    "homeless": ("attic.py", "", "attic"),
}
CONTRACTS = ("rooms", "no framework below interop", "the oracle shares no arithmetic with the backends")


@pytest.fixture
def tree(tmp_path):
    """A copy of the package to lint, and to do damage to."""
    shutil.copytree(PACKAGE, tmp_path / "epcomm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT, tmp_path)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    """Exit status and report of ``lint-imports``."""
    pytest.importorskip("importlinter")
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_are_kept(tree):
    returncode, report = lint(tree)
    assert returncode == 0, report
    assert all(f"{name} KEPT" in report for name in CONTRACTS), report
    assert "0 broken" in report


def test_planted_violations_are_caught(tree):
    for file, line, _ in VIOLATIONS.values():
        path = tree / "epcomm" / file
        text = path.read_text() if path.exists() else ""
        path.write_text(f"{text}\n{line}\n")
    returncode, report = lint(tree)
    assert returncode != 0
    assert all(f"{name} BROKEN" in report for name in CONTRACTS), report
    assert [name for name, (_, _, trace) in VIOLATIONS.items() if trace not in report] == [], report


def test_importing_epcomm_loads_no_framework_and_no_mpi(tmp_path):
    program = """
import json, sys
old = set(sys.modules)
import epcomm
epcomm.Buffer  # names are loaded at first use
print(json.dumps([*{*sys.modules} - old]))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    # NumPy and ml_dtypes bring helper modules of the interpreter's build, all of them private.
    assert {name for name in packages if not name.startswith("_")} == LOADED_PACKAGES
    assert {name.split(".")[1] for name in modules if name.startswith("epcomm.")} == LOADED_ROOMS
    assert "epcomm.bootstrap.mpi" not in modules


def files_with_assembly(root: Path) -> list[str]:
    """CUDA files below `root` that contain inline assembly."""
    statement = re.compile(r"\b(asm|__asm__)\s*(volatile|__volatile__)?\s*\(")
    paths = (path for path in sorted(root.rglob("*")) if path.suffix in (".cu", ".cuh"))
    return [path.relative_to(root).as_posix() for path in paths if statement.search(path.read_text())]


def test_inline_assembly_lives_in_one_folder(tmp_path):
    for number, line in enumerate(
        ('asm("");', 'asm volatile (""', '__asm__ __volatile__(""', "// no asm here (really)")
    ):
        (tmp_path / f"{number}.cuh").write_text(line)
    assert files_with_assembly(tmp_path) == ["0.cuh", "1.cuh", "2.cuh"]
    assert [path for path in files_with_assembly(cuda_src_dir()) if not path.startswith("ptx/")] == []
