"""Ranks that do not come, leave or are interrupted: who hears of it, how soon, and what works afterwards.

"At once" is tested with timeouts of an hour: whoever waited for them would not end within the test's own limit.
"""

from __future__ import annotations

import gc
import signal
import sys

import pytest
from helpers import moe
from helpers.calls import TIMEOUT_S, assert_explains, call, error_of, guarded_calls, set_scene, some_slow

from epcomm import Buffer
from epcomm.bootstrap import abort
from epcomm.errors import BufferBroken, PeerTimeout

SHORT_S = 1.0
HOUR_S = 3600.0

LABELS = {
    "dispatch": "dispatch",
    "cached_dispatch": "dispatch(handle=...)",
    "combine": "combine",
    "low_latency_dispatch": "low_latency_dispatch",
    "low_latency_combine": "low_latency_combine",
}


def assert_timeout(error, awaited, comm, operation="dispatch", phase="post"):
    assert type(error) is PeerTimeout, repr(error)
    assert (error.operation, error.phase) == (operation, phase)
    assert (error.waiting_rank, error.awaited_ranks) == (comm.rank, awaited)
    assert f"from {', '.join(f'rank {rank}' for rank in awaited)} after" in str(error)


def assert_broken(buffer, cause):
    """Everything but destroy raises, and names what broke it."""
    for name, attempt in guarded_calls(buffer).items():
        error = error_of(attempt)
        assert_explains(
            error, BufferBroken, f"^{name.removeprefix('internode_')}: got a Buffer that {cause.__name__} left"
        )
        assert type(error.__cause__) is cause
    assert repr(buffer).endswith("broken>")


def assert_a_new_buffer_works(comm):
    with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
        moe.assert_works(buffer)


# -- ranks that do not come ---------------------------------------------------------------------------------------


@pytest.mark.ranks(4)
@pytest.mark.parametrize("operation", some_slow({name: name for name in LABELS}, {"dispatch"}))
def test_a_rank_that_never_calls(comm, operation):
    """The others name it, their Buffers are done for, and a new one works."""
    absent = 2
    buffer = Buffer(comm, low_latency_mode=True, timeout_s=HOUR_S if comm.rank == absent else SHORT_S)
    scene = set_scene(buffer, operation)
    comm.barrier()
    if comm.rank != absent:
        error = error_of(lambda: call(scene, operation))
        assert_timeout(error, [absent], comm, LABELS[operation])
        elapsed_s = error.elapsed_s
        assert_broken(buffer, PeerTimeout)
    else:
        elapsed_s = 0.0
    assert SHORT_S < max(comm.allgather(elapsed_s)) < HOUR_S
    if comm.rank == absent:
        # It comes late: what the others sent may still be there, but nobody gets stuck waiting for more.
        errors = [error_of(lambda: call(scene, operation)) for _ in range(2)]
        first = next(error for error in errors if error is not None)
        assert type(first) is PeerTimeout
        assert "gave up" in str(first)
    buffer.destroy()
    assert_a_new_buffer_works(comm)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_hooks_and_collective_masks_time_out_too(comm):
    buffer = Buffer(comm, low_latency_mode=True, timeout_s=SHORT_S)
    scene = set_scene(buffer, "low_latency_dispatch")
    comm.barrier()
    if comm.rank != 0:
        hook = call(scene, "low_latency_dispatch", {"return_recv_hook": True}).hook
        assert_timeout(error_of(hook), [0], comm, "low_latency_dispatch")
        assert_broken(buffer, PeerTimeout)
    comm.barrier()
    buffer.destroy()
    with Buffer(comm, low_latency_mode=True, timeout_s=SHORT_S) as buffer:
        if comm.rank != 3:
            assert_timeout(error_of(buffer.low_latency_clean_mask_buffer), [3], comm, "low_latency_clean_mask_buffer")
            assert_broken(buffer, PeerTimeout)
        comm.barrier()


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_calls_that_do_not_meet(comm):
    """High-throughput and low-latency calls go separate ways, so each side waits for the other."""
    with Buffer(comm, low_latency_mode=True, timeout_s=SHORT_S) as buffer:
        operation = "low_latency_dispatch" if comm.rank == 1 else "dispatch"
        scene = set_scene(buffer, operation)
        comm.barrier()
        error = error_of(lambda: call(scene, operation))
        assert_timeout(error, [0, 2, 3] if comm.rank == 1 else [1], comm, operation)
        comm.barrier()


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize("ranks_per_node", some_slow({"one_node": None, "two_nodes": 2}, {"two_nodes"}))
def test_a_rank_that_never_calls_by_message(comm, ranks_per_node, monkeypatch):
    """Messages tell who is late, too, and the communicator is replaced for the next Buffer."""
    from mpi4py import MPI

    monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", "messages")
    user = MPI.COMM_WORLD.Dup()
    buffer = Buffer(user, low_latency_mode=True, ranks_per_node=ranks_per_node, timeout_s=SHORT_S)
    moe.assert_works(buffer)
    scene = set_scene(buffer, "dispatch")
    comm.barrier()
    if comm.rank != 2:
        assert_timeout(error_of(lambda: call(scene, "dispatch")), [2], comm, phase="headers")
        assert_broken(buffer, PeerTimeout)
    comm.barrier()
    buffer.destroy()
    assert_a_new_buffer_works(user)
    user.Free()


