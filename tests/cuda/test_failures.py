"""Ranks that come late, do not come, leave or are interrupted, on a GPU: who hears of it, and what works afterwards.

"At once" is tested with timeouts of an hour: whoever waited for them would not end within the test's own limit.
"""

from __future__ import annotations

import signal

import pytest
from helpers import checks, moe
from helpers.calls import TIMEOUT_S, assert_explains, call, error_of, guarded_calls, set_scene
from helpers.cases import CASES
from helpers.frames import CUPY
from helpers.gpu import busy, need_gpu

from epcomm import Buffer
from epcomm.errors import BufferBroken, PeerTimeout

cupy = need_gpu()
pytestmark = pytest.mark.gpu

SHORT_S = 2.0
HOUR_S = 3600.0
ARENA_BYTES = 8 << 20
UNIFORM = next(case for case in CASES if case.name == "uniform")

# Operation and phase of the wait that ends, and keywords of the call.
WAITS = {
    "dispatch": ("dispatch", "dispatch, counts", "counts", {}),
    "worst_case": ("dispatch", "dispatch, counts", "counts", {"num_worst_tokens": 64}),
    "cached_dispatch": ("cached_dispatch", "dispatch", "entry", {}),
    "combine": ("combine", "combine", "entry", {}),
    "low_latency_dispatch": ("low_latency_dispatch", "low_latency_dispatch", "done", {}),
    "low_latency_combine": ("low_latency_combine", "low_latency_combine", "done", {}),
}


def make_buffer(comm, timeout_s: float = TIMEOUT_S, num_nvl_bytes: int = ARENA_BYTES) -> Buffer:
    return Buffer(comm, num_nvl_bytes, 4 << 20, low_latency_mode=True, backend="cuda", timeout_s=timeout_s)


def call_and_hear(scene, operation, keywords=None):
    """The call, and what the GPU has to say about it."""
    call(scene, operation, keywords)
    CUPY.synchronize()
    scene.buffer.check()


def assert_timeout(error, comm, operation, phase):
    assert type(error) is PeerTimeout, repr(error)
    assert (error.operation, error.phase, error.waiting_rank) == (operation, phase, comm.rank)
    assert f"from {', '.join(f'rank {rank}' for rank in error.awaited_ranks)} after" in str(error)


def assert_broken(buffer, cause):
    """Everything but destroy raises, and names what broke it."""
    for name, attempt in guarded_calls(buffer).items():
        error = error_of(attempt)
        pattern = f"^{name.removeprefix('internode_')}: got a Buffer that {cause.__name__} left"
        assert_explains(error, BufferBroken, pattern)
        assert type(error.__cause__) is cause
    assert repr(buffer).endswith("broken>")


def assert_the_rest_works(comm):
    """The CUDA context, and a new Buffer of all ranks."""
    assert int(cupy.arange(10).sum()) == 45
    with make_buffer(comm) as buffer:
        moe.assert_works(buffer)


# -- ranks that come late -----------------------------------------------------------------------------------------


@pytest.mark.ranks(3)
@pytest.mark.parametrize("num_nvl_bytes", [ARENA_BYTES, 0], ids=["arena", "window"])
@pytest.mark.parametrize("late_rank", [0, 2])
def test_a_rank_that_comes_late(comm, late_rank, num_nvl_bytes):
    """The GPU of one rank is busy for 30 ms before every call: the others are inside by then, and wait."""

    def dawdle():
        if comm.rank == late_rank:
            busy(30)

    inputs = UNIFORM.inputs(comm.size)
    with make_buffer(comm, num_nvl_bytes=num_nvl_bytes) as buffer:
        for _ in range(3):
            dawdle()
            _, result = checks.dispatch(buffer, inputs)
            checks.assert_dispatched(buffer, inputs, result)
            dawdle()
            cached = buffer.dispatch(CUPY.up(inputs.x[comm.rank]), handle=result.handle)
            dawdle()
            combined = checks.combine(buffer, inputs, result, 1)
            checks.assert_dispatched(buffer, inputs, cached, is_cached=True)
            checks.assert_combined(buffer, inputs, combined, 1)
        buffer.check()
        comm.barrier()


@pytest.mark.ranks(3)
def test_a_rank_whose_host_comes_late(comm):
    """The others have launched everything when it starts."""
    inputs = UNIFORM.inputs(comm.size)
    with make_buffer(comm) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        x, rows = CUPY.up(inputs.x[comm.rank]), CUPY.up(inputs.outputs[comm.rank])
        CUPY.synchronize()
        for late_rank in range(comm.size):
            if comm.rank == late_rank:
                comm.barrier()
            cached = [buffer.dispatch(x, handle=result.handle) for _ in range(3)]
            combined = checks.combine(buffer, inputs, cached[-1], x=rows)
            if comm.rank != late_rank:
                comm.barrier()
            for one in cached:
                checks.assert_dispatched(buffer, inputs, one, is_cached=True)
            checks.assert_combined(buffer, inputs, combined)


