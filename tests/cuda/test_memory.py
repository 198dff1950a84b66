"""What a Buffer holds on a GPU, what it says about it, and that it gives it back."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from helpers import checks, moe
from helpers.calls import TIMEOUT_S, raises
from helpers.cases import CASES, Case
from helpers.frames import CUPY, assign, down
from helpers.gpu import has_gpu, need_gpu

from epcomm import Buffer
from epcomm.errors import DtypeError, HandleError, ShapeError
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu

ARENA_BYTES = 4 << 20
UNIFORM = next(case for case in CASES if case.name == "uniform")


def make_buffer(comm, num_nvl_bytes: int = ARENA_BYTES) -> Buffer:
    return Buffer(comm, num_nvl_bytes, backend="cuda", timeout_s=TIMEOUT_S)


@pytest.mark.ranks(2, timeout=240)
def test_200_buffers_one_after_another(comm):
    """Destroyed or not, with outputs alive or not, they leave no memory, descriptors or communicators behind."""

    def cycle(number: int) -> None:
        buffer = make_buffer(comm)
        result = moe.send(buffer, moe.inputs(comm.rank, 2))
        if number % 2:
            del result
        if number % 3:
            buffer.destroy()

    def settle() -> tuple[int, int]:
        gc.collect()
        CUPY.synchronize()
        make_buffer(comm).destroy()  # a construction sweeps what was parked
        comm.barrier()
        return cupy.cuda.runtime.memGetInfo()[0], len(os.listdir("/proc/self/fd"))

    for number in range(6):
        cycle(number)
    free_before, files_before = settle()
    for number in range(200):
        cycle(number)
    free_after, files_after = settle()
    assert free_before - free_after < 256 << 20
    assert files_after <= files_before + 4


@pytest.mark.ranks((1, 3))
def test_counters(comm, num_ranks):
    inputs = UNIFORM.inputs(num_ranks)
    want = inputs.dispatched[comm.rank]
    with make_buffer(comm) as buffer:
        before = buffer.stats
        _, result = checks.dispatch(buffer, inputs)
        buffer.dispatch(CUPY.up(inputs.x[comm.rank]), handle=result.handle)
        checks.combine(buffer, inputs, result)
        after = buffer.stats
        grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        assert grown["get_dispatch_layout_calls"] == grown["combine_calls"] == grown["combine_in_arena"] == 1
        assert grown["dispatch_calls"] == grown["dispatch_in_arena"] == 2
        assert grown["rows_received"] == 2 * want.num_recv_tokens
        assert grown["rows_sent"] == int(checks.reference_mask(buffer, inputs).sum())
        assert "dispatch_by_window" not in grown
        assert grown["arena_bytes_live"] >= want.recv_x.nbytes
        assert after["arena_bytes_total"] == ARENA_BYTES
        CUPY.synchronize()
        comm.barrier()


@pytest.mark.ranks(2)
def test_local_buffer_tensor(comm):
    """The arena as it is: outputs of dispatch lie in it."""
    inputs = UNIFORM.inputs(2)
    with make_buffer(comm) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        arena = buffer.get_local_buffer_tensor(np.uint8)
        assert arena.shape == (ARENA_BYTES,)
        assert isinstance(arena, cupy.ndarray)
        want = inputs.dispatched[comm.rank].recv_x
        offset = result.recv_x.data.ptr - arena.data.ptr
        assert 0 <= offset <= ARENA_BYTES - want.nbytes
        assert_bitwise(down(arena[offset : offset + want.nbytes]), want.view(np.uint8).reshape(-1))
        part = buffer.get_local_buffer_tensor("bfloat16", want.shape, offset)
        assert_bitwise(down(part), want)
        for wrong in ({"size": ARENA_BYTES + 1}, {"offset": -1}, {"size": 1, "offset": ARENA_BYTES}):
            with raises(ShapeError, "^get_local_buffer_tensor: got bytes"):
                buffer.get_local_buffer_tensor(np.uint8, **wrong)
        with raises(ShapeError, "^get_local_buffer_tensor: got bytes 1 to"):
            buffer.get_local_buffer_tensor(np.float32, 4, 1)
    for seed in range(3):  # the view outlives the Buffer, and others do not get its memory
        with make_buffer(comm) as other:
            moe.assert_works(other, seed)
    assert_bitwise(down(part), want)


@pytest.mark.ranks(2)
def test_local_buffer_tensor_of_torch(comm):
    if not has_gpu("torch"):
        pytest.skip("torch has no GPU")
    import torch

    with make_buffer(comm) as buffer:
        tensor = buffer.get_local_buffer_tensor(torch.float32, (2, 3), 128)
        assert (type(tensor), tensor.dtype, tuple(tensor.shape)) == (torch.Tensor, torch.float32, (2, 3))
        assert tensor.is_cuda
        arena = buffer.get_local_buffer_tensor(np.uint8)
        assert tensor.data_ptr() == arena.data.ptr + 128


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_nvl_bytes", [ARENA_BYTES, 0], ids=["arena", "outside"])
def test_combine_buffer(comm, num_nvl_bytes):
    """Memory of its own, as often as it is asked for, wherever there is room."""
    inputs = UNIFORM.inputs(2)
    with make_buffer(comm, num_nvl_bytes) as buffer, make_buffer(comm) as other:
        _, result = checks.dispatch(buffer, inputs)
        rows = [buffer.get_combine_buffer(result.handle, "bfloat16") for _ in range(3)]
        outputs = CUPY.up(inputs.outputs[comm.rank])
        for one in rows:
            assert (one.shape, one.dtype) == (outputs.shape, moe.BFLOAT16)
            assign(one, outputs)
        for one in rows:
            before = buffer.stats["combine_in_arena"]
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, x=one))
            assert buffer.stats["combine_in_arena"] - before == (1 if num_nvl_bytes else 0)
        checks.assert_dispatched(buffer, inputs, result)
        assert buffer.get_combine_buffer(result.handle, np.float32).nbytes == 2 * outputs.nbytes
        with raises(DtypeError, "^dtype: got uint8"):
            buffer.get_combine_buffer(result.handle, np.uint8)
        with raises(HandleError, "^handle: got the handle of another Buffer"):
            other.get_combine_buffer(result.handle, "bfloat16")


@pytest.mark.ranks(2)
def test_a_full_arena_comes_back(comm):
    """Held outputs push later ones out of the arena; when they are dropped, it is used again."""
    inputs = Case("64 KiB", tokens=(200,), hidden=256).inputs(2)
    with make_buffer(comm, 1 << 20) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        x = CUPY.up(inputs.x[comm.rank])
        held = [buffer.dispatch(x, handle=result.handle) for _ in range(30)]
        num_outside = buffer.stats["dispatch_by_window"]
        assert 0 < num_outside < 30
        for one in held:
            checks.assert_dispatched(buffer, inputs, one, is_cached=True)
        del held, one
        CUPY.synchronize()
        before = buffer.stats
        for _ in range(5):
            checks.assert_dispatched(buffer, inputs, buffer.dispatch(x, handle=result.handle), is_cached=True)
        assert buffer.stats["dispatch_in_arena"] - before["dispatch_in_arena"] == 5
        comm.barrier()
