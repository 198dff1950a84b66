"""Streams, events and the life of outputs on a GPU: nothing is read before it is there, nothing reused while in use.

Slow consumers are kernels that spin, so that whoever does not wait for them is sure to be caught.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from helpers import checks, moe
from helpers.calls import TIMEOUT_S, raises
from helpers.cases import CASES, Case
from helpers.frames import CUPY, JAX, TORCH, assign, down, up_all
from helpers.gpu import busy, has_gpu, need_gpu

from epcomm import Buffer, EventOverlap
from epcomm.errors import InputError
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu

ENVIRONMENT = {"JAX_ENABLE_X64": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
two_ranks = pytest.mark.ranks(2, env=ENVIRONMENT)
UNIFORM = next(case for case in CASES if case.name == "uniform")
LARGE = Case("large", tokens=(200, 150), hidden=4096, num_biases=1)
# Ten outputs of LARGE, and a little more. What lies outside comes from slabs of 64 MiB.
ARENA_BYTES = 32 << 20
MORE_THAN_FIT = 30
SPIN_MS = 20.0


def make_buffer(comm, num_nvl_bytes: int = ARENA_BYTES) -> Buffer:
    return Buffer(comm, num_nvl_bytes, backend="cuda", timeout_s=TIMEOUT_S)


@pytest.fixture(params=[ARENA_BYTES, 0], ids=["arena", "window"])
def buffer(comm, request):
    with make_buffer(comm, request.param) as one:
        yield one
        CUPY.synchronize()
        one.check()
        comm.barrier()


def blank(array):
    """A device array like `array`, of zeros."""
    return CUPY.up(np.zeros_like(array))


def comm_stream(buffer: Buffer):
    """`Buffer.get_comm_stream` as a CuPy stream, also if the program has imported torch."""
    stream = buffer.get_comm_stream()
    return cupy.cuda.ExternalStream(getattr(stream, "cuda_stream", None) or stream.ptr)


# -- async_finish and events --------------------------------------------------------------------------------------


@two_ranks
@pytest.mark.parametrize("wait", ["method", "with", "previous_event", "stream_of_the_comm"])
def test_async_finish(buffer, wait):
    """The caller's stream goes on, and sees the results once it has waited for the event."""
    inputs = LARGE.inputs(2)
    side = cupy.cuda.Stream(non_blocking=True)
    for _ in range(5):
        with side:
            options = {"async_finish": True, "allocate_on_comm_stream": True}
            layout, result = checks.dispatch(buffer, inputs, **options)
            combined = checks.combine(buffer, inputs, result, 1, **options)
            assert isinstance(combined.event, EventOverlap)
            if wait == "method":
                combined.event.current_stream_wait()
            elif wait == "with":
                with combined.event:
                    busy(1)
            elif wait == "previous_event":
                # A later call that waits, and is not asynchronous itself.
                cached = buffer.dispatch(
                    CUPY.up(inputs.x[buffer.rank]), handle=result.handle, previous_event=combined.event
                )
                checks.assert_dispatched(buffer, inputs, cached, is_cached=True)
            else:
                side.wait_event(comm_stream(buffer).record())
            checks.assert_layout(buffer, inputs, layout)
            checks.assert_dispatched(buffer, inputs, result)
            checks.assert_combined(buffer, inputs, combined, 1)


@two_ranks
def test_an_asynchronous_call_does_not_hold_up_its_stream(buffer):
    """While rank 1 is busy, work that rank 0 queues behind its call gets done."""
    inputs = LARGE.inputs(2)
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        _, result = checks.dispatch(buffer, inputs)
        x, mark = CUPY.up(inputs.x[buffer.rank]), cupy.zeros(4, np.int32)
        mark += 1  # its kernel must not be loaded while another one waits
        side.synchronize()
        if buffer.rank == 0:
            cached = buffer.dispatch(x, handle=result.handle, async_finish=True)
            mark += 1
            side.synchronize()  # for ever, if it waited for rank 1, which waits for the barrier
            buffer._comm.barrier()
        else:
            buffer._comm.barrier()
            cached = buffer.dispatch(x, handle=result.handle, async_finish=True)
        cached.event.current_stream_wait()
        checks.assert_dispatched(buffer, inputs, cached, is_cached=True)