# -- ranks that do not come ---------------------------------------------------------------------------------------


@pytest.mark.ranks(4)
@pytest.mark.parametrize("num_nvl_bytes", [ARENA_BYTES, 0], ids=["arena", "window"])
@pytest.mark.parametrize("wait", WAITS)
def test_a_rank_that_never_calls(comm, wait, num_nvl_bytes):
    """The others name it or the one that gave up first, their Buffers are done for, and a new one works."""
    operation, label, phase, keywords = WAITS[wait]
    absent = 2
    buffer = make_buffer(comm, HOUR_S if comm.rank == absent else SHORT_S, num_nvl_bytes)
    scene = set_scene(buffer, operation)
    CUPY.synchronize()
    comm.barrier()
    report = None
    if comm.rank != absent:
        error = error_of(lambda: call_and_hear(scene, operation, keywords))
        assert_timeout(error, comm, label, phase)
        report = (error.awaited_ranks, "gave up" in str(error), error.elapsed_s)
        assert_broken(buffer, PeerTimeout)
    reports = [one for one in comm.allgather(report) if one is not None]
    first = [elapsed_s for awaited, has_given_up, elapsed_s in reports if not has_given_up]
    assert first
    assert all(SHORT_S <= elapsed_s < HOUR_S for elapsed_s in first)
    for awaited, has_given_up, _ in reports:
        assert len(awaited) == 1
        assert (awaited == [absent]) != has_given_up
    if comm.rank == absent:
        # It comes late, when the others have given up.
        error = error_of(lambda: call_and_hear(scene, operation, keywords))
        assert type(error) is PeerTimeout, repr(error)
        assert "gave up" in str(error)
        assert absent not in error.awaited_ranks
        assert_broken(buffer, PeerTimeout)
    buffer.destroy()
    assert_the_rest_works(comm)


@pytest.mark.ranks(4)
def test_calls_that_do_not_meet(comm):
    """Each side waits for the other."""
    with make_buffer(comm, SHORT_S) as buffer:
        scene = set_scene(buffer, "combine")
        CUPY.synchronize()
        comm.barrier()
        operation = "cached_dispatch" if comm.rank == 1 else "combine"
        error = error_of(lambda: call_and_hear(scene, operation))
        assert_timeout(error, comm, "dispatch" if comm.rank == 1 else "combine", "entry")
        everybody = comm.allgather((error.awaited_ranks, "gave up" in str(error)))
        assert any(not gave_up for _, gave_up in everybody)
        for rank, (awaited, gave_up) in enumerate(everybody):
            assert gave_up or awaited == ([0, 2, 3] if rank == 1 else [1])
    assert_the_rest_works(comm)


@pytest.mark.ranks(3)
def test_a_destroyed_buffer(comm):
    """Whoever still calls names the rank that has destroyed its Buffer."""
    buffer = make_buffer(comm, SHORT_S)
    moe.assert_works(buffer)
    comm.barrier()
    if comm.rank == 1:
        buffer.destroy()
    else:
        error = error_of(lambda: moe.send(buffer, moe.inputs(comm.rank, comm.size)))
        assert_timeout(error, comm, "dispatch, counts", "counts")
        assert error.awaited_ranks == [1] or "gave up" in str(error)
        assert_broken(buffer, PeerTimeout)
    comm.barrier()
    buffer.destroy()
    assert_the_rest_works(comm)


@pytest.mark.ranks(4)
def test_the_first_to_be_done_may_leave(comm):
    """Whoever has its results is gone while others still read its memory; they get theirs."""
    for _ in range(10):
        with make_buffer(comm, HOUR_S) as buffer:
            moe.assert_throughput_works(buffer, seed=0)


# -- interrupts ---------------------------------------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_an_interrupt_while_waiting(comm, monkeypatch):
    """It breaks the Buffer of that rank, and its peers do not wait for an answer that will never come."""
    buffer = make_buffer(comm, HOUR_S)
    moe.assert_works(buffer)
    scene = set_scene(buffer, "dispatch")
    CUPY.synchronize()
    comm.barrier()
    if comm.rank == 0:
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        with monkeypatch.context() as patch:
            # The signal arrives in the middle of the wait, whatever the machine's speed.
            patch.setattr("epcomm.backends.cuda.job.Job.check_job", lambda _: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                call(scene, "dispatch")
        signal.signal(signal.SIGINT, previous)
        assert_broken(buffer, KeyboardInterrupt)
    elif comm.rank != 3:
        error = error_of(lambda: call(scene, "dispatch"))
        assert_timeout(error, comm, "dispatch, counts", "counts")
        assert error.awaited_ranks == [0]
        assert "gave up" in str(error)
    comm.barrier()
    buffer.destroy()
    assert_the_rest_works(comm)
