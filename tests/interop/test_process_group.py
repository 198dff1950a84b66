"""The communicator over torch.distributed process groups, on gloo processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.torch_jobs import run_torch_ranks

from epcomm.errors import BootstrapError

pytest.importorskip("torch.distributed")
interop_torch = pytest.importorskip("epcomm.interop.torch")

PROGRAM = str(Path(__file__).with_name("process_group_program.py"))


def test_collectives_subgroups_and_timeouts(tmp_path):
    codes, output = run_torch_ranks(3, [PROGRAM, "collectives", "subgroups", "buffer", "timeout"], tmp_path)
    assert codes == [0, 0, 0], output


def test_abort_ends_this_rank_and_closes_its_connections(tmp_path):
    codes, output = run_torch_ranks(2, [PROGRAM, "abort"], tmp_path)
    assert codes == [3, 0], output
    assert "noticed" in output


def test_without_init_process_group():
    with pytest.raises(BootstrapError, match=r"got no process group; .*; call torch.distributed.init_process_group"):
        interop_torch.ProcessGroupCommunicator()


def test_importing_interop_imports_no_framework():
    code = "import epcomm.interop, sys; sys.exit(any(name in sys.modules for name in ('torch', 'jax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