@two_ranks
@pytest.mark.parametrize("is_async", [False, True])
def test_inputs_that_are_still_being_written(buffer, is_async):
    """The Buffer's stream waits for the caller's, whose kernels fill the inputs long after the call."""
    inputs = LARGE.inputs(2)
    rank = buffer.rank
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        x, topk_idx, rows = up_all(CUPY, (inputs.x[rank], inputs.topk_idx[rank], inputs.outputs[rank]))
        for _ in range(3):
            late_x, late_idx, late_rows = (
                blank(one) for one in (inputs.x[rank], inputs.topk_idx[rank], inputs.outputs[rank])
            )
            busy(SPIN_MS)
            assign(late_idx, topk_idx)
            layout = buffer.get_dispatch_layout(late_idx, inputs.num_experts, async_finish=is_async)
            busy(SPIN_MS)
            assign(late_x, x)
            result = buffer.dispatch(late_x, **layout.arguments(), topk_idx=late_idx, async_finish=is_async)
            result.event.current_stream_wait()
            assert_bitwise(down(result.recv_x), inputs.dispatched[rank].recv_x)
            busy(SPIN_MS)
            assign(late_rows, rows)
            combined = buffer.combine(late_rows, result.handle, async_finish=is_async)
            combined.event.current_stream_wait()
            checks.assert_combined(buffer, inputs, combined)


@two_ranks
def test_capture_and_a_previous_event(buffer):
    """A call in one stream that waits for the work of another one, of which only the event tells."""
    inputs = LARGE.inputs(2)
    rank = buffer.rank
    filling, calling = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with calling:
        _, result = checks.dispatch(buffer, inputs)
        ready = CUPY.up(inputs.x[rank])
        late = blank(inputs.x[rank])
        calling.synchronize()
    with filling:
        busy(SPIN_MS)
        assign(late, ready)
        event = buffer.capture()
    with calling:
        cached = buffer.dispatch(late, handle=result.handle, previous_event=event, async_finish=True)
        cached.event.current_stream_wait()
        checks.assert_dispatched(buffer, inputs, cached, is_cached=True)


_kept: list[Any] = []  # streams that outlive their Buffers, as those of raw handles must


@two_ranks
@pytest.mark.parametrize("form", ["object", "handle", "protocol"])
def test_stream_argument(buffer, form):
    """It stands for the current stream: inputs are written there, outputs ready there."""
    inputs = LARGE.inputs(2)
    rank = buffer.rank
    stream = cupy.cuda.Stream(non_blocking=True)
    if form == "handle":
        _kept.append(stream)
    given = {"object": stream, "handle": stream.ptr, "protocol": _Protocol(stream)}[form]
    x = CUPY.up(inputs.x[rank])
    late = blank(inputs.x[rank])
    topk_idx = CUPY.up(inputs.topk_idx[rank])
    CUPY.synchronize()
    with stream:
        busy(SPIN_MS)
        assign(late, x)
    layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts, stream=given)
    result = buffer.dispatch(late, **layout.arguments(), topk_idx=topk_idx, stream=given)
    with stream:
        assert_bitwise(down(result.recv_x), inputs.dispatched[rank].recv_x)
    combined = buffer.combine(CUPY.up(inputs.outputs[rank]), result.handle, stream=_after_all_work(given, stream))
    with stream:
        checks.assert_combined(buffer, inputs, combined)


