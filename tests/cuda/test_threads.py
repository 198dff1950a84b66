"""Ranks that are threads of one process: each with a stream of its own, all kernels in one context."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import checks, moe
from helpers.calls import TIMEOUT_S, check_late_mistake, check_mistake, error_of, raises
from helpers.cases import CASES, PLACING_CASES, Case
from helpers.frames import CUPY, down
from helpers.gpu import busy, need_gpu
from helpers.mistakes import MISTAKES
from helpers.window import shrink_window

from epcomm import Buffer, run_local
from epcomm.errors import InputError, PeerTimeout
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu

# One process whose threads use the GPU; with the 8 default queues, streams of 4 ranks may wait for each other.
in_one_process = pytest.mark.ranks(1, env={"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, timeout=180)
sizes = pytest.mark.parametrize("size", [2, 4])
ARENA_BYTES = 16 << 20
POOL_BYTES = 64 << 20
SHORT_S = 2.0


def make_buffer(comm, num_nvl_bytes: int = ARENA_BYTES, timeout_s: float = TIMEOUT_S) -> Buffer:
    return Buffer(comm, num_nvl_bytes, backend="cuda", timeout_s=timeout_s)


def run_in_streams(size, program, *arguments):
    """`run_local` with a stream for each rank. Pools are filled first: no memory is allocated while a rank waits."""

    def in_a_stream(comm):
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
            cupy.empty(POOL_BYTES, np.uint8)
            stream.synchronize()
            comm.barrier()
            result = program(comm, *arguments)
            stream.synchronize()
            comm.barrier()
            return result

    return run_local(size, in_a_stream)


def run_cases(comm, cases, num_nvl_bytes):
    with make_buffer(comm, num_nvl_bytes) as buffer:
        for case in cases:
            inputs = case.inputs(comm.size)
            _ = inputs.dispatched, inputs.outputs
            try:
                checks.round_trip(buffer, inputs)
            except BaseException as error:
                error.add_note(f"in case {case.name} on rank {comm.rank}")
                raise
        return dict(buffer.stats)


@in_one_process
@sizes
def test_cases(size):
    for stats in run_in_streams(size, run_cases, CASES, ARENA_BYTES):
        assert stats["dispatch_by_window"] == 0


@in_one_process
@sizes
def test_cases_through_the_window(size):
    for stats in run_in_streams(size, run_cases, PLACING_CASES, 0):
        assert stats["dispatch_in_arena"] == 0


@in_one_process
@sizes
def test_many_rounds(size, monkeypatch):
    shrink_window(monkeypatch, 32768 * size)
    case = Case("600 tokens", tokens=(600, 0, 77, 300), num_biases=1)
    run_in_streams(size, run_cases, [case], 0)


@in_one_process
@sizes
def test_the_default_stream_is_refused(size):
    """All ranks share it, and would wait for each other in it."""

    def program(comm):
        mine = moe.inputs(comm.rank, size)
        topk_idx, x = CUPY.up(mine.topk_idx), CUPY.up(mine.x)
        with make_buffer(comm) as buffer:
            layout = buffer.get_dispatch_layout(topk_idx, moe.num_experts(size))
            cupy.cuda.get_current_stream().synchronize()
            for stream in (cupy.cuda.Stream.null, 0, 1):
                with raises(InputError, "^stream: got the default stream, which all ranks of this process share"):
                    buffer.dispatch(x, **layout.arguments(), topk_idx=topk_idx, stream=stream)
            with cupy.cuda.Stream.null, raises(InputError, "^stream: got the default stream"):
                buffer.get_dispatch_layout(topk_idx, moe.num_experts(size))
            comm.barrier()
            moe.assert_works(buffer)

    run_in_streams(size, program)


@in_one_process
@sizes
def test_slow_consumers_and_held_outputs(size):
    """Memory is used again only behind the streams that read it, which belong to different ranks."""
    case = Case("large", tokens=(100, 60), hidden=2048)
    inputs = [case.inputs(size, seed) for seed in range(2)]

    def program(comm):
        wants = [mine.dispatched[comm.rank].recv_x for mine in inputs]
        xs = [CUPY.up(mine.x[comm.rank]) for mine in inputs]
        with make_buffer(comm, 4 << 20) as buffer:
            _, result = checks.dispatch(buffer, inputs[0])
            handles = [result.handle, checks.dispatch(buffer, inputs[1])[1].handle]
            copies = []
            for number in range(20):
                which = number % 2
                received = buffer.dispatch(xs[which], handle=handles[which])
                busy(1 if comm.rank == number % size else 0)
                copies.append((which, received if number % 3 == 0 else received.recv_x[:5]))
                if len(copies) > 6:
                    del copies[number % 5]
            for which, one in copies:
                rows = down(one.recv_x if hasattr(one, "recv_x") else one)
                assert_bitwise(rows, wants[which][: len(rows)])

    busy(0)
    run_in_streams(size, program)


@in_one_process
def test_mistakes():
    chosen = [m for m in MISTAKES if m.name in ("x_of_wrong_dtype", "weights_of_wrong_dtype", "bias_of_wrong_shape")]

    def program(comm):
        with make_buffer(comm) as buffer:
            for number, mistake in enumerate(chosen):
                if mistake.operation == "dispatch":
                    check_mistake(comm, buffer, mistake, bad=number % comm.size)
                elif mistake.operation in ("cached_dispatch", "combine"):
                    check_late_mistake(comm, buffer, mistake, bad=number % comm.size)

    run_in_streams(2, program)


@in_one_process
def test_a_rank_that_never_calls():
    def program(comm):
        with make_buffer(comm, timeout_s=SHORT_S) as buffer:
            moe.assert_works(buffer)
            comm.barrier()
            if comm.rank != 1:
                error = error_of(lambda: moe.send(buffer, moe.inputs(comm.rank, comm.size)))
                assert type(error) is PeerTimeout, repr(error)
                assert error.awaited_ranks == [1] or "gave up" in str(error)
            comm.barrier()
        with make_buffer(comm) as buffer:
            moe.assert_works(buffer)

    run_in_streams(3, program)


@in_one_process
def test_buffers_come_and_go():
    """Constructed while others are alive, and destroyed in different orders."""

    def program(comm):
        kept = []
        for number in range(12):
            buffer = make_buffer(comm)
            moe.assert_throughput_works(buffer, number % 3)
            kept.append((buffer, moe.send(buffer, moe.inputs(comm.rank, comm.size))))
            if len(kept) > 3:
                kept.pop((number + comm.rank) % 3)[0].destroy()
        for (buffer, result), _ in itertools.product(kept, range(2)):
            want = moe.oracle(comm.size, comm.size, 0).dispatched[comm.rank].recv_x
            assert_bitwise(down(result.recv_x), want)
            buffer.destroy()

    run_in_streams(2, program)