# -- ranks that leave ---------------------------------------------------------------------------------------------


def leave_by_destroy(buffer):
    buffer.destroy()
    return buffer


def leave_by_with(buffer):
    with pytest.raises(RuntimeError, match="out"), buffer:
        raise RuntimeError("out")
    return buffer


def leave_by_collection(buffer):
    buffer.itself = buffer
    del buffer
    gc.collect()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("leave", [leave_by_destroy, leave_by_with, leave_by_collection])
def test_a_destroyed_buffer_is_named_at_once(comm, leave):
    buffers = [Buffer(comm, low_latency_mode=True, timeout_s=HOUR_S)]
    moe.assert_works(buffers[0])
    if comm.rank == 1:
        leave(buffers.pop())
    else:
        error = error_of(lambda: moe.send(buffers[0], moe.inputs(comm.rank, comm.size)))
        assert_timeout(error, [1], comm)
        assert "a destroyed Buffer, hence no answer, from rank 1" in str(error)
        assert_broken(buffers.pop(), PeerTimeout)
    assert_a_new_buffer_works(comm)


@pytest.mark.ranks(4)
def test_the_first_to_be_done_may_leave(comm):
    """Whoever has its results is gone while others still read what it posted; they get theirs."""
    for _ in range(10):
        with Buffer(comm, low_latency_mode=True, timeout_s=HOUR_S) as buffer:
            moe.assert_throughput_works(buffer, seed=0)
        with Buffer(comm, low_latency_mode=True, timeout_s=HOUR_S) as buffer:
            moe.assert_low_latency_works(buffer, seed=0)


# -- interrupts ---------------------------------------------------------------------------------------------------


class Alarm(Exception):
    """What a program's own signal handler raises."""


def leave_everything(_number, _frame):
    raise Alarm


@pytest.mark.ranks(4)
@pytest.mark.parametrize("kind", ["keyboard", "handler"])
def test_an_interrupt_while_waiting(comm, kind, monkeypatch):
    """It breaks the Buffer of that rank, and its peers do not wait for an answer that will never come."""
    buffer = Buffer(comm, timeout_s=HOUR_S)
    moe.assert_works(buffer)
    scene = set_scene(buffer, "dispatch")
    if comm.rank == 0:
        expected = KeyboardInterrupt if kind == "keyboard" else Alarm
        handler = signal.default_int_handler if kind == "keyboard" else leave_everything
        previous = signal.signal(signal.SIGINT, handler)
        with monkeypatch.context() as patch:
            # The signal arrives in the middle of the wait, whatever the machine's speed.
            interrupt = signal.raise_signal
            patch.setattr("epcomm.backends.host.control.Patience.pause", lambda _: interrupt(signal.SIGINT))
            with pytest.raises(expected):
                call(scene, "dispatch")
        signal.signal(signal.SIGINT, previous)
        assert_broken(buffer, expected)
    elif comm.rank != 3:
        error = error_of(lambda: call(scene, "dispatch"))
        # The other one that answers may be a little late; rank 0 has answered.
        assert_timeout(error, sorted({3, *error.awaited_ranks} - {0}), comm)
        assert "got no answer (and rank 0" in str(error)
    comm.barrier()
    buffer.destroy()
    assert_a_new_buffer_works(comm)


# -- the hook of sys.excepthook -----------------------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_who_installs_the_excepthook(comm, monkeypatch):
    before = sys.excepthook
    monkeypatch.setattr(abort, "_installed", False)
    monkeypatch.setattr(sys, "excepthook", before)
    Buffer(comm.split(comm.rank, 0)).destroy()
    assert sys.excepthook is before  # alone
    monkeypatch.setenv("EPCOMM_ABORT", "0")
    Buffer(comm).destroy()
    assert sys.excepthook is before  # not wanted
    monkeypatch.delenv("EPCOMM_ABORT")
    Buffer(comm).destroy()
    assert sys.excepthook is not before
    installed = sys.excepthook
    Buffer(comm).destroy()
    assert sys.excepthook is installed
