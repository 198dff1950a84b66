"""Construction with wrong settings, and the calls that a Buffer refuses: destroyed, in use, forked."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from helpers import moe
from helpers.calls import (
    TIMEOUT_S,
    assert_explains,
    assert_mismatch,
    assert_peer_error,
    error_of,
    guarded_calls,
    raises,
)

from epcomm import Buffer, Communicator, env, run_local
from epcomm.bootstrap import topology
from epcomm.errors import (
    BootstrapError,
    BufferBroken,
    BufferDestroyed,
    ConcurrentUse,
    InputError,
    MissingDependency,
    ShapeError,
    UnsupportedOption,
)

WRONG_SETTINGS = {
    "unknown_backend": ({"backend": "tpu"}, InputError, "^backend: got 'tpu'; wanted 'auto', 'host' or 'cuda'"),
    "negative_nvl_bytes": ({"num_nvl_bytes": -1}, ShapeError, "^num_nvl_bytes: got -1; wanted a number of bytes"),
    "rdma_bytes_of_wrong_type": (
        {"num_rdma_bytes": 1.5},
        ShapeError,
        "^num_rdma_bytes: got 1.5; wanted a number of",
    ),
    "negative_queue_pairs": (
        {"num_qps_per_rank": -1},
        InputError,
        "^num_qps_per_rank: got -1; wanted a number of queue pairs, 0 or more",
    ),
    "queue_pairs_of_wrong_type": (
        {"num_qps_per_rank": "24"},
        InputError,
        "^num_qps_per_rank: got '24'; wanted a number",
    ),
    "timeout_0": ({"timeout_s": 0}, InputError, "^timeout_s: got 0; wanted a number of seconds, more than 0"),
    "timeout_nan": ({"timeout_s": float("nan")}, InputError, "^timeout_s: got nan; wanted a number of seconds"),
    "timeout_for_ever": ({"timeout_s": float("inf")}, InputError, "^timeout_s: got inf; wanted a number of seconds"),
    "timeout_of_wrong_type": ({"timeout_s": "soon"}, InputError, "^timeout_s: got 'soon'; wanted a number of seconds"),
    "ranks_per_node_of_wrong_type": ({"ranks_per_node": "2"}, ShapeError, "^ranks_per_node: got '2'; wanted a number"),
}
SETTINGS = [pytest.param(*value, id=name) for name, value in WRONG_SETTINGS.items()]

WRONG_VARIABLES = {
    "EPCOMM_TIMEOUT_S": ("soon", "^EPCOMM_TIMEOUT_S: got 'soon'; wanted a value of type float; correct"),
    "EPCOMM_CHECK": ("perhaps", "^EPCOMM_CHECK: got 'perhaps'; wanted 0 or 1; correct the environment variable"),
    "EPCOMM_ABORT": ("2", "^EPCOMM_ABORT: got '2'; wanted 0 or 1"),
    "EPCOMM_RANKS_PER_NODE": ("two", "^EPCOMM_RANKS_PER_NODE: got 'two'; wanted a value of type int"),
    "EPCOMM_BACKEND": ("tpu", "^EPCOMM_BACKEND: got 'tpu'; wanted auto, host or cuda; correct the"),
    "EPCOMM_TRANSPORT": ("pigeons", "^EPCOMM_TRANSPORT: got 'pigeons'; wanted auto, ipc or nvshmem; correct the"),
    "EPCOMM_HOST_TRANSPORT": ("pigeons", "^EPCOMM_HOST_TRANSPORT: got 'pigeons'; wanted auto, segments or messages"),
}
VARIABLES = [pytest.param(name, *value, id=name) for name, value in WRONG_VARIABLES.items()]


def construct(comm: Communicator, **settings: object) -> None:
    Buffer(comm, **settings).destroy()


@pytest.mark.parametrize(("settings", "error", "message"), SETTINGS)
def test_wrong_settings_of_one_rank(settings, error, message):
    """That rank raises its own error, the others hear of it, and the next construction works."""

    def program(comm):
        caught = error_of(lambda: construct(comm, **(settings if comm.rank == 1 else {})))
        messages = comm.allgather(str(caught))
        if comm.rank == 1:
            assert_explains(caught, error, message)
        else:
            assert_peer_error(caught, {1: messages[1]})
        with Buffer(comm, timeout_s=TIMEOUT_S) as buffer:
            moe.assert_works(buffer)

    with raises(error, message):
        construct(None, **settings)
    run_local(2, program)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("low_latency_mode", (True, False)),
        ("enable_shrink", (False, True)),
        ("backend", ("auto", "host")),
        ("num_rdma_bytes", (0, 64)),
    ],
)
def test_ranks_that_disagree_about_settings(name, values):
    def program(comm):
        odd = comm.rank == 1
        caught = error_of(lambda: construct(comm, **{name: values[odd]}))
        assert_mismatch(comm, caught, (name,), odd=1)
        assert caught.table[name] == [values[0], values[1], values[0]]

    run_local(3, program)


def no_nvshmem():
    raise MissingDependency("NVSHMEM", got="nothing", wanted="its package")


@pytest.mark.parametrize("need", ["gpu", "nvshmem"])
def test_what_one_rank_lacks_for_cuda(need, monkeypatch):
    """ "cuda" raises on all ranks, "auto" takes the host backend on all of them."""
    monkeypatch.delenv("EPCOMM_BACKEND", raising=False)
    missing = {}
    monkeypatch.setattr("epcomm.backends.cuda.why_not", lambda: missing[threading.get_ident()])
    if need == "nvshmem":
        monkeypatch.setattr(topology, "host_identity", lambda: f"host {threading.get_ident()}")
        monkeypatch.setattr("epcomm.backends.cuda.usable.installed_nvshmem", no_nvshmem)
    reason = {"gpu": "rank 1: no GPU", "nvshmem": "rank 0: NVSHMEM: got nothing; wanted its package"}

    def program(comm):
        missing[threading.get_ident()] = "no GPU" if need == "gpu" and comm.rank == 1 else ""
        caught = error_of(lambda: construct(comm, backend="cuda"))
        assert_explains(caught, UnsupportedOption, f"^backend='cuda': got {reason[need]}.*; pass backend='host'")
        assert comm.allgather(str(caught)) == [str(caught)] * comm.size
        with Buffer(comm, timeout_s=TIMEOUT_S) as buffer:
            assert buffer.backend == "host"
            moe.assert_works(buffer)

    run_local(3, program)


def test_nodes():
    def program(comm):
        for uneven in (2, 0, -1, 4):
            with raises(ShapeError, f"^ranks_per_node: got {uneven}; wanted a divisor of the number of ranks, 3"):
                construct(comm, ranks_per_node=uneven)
        disagree = error_of(lambda: construct(comm, ranks_per_node=1 if comm.rank == 2 else 3))
        assert_mismatch(comm, disagree, ("ranks_per_node",), odd=2)

    run_local(3, program)


@pytest.mark.parametrize(("name", "value", "message"), VARIABLES)
def test_variables_that_cannot_be_read(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with raises(InputError, message):
        construct(None)

    def program(comm):
        caught = error_of(lambda: construct(comm))
        assert type(caught) is InputError
        return str(caught)

    assert len(set(run_local(2, program))) == 1


def test_the_variables_with_rules_are_all_tested():
    """What is only text or a path cannot be wrong before it is used."""
    assert set(WRONG_VARIABLES) >= {name for name, variable in env.VARIABLES.items() if variable.type is not str}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_timeouts_that_are_none(value, monkeypatch):
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", value)
    with raises(InputError, "^EPCOMM_TIMEOUT_S: got .*; wanted a number of seconds, more than 0"):
        construct(None)
    construct(None, timeout_s=1)  # the argument wins


@pytest.mark.parametrize("need", ["shrink", "segments"])
def test_shared_memory_that_is_not_there(need, monkeypatch):
    def no_room(*_):
        raise OSError("no room")

    monkeypatch.setattr("epcomm.memory.LocalSegments.create", no_room)
    if need == "segments":
        monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", "segments")

    def program(comm):
        caught = error_of(lambda: construct(comm, enable_shrink=need == "shrink"))
        assert_explains(caught, UnsupportedOption, "got ranks that share no memory; ")

    run_local(2, program)


# -- states -------------------------------------------------------------------------------------------------------


def test_destroyed():
    buffer = Buffer(low_latency_mode=True)
    refused = guarded_calls(buffer)
    assert {"dispatch", "combine", "low_latency_dispatch", "check", "record_stream", "get_combine_buffer"} <= set(
        refused
    )
    buffer.destroy()
    buffer.destroy()
    for name, attempt in refused.items():
        with raises(BufferDestroyed, "got a destroyed Buffer; make a new one on all ranks") as caught:
            attempt()
        assert str(caught.value).startswith(name.removeprefix("internode_")), name
    assert repr(buffer).endswith("destroyed>")
    assert (buffer.rank, buffer.group_size) == (0, 1)


def test_a_construction_that_failed_leaves_nothing_to_destroy():
    buffer = Buffer.__new__(Buffer)
    with pytest.raises(InputError):
        buffer.__init__(backend="tpu")
    buffer.destroy()


def test_a_hook_after_destroy():
    with Buffer(low_latency_mode=True) as buffer:
        mine = moe.inputs(0, 1)
        result = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, moe.MAX_TOKENS, moe.num_experts(1), return_recv_hook=True
        )
    with raises(BufferDestroyed, "^low_latency_dispatch hook: got a destroyed Buffer"):
        result.hook()


def test_in_use_by_another_thread():
    """While rank 0 waits inside a dispatch, its Buffer refuses a second thread; then all goes on as if nothing was."""
    buffers = {}

    def program(comm):
        with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
            buffers[comm.rank] = buffer
            comm.barrier()
            if comm.rank == 1:
                while not buffers[0]._entry.locked():
                    time.sleep(0)
                assert_refuses_a_second_thread(buffers[0])
            moe.send(buffer, moe.inputs(comm.rank, 2))
            moe.assert_works(buffer)

    def assert_refuses_a_second_thread(buffer):
        for name, attempt in guarded_calls(buffer).items():
            with raises(ConcurrentUse, "got a second call while one is running; wanted one thread") as caught:
                attempt()
            assert str(caught.value).startswith(name.removeprefix("internode_")), name

    run_local(2, program)


FORK = """
import os
import epcomm
from epcomm.bootstrap import SoloCommunicator
from epcomm.errors import ForkedProcess

