"""The interpreter ends quietly while outputs are alive in the places where they are freed last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, types
import numpy as np
import epcomm

asarray = {asarray}
x = asarray(np.ones((4, 64), np.float32))
topk_idx = asarray(np.array([[0, 1], [2, -1], [3, 0], [-1, -1]], np.int32))
keep = types.ModuleType("keep")
sys.modules["keep"] = keep
keep.outputs = []
for comm in (epcomm.LocalGroup(1).comms[0], None):  # arrays of this process, and shared segments beside MPI
    buffer = epcomm.Buffer(comm, low_latency_mode=True)
    layout = buffer.get_dispatch_layout(topk_idx, 4)
    recv = buffer.dispatch(
        x, None, layout.num_tokens_per_rank, None, layout.is_token_in_rank, layout.num_tokens_per_expert, topk_idx
    )
    combined = buffer.combine(recv.recv_x, recv.handle)
    low = buffer.low_latency_dispatch({bfloat16}(x), topk_idx, 8, 4, use_fp8=False, return_recv_hook=True)
    cycle = [buffer, recv, combined, low]
    cycle.append(cycle)
    keep.outputs += [recv, combined, low, lambda: cycle]
    if {writable}:
        keep.outputs.append(buffer.get_combine_buffer(recv.handle, np.float32))
del buffer, recv, combined, low, cycle
assert float(keep.outputs[0].recv_x.sum()) == 3 * 64
"""

# How to make an array, how to cast it to bfloat16, and whether arrays can be written.
FRAMEWORKS = {
    "numpy": ("np.asarray", "(lambda a: a.astype(__import__('ml_dtypes').bfloat16))", True),
    "torch": ("__import__('torch').from_numpy", "(lambda a: a.bfloat16())", True),
    "jax": ("__import__('jax').numpy.asarray", "(lambda a: a.astype('bfloat16'))", False),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_interpreter_exit_with_live_outputs(framework):
    pytest.importorskip(framework)
    asarray, bfloat16, writable = FRAMEWORKS[framework]
    program = PROGRAM.format(asarray=asarray, bfloat16=bfloat16, writable=writable)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
