"""Compile, load and launch on a GPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers.nvrtc import compile_cubin, needs_nvrtc

from epcomm.errors import CapacityError, CompileError
from epcomm.jit.device import device_architecture, device_uuid, num_sms
from epcomm.jit.kernel import Kernel
from epcomm.jit.residency import Footprint, Launch, plan_residency

cupy = pytest.importorskip("cupy", reason="optional package cupy is not installed (extra cuda12 or cuda13)")
pytestmark = [needs_nvrtc, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no GPU")]

ARGUMENTS = np.dtype([("out", "u8"), ("value", "i4"), ("step", "i4")], align=True)
SOURCE = r"""
struct Arguments { int* out; int value; int step; };
static_assert(sizeof(Arguments) == 16, "differs from the test");
extern "C" __global__ void fill(const __grid_constant__ Arguments args) {
    extern __shared__ int scratch[];
    scratch[threadIdx.x] = args.value + args.step * (int)(blockIdx.x * blockDim.x + threadIdx.x);
    __syncthreads();
    args.out[blockIdx.x * blockDim.x + threadIdx.x] = scratch[threadIdx.x];
}
extern "C" __global__ void nothing(const __grid_constant__ Arguments args) {}
"""


@pytest.fixture(scope="module")
def cubin():
    return compile_cubin(SOURCE, device_architecture(0))


@pytest.fixture(scope="module")
def fill(cubin):
    return Kernel(cubin, "fill", 0)


def arguments(out, value: int, step: int) -> np.ndarray:
    return np.array([(out.data.ptr, value, step)], ARGUMENTS)


def test_arguments_are_copied_at_the_call(fill):
    out = cupy.zeros((2, 4 * 64), cupy.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    args = arguments(out[0], 5, 2)
    fill.launch(4, 64, 64 * 4, stream.ptr, args.ctypes.data)
    args["out"], args["value"] = out[1].data.ptr, 7
    fill.launch(4, 64, 64 * 4, stream.ptr, args.ctypes.data)
    stream.synchronize()
    assert (out.get() == 2 * np.arange(4 * 64) + np.array([[5], [7]])).all()


def test_attributes_and_shared_memory(cubin):
    fill = Kernel(cubin, "fill", 0)
    assert 32 <= fill.max_threads <= 1024
    assert 0 < fill.registers < 64
    assert (fill.static_shared_bytes, fill.local_bytes) == (0, 0)
    assert fill.blocks_per_sm(512, 200 << 10) == 0
    fill.allow_shared(160 << 10)
    assert fill.blocks_per_sm(512, 160 << 10) == 1
    assert fill.blocks_per_sm(64, 1024) > 4
    out = cupy.zeros(64, cupy.int32)
    fill.launch(1, 64, 160 << 10, cupy.cuda.get_current_stream().ptr, arguments(out, 1, 0).ctypes.data)
    assert (out.get() == 1).all()
    with pytest.raises(CapacityError, match="fill: shared memory: got 1048576 bytes"):
        fill.allow_shared(1 << 20)


def test_errors(cubin, fill):
    with pytest.raises(CompileError, match=r"^absent: got .*NOT_FOUND"):
        Kernel(cubin, "absent", 0)
    with pytest.raises(cupy.cuda.driver.CUDADriverError):
        fill.launch(1, 4096, 0, 0, arguments(cupy.zeros(1, cupy.int32), 0, 0).ctypes.data)


def test_a_fresh_thread_loads_and_launches(cubin):
    """A rank that is a thread: nothing of CUDA is current in it yet."""
    results: list[object] = []

    def rank() -> None:
        try:
            fill = Kernel(cubin, "fill", 0)
            cupy.cuda.Device(0).use()
            out = cupy.zeros(32, cupy.int32)
            fill.launch(1, 32, 128, cupy.cuda.get_current_stream().ptr, arguments(out, 3, 0).ctypes.data)
            results.append(out.get().tolist())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[3] * 32] * 4


def test_residency():
    uuid, sms = device_uuid(0), num_sms(0)
    assert len(uuid) == 32
    plan_residency([Footprint(uuid, sms, (Launch(sms, 1),))])
    with pytest.raises(CapacityError, match=rf"set_num_sms\({sms}\)"):
        plan_residency([Footprint(uuid, sms, (Launch(sms + 1, 1),))])