buffer = epcomm.Buffer(SoloCommunicator())
child = os.fork()
if child == 0:
    try:
        buffer.check()
    except ForkedProcess as error:
        print(error)
    buffer.destroy()
    buffer.__exit__(None, None, None)
else:
    assert os.waitpid(child, 0) == (child, 0)
    buffer.check()
    print("parent goes on")
"""


def test_in_a_forked_child():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    in_child, in_parent = done.stdout.splitlines()
    assert in_child.startswith("check: got a Buffer of process ")
    assert in_child.endswith("; make a Buffer after the fork, or start processes with 'spawn'")
    assert in_parent == "parent goes on"


def test_an_error_of_one_thread_ends_the_waits_of_the_others():
    """Ranks that are threads share a fate: nobody waits out the timeout for a rank that is gone."""
    seen = {}

    def program(comm):
        with Buffer(comm, timeout_s=1000 * TIMEOUT_S) as buffer:
            if comm.rank == 1:
                raise RuntimeError("the reason")
            try:
                moe.assert_works(buffer)
            except BootstrapError as error:
                seen[comm.rank] = str(error), type(error_of(buffer.check))
                raise

    with pytest.raises(RuntimeError, match="the reason"):
        run_local(3, program, timeout_s=TIMEOUT_S)
    assert sorted(seen) == [0, 2]
    for message, later in seen.values():
        assert "got an error on another rank: RuntimeError('the reason')" in message
        assert later is BufferBroken