class _Protocol:
    """Somebody else's stream object."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def __cuda_stream__(self):
        return (0, self._stream.ptr)


def _after_all_work(given, stream):
    """`given`, once `stream` waits for the current one, in which the argument was made."""
    stream.wait_event(cupy.cuda.get_current_stream().record())
    return given


@two_ranks
def test_no_stream(comm, buffer):
    mine = moe.inputs(comm.rank, 2)
    with raises(InputError, "^stream: got 'soon'; wanted a CUDA stream"):
        buffer.get_dispatch_layout(CUPY.up(mine.topk_idx), moe.num_experts(2), stream="soon")
    with raises(InputError, "^stream: got 'soon'"):
        buffer.record_stream(CUPY.up(mine.x), "soon")
    moe.assert_works(buffer)


@two_ranks
def test_get_comm_stream(buffer):
    """The stream of the asynchronous calls; of torch, if the program uses that."""
    moe.assert_works(buffer)
    stream = buffer.get_comm_stream()
    handle = getattr(stream, "cuda_stream", None) or stream.ptr
    assert handle not in (0, 1, 2)
    if has_gpu("torch"):
        import torch

        assert isinstance(buffer.get_comm_stream(), torch.cuda.Stream)


# -- memory that is used again ------------------------------------------------------------------------------------


@two_ranks
@pytest.mark.parametrize("known_by", ["current_stream", "event", "record_stream"])
def test_a_slow_consumer(buffer, known_by):
    """It reads an output that was dropped long ago, from memory that the next outputs would like to have."""
    first = LARGE.inputs(2)
    other = first.with_rows(seed=1)
    rank = buffer.rank
    want, other_want = (inputs.dispatched[rank].recv_x for inputs in (first, other))
    main, side = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with side:  # pools and kernels are warm
        busy(0)
        copies = [blank(want) for _ in range(3)]
        side.synchronize()
    with main:
        _, result = checks.dispatch(buffer, first)
        handle, x, other_x = result.handle, CUPY.up(first.x[rank]), CUPY.up(other.x[rank])
        main.synchronize()
    for copy in copies:
        if known_by == "current_stream":
            with side:
                received = buffer.dispatch(x, handle=handle)
            with main:
                buffer.dispatch(other_x, handle=handle)  # from here on calls are in line with each other, not with side
        elif known_by == "event":
            with main:
                received = buffer.dispatch(x, handle=handle, async_finish=True)
            with side:
                received.event.current_stream_wait()
        else:
            with main:
                received = buffer.dispatch(x, handle=handle)
                side.wait_event(main.record())
            buffer.record_stream(received.recv_x, side)
        with side:
            busy(SPIN_MS)
            assign(copy, received.recv_x)
        del received
        with main:
            # More than there is room for, before the copy has begun.
            held = [buffer.dispatch(other_x, handle=handle) for _ in range(MORE_THAN_FIT)]
            assert_bitwise(down(held[-1].recv_x), other_want)
        del held
    side.synchronize()
    for copy in copies:
        assert_bitwise(down(copy), want)


@two_ranks
def test_a_slow_expert_in_front_of_combine(buffer):
    """Rows are written late into get_combine_buffer, which was handed out while its memory was still read."""
    inputs = LARGE.inputs(2)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        _, result = checks.dispatch(buffer, inputs)
        outputs = CUPY.up(inputs.outputs[buffer.rank])
        for number in range(6):
            rows = buffer.get_combine_buffer(result.handle, "bfloat16")
            busy(SPIN_MS / 4)
            assign(rows, outputs)
            combined = buffer.combine(rows, result.handle)
            del rows
            if number % 2:
                checks.assert_combined(buffer, inputs, combined)
        checks.assert_combined(buffer, inputs, combined)


@two_ranks
def test_ten_outputs_at_once(buffer):
    """Each keeps its rows; what does not fit into the arena lies elsewhere."""
    inputs = [LARGE.inputs(2, seed) for seed in range(3)]
    held = []
    for number in range(30):
        mine = inputs[number % 3]
        held.append((mine, checks.dispatch(buffer, mine)[1]))
        if len(held) > 10:
            del held[number % 7]
    for mine, result in held:
        checks.assert_dispatched(buffer, mine, result)


@two_ranks
@pytest.mark.parametrize("how", ["thread", "collector", "exception"])
def test_outputs_are_dropped_anywhere(buffer, how):
    """In another thread, by the collector, while an exception goes up: their memory comes back."""
    inputs = LARGE.inputs(2)
    _, result = checks.dispatch(buffer, inputs)
    x = CUPY.up(inputs.x[buffer.rank])
    handle, total = result.handle, 0
    del result
    for number in range(60):
        held = [buffer.dispatch(x, handle=handle)]
        if how == "thread":
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
        elif how == "collector":
            held.append(held)
            del held
            gc.collect()
        else:
            with pytest.raises(RuntimeError, match="lost"):
                _raise_with(held)
            held.clear()
        total = max(total, buffer.stats["arena_bytes_live"] + buffer.stats["outputs_bytes_live"])
        if number == 10:
            early = total
    assert total <= early
    checks.assert_dispatched(buffer, inputs, buffer.dispatch(x, handle=handle), is_cached=True)


def _raise_with(held) -> None:
    rows = held[0].recv_x
    raise RuntimeError(f"lost {rows.shape}")


@two_ranks
@pytest.mark.parametrize("frames", [TORCH, JAX], ids=lambda frames: frames.name)
def test_a_slow_consumer_in_another_framework(buffer, frames):
    """PyTorch in a side stream that is told of; JAX in streams that nobody tells of."""
    if not has_gpu(frames.name):
        pytest.skip(f"{frames.name} has no GPU")
    first = LARGE.inputs(2)
    other = first.with_rows(seed=1)
    rank, want = buffer.rank, first.dispatched[buffer.rank].recv_x
    _, result = checks.dispatch(buffer, first, frames)
    x, other_x = frames.up(first.x[rank]), frames.up(other.x[rank])
    slow = _slow_torch(buffer) if frames is TORCH else _slow_jax()
    copies = [slow(result.recv_x)]
    frames.synchronize()
    for _ in range(3):
        received = buffer.dispatch(x, handle=result.handle)
        copies.append(slow(received.recv_x))
        del received
        held = [buffer.dispatch(other_x, handle=result.handle) for _ in range(MORE_THAN_FIT)]
        del held
    frames.synchronize()
    for copy in copies:
        assert_bitwise(down(copy), want)


def _slow_torch(buffer):
    import torch

    side = torch.cuda.Stream()

    def slow(x):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(40_000_000)
            copy = x.clone()
        buffer.record_stream(x, side)
        return copy

    return slow


def _slow_jax():
    import jax
    import jax.numpy as jnp

    weights = jnp.ones((2048, 2048), jnp.float32) / 2048

    @jax.jit
    def slow(x):
        # Matrix products that take some milliseconds, and whose result is exactly 0 in the end.
        product = jax.lax.fori_loop(0, 60, lambda _, w: w @ weights, weights)
        zero = jnp.where(jnp.isfinite(product[0, 0]), 0.0, 1.0).astype(x.dtype)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16) + jax.lax.bitcast_convert_type(zero, jnp.uint16)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    return slow


# -- the end of the Buffer ----------------------------------------------------------------------------------------


@two_ranks
@pytest.mark.parametrize("num_nvl_bytes", [ARENA_BYTES, 0], ids=["arena", "window"])
def test_results_after_destroy(comm, num_nvl_bytes):
    """Outputs stay as they are after their Buffer is gone, and while its successors work."""
    inputs = UNIFORM.inputs(2)
    buffer = make_buffer(comm, num_nvl_bytes)
    _, result = checks.dispatch(buffer, inputs)
    combined = checks.combine(buffer, inputs, result, 1)
    rows = buffer.get_combine_buffer(result.handle, "bfloat16")
    buffer.destroy()
    for seed in range(3):
        with make_buffer(comm, num_nvl_bytes) as other:
            moe.assert_works(other, seed)
    checks.assert_combined(buffer, inputs, combined, 1)
    view, want = result.recv_x[1:], inputs.dispatched[comm.rank].recv_x[1:]
    assign(rows, result.recv_x)
    assert_bitwise(down(rows), inputs.dispatched[comm.rank].recv_x)
    checks.assert_dispatched(buffer, inputs, result)
    del buffer, result, rows, combined
    gc.collect()
    assert_bitwise(down(view), want)


@two_ranks
def test_destroy_with_work_under_way(comm):
    """Calls that were launched end; their results can be used."""
    inputs = LARGE.inputs(2)
    buffer = make_buffer(comm)
    _, result = checks.dispatch(buffer, inputs)
    x = CUPY.up(inputs.x[comm.rank])
    if comm.rank == 1:
        busy(SPIN_MS)
    cached = [buffer.dispatch(x, handle=result.handle) for _ in range(3)]
    buffer.destroy()
    for one in cached:
        assert_bitwise(down(one.recv_x), inputs.dispatched[comm.rank].recv_x)
