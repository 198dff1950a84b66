"""How jobs on a GPU end: ranks that die, and interpreters that end in whatever state.

Whoever waited for a dead rank here would do so for an hour.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.gpu import need_gpu

need_gpu()
pytestmark = pytest.mark.gpu

PREFIX = """
import gc, os, signal, sys, types
from helpers import frames, moe
from epcomm import Buffer
from epcomm.bootstrap import as_communicator
from epcomm.errors import PeerTimeout
FRAMES = getattr(frames, sys.argv[2])
comm = as_communicator()
# Launchers that end a job in a hurry may lose the last words of its ranks; files do not.
sys.stdout = sys.stderr = open(f"{sys.argv[1]}/rank{comm.rank}", "w", buffering=1)
buffer = Buffer(comm, 8 << 20, backend="cuda", timeout_s=3600)
def send():
    return moe.send(buffer, moe.inputs(comm.rank, comm.size), FRAMES)
"""


def job(run_ranks, folder: Path, program: str, frames: str = "CUPY") -> tuple[int, str]:
    """(exit status, what the ranks and the launcher printed) of `program` on two ranks."""
    script, words = folder / "program.py", folder / "words"
    script.write_text(PREFIX + program)
    words.mkdir()
    command = [sys.executable, "-m", "mpi4py", str(script), str(words), frames]
    returncode, output = run_ranks(2, command, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    return returncode, "".join(path.read_text() for path in sorted(words.iterdir())) + output


# -- ranks that die -----------------------------------------------------------------------------------------------

DIE = """
moe.assert_works(buffer)
comm.barrier()
if comm.rank == 1:
    # The other one is in the call by now, or will be: it makes no difference to it.
    {act}
send()
print("survived")
"""
DEATHS = {
    "raises": "raise RuntimeError('the reason')",
    "exits": "sys.exit(3)",
    "is_killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "leaves": "os._exit(5)",
}


@pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in DEATHS.items()])
def test_a_rank_that_dies(act, run_ranks, tmp_path):
    """The job ends although the other one would wait for an hour."""
    returncode, output = job(run_ranks, tmp_path, DIE.format(act=act))
    assert returncode != 0
    assert "survived" not in output
    assert ("RuntimeError: the reason" in output) == (act == DEATHS["raises"])


# -- the end of the interpreter -----------------------------------------------------------------------------------

ENDINGS = {
    "nothing_destroyed": "moe.assert_works(buffer, frames=FRAMES)",
    "outputs_alive": "moe.result = sys.result = send()",
    "work_under_way": """
result = send()
sys.results = [buffer.dispatch(FRAMES.up(moe.inputs(comm.rank, 2).x), handle=result.handle) for _ in range(20)]
""",
    "in_a_cycle": """
class Node: pass
node = Node()
node.me, node.buffer, node.result = node, buffer, send()
gc.disable()
del node, buffer
""",
    "in_a_module": """
holder = types.ModuleType("holder")
holder.me, holder.buffer, holder.result = holder, buffer, send()
sys.modules["holder"] = holder
""",
    "after_destroy": """
result = send()
buffer.destroy()
sys.result = result, types.SimpleNamespace(row=result.recv_x[:1])
""",
}
BROKEN = """
buffer = Buffer(comm, 8 << 20, backend="cuda", timeout_s=0.5)
if comm.rank == 0:
    try:
        send()
        raise SystemExit("nobody answered, and all was well")
    except PeerTimeout as error:
        sys.error = error
comm.barrier()
"""


def need(framework: str) -> None:
    """Skip unless the ranks will have it. Looked at in a process of its own, as this one stays off the GPU."""
    program = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r}); from helpers.gpu import has_gpu"
    command = [sys.executable, "-c", f"{program}; sys.exit(not has_gpu({framework!r}))"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{framework} has no GPU")


def assert_silent(returncode: int, output: str) -> None:
    assert returncode == 0, output
    for word in ("Traceback", "Exception ignored", "Fatal", "Error"):
        assert word not in output, output


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_the_interpreter_ends(framework, run_ranks, tmp_path):
    """Normally and in silence, with everything alive in all ways at once."""
    need(framework)
    endings = [ENDINGS["outputs_alive"], ENDINGS["work_under_way"], ENDINGS["in_a_module"], ENDINGS["in_a_cycle"]]
    assert_silent(*job(run_ranks, tmp_path, "".join(endings), framework.upper()))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_in_any_state(ending, framework, run_ranks, tmp_path):
    need(framework)
    assert_silent(*job(run_ranks, tmp_path, ENDINGS[ending], framework.upper()))


def test_the_interpreter_ends_with_a_broken_buffer(run_ranks, tmp_path):
    assert_silent(*job(run_ranks, tmp_path, BROKEN))
