"""How jobs end: ranks that die, timeouts that nobody catches, and interpreters that end in whatever state.

Whoever waited for a dead rank here would do so for an hour. The shared segments of every job lie in a folder of
their own, which must be empty afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.calls import some_slow

# -- ranks that die -----------------------------------------------------------------------------------------------

PREFIX = """
import gc, os, signal, sys
from helpers import moe
from epcomm import Buffer
from epcomm.bootstrap import as_communicator
from epcomm.errors import PeerTimeout
comm = as_communicator()
# Launchers that end a job in a hurry may lose the last words of its ranks; files do not.
sys.stdout = sys.stderr = open(f"{sys.argv[1]}/rank{comm.rank}", "w", buffering=1)
buffer = Buffer(comm, low_latency_mode=True, timeout_s=3600)
"""

DIE = """
if {late}:
    moe.assert_works(buffer)
comm.barrier()
if comm.rank == 1:
    # The others are in the call by now, or will be: it makes no difference to them.
    {act}
moe.send(buffer, moe.inputs(comm.rank, comm.size))
print("survived")
"""
RAISE = "raise RuntimeError('the reason')"
EXIT, KILL, LEAVE = "sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(5)"
DEATHS = {
    "raises_in_the_first_call": (RAISE, False),
    "raises_later": (RAISE, True),
    "exits_in_the_first_call": (EXIT, False),
    "exits_later": (EXIT, True),
    "is_killed_in_the_first_call": (KILL, False),
    "is_killed_later": (KILL, True),
    "leaves_in_the_first_call": (LEAVE, False),
    "leaves_later": (LEAVE, True),
}
FAST_DEATHS = {"raises_in_the_first_call", "exits_later", "is_killed_in_the_first_call"}
MPI4PY = ["-m", "mpi4py"]


def job(run_ranks, folder: Path, program: str, *, python: list[str]) -> tuple[int, str]:
    """Run `program` on two ranks with the segments in a folder that must be empty in the end, whatever happened.

    Returns:
        The exit status, and what the ranks and the launcher printed.
    """
    script, segments, words = folder / "program.py", folder / "segments", folder / "words"
    script.write_text(PREFIX + program)
    segments.mkdir()
    words.mkdir()
    command = [sys.executable, *python, str(script), str(words)]
    returncode, output = run_ranks(2, command, env={"EPCOMM_SHM_DIR": str(segments)})
    output = "".join(path.read_text() for path in sorted(words.iterdir())) + output
    assert list(segments.iterdir()) == [], output
    return returncode, output


@pytest.mark.parametrize("death", some_slow(DEATHS, FAST_DEATHS))
def test_a_rank_that_dies(death, run_ranks, tmp_path):
    """The job ends although the others would wait for an hour, and leaves no memory behind."""
    act, late = death
    returncode, output = job(run_ranks, tmp_path, DIE.format(act=act, late=late), python=MPI4PY)
    assert returncode != 0
    assert "survived" not in output
    assert ("RuntimeError: the reason" in output) == (act == RAISE)


@pytest.mark.slow
def test_an_exception_under_plain_python(run_ranks, tmp_path):
    returncode, output = job(run_ranks, tmp_path, DIE.format(act=RAISE, late=True), python=[])
    assert returncode == 1
    assert "RuntimeError: the reason" in output
    assert "survived" not in output


TIME_OUT = """
buffer = Buffer(comm, timeout_s=0.2)
if comm.rank == 1:
    comm.barrier()
moe.send(buffer, moe.inputs(comm.rank, comm.size))
"""


@pytest.mark.slow
def test_a_timeout_nobody_catches(run_ranks, tmp_path):
    """Here nobody is left to take names away but the rank that raises."""
    returncode, output = job(run_ranks, tmp_path, TIME_OUT, python=[])
    assert returncode == 1
    assert "PeerTimeout: dispatch, phase 'post': got no answer from rank 1 after" in output


# -- the end of the interpreter -----------------------------------------------------------------------------------

ENDINGS = {
    "nothing_destroyed": "moe.assert_works(buffer)",
    "before_the_first_call": "",
    "explicitly_destroy": "buffer = Buffer(comm, explicitly_destroy=True)\nmoe.assert_works(buffer)",
    "outputs_alive": """
result = moe.send(buffer, moe.inputs(comm.rank, comm.size))
moe.result, sys.row = result, result.recv_x[:1]
moe.memory = buffer.get_combine_buffer(result.handle, 'bfloat16')
""",
    "in_a_cycle": """
class Node: pass
node = Node()
node.me, node.buffer, node.result = node, buffer, moe.send(buffer, moe.inputs(comm.rank, comm.size))
gc.disable()
del node, buffer
""",
    "hook_pending": """
mine = moe.inputs(comm.rank, comm.size)
result = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 16, moe.num_experts(comm.size), return_recv_hook=True)
""",
    "broken": """
buffer = Buffer(comm, timeout_s=0.2)
if comm.rank == 0:
    try:
        moe.send(buffer, moe.inputs(0, comm.size))
        raise SystemExit("nobody answered, and all was well")
    except PeerTimeout as error:
        sys.error = error
""",
}


@pytest.mark.parametrize("ending", some_slow(ENDINGS, {"in_a_cycle"}))
def test_the_interpreter_ends(ending, run_ranks, tmp_path):
    """Normally, in silence and with nothing left behind, whatever state the Buffers are in."""
    assert job(run_ranks, tmp_path, ending, python=MPI4PY) == (0, "")
