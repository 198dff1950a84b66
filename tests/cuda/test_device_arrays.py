"""Arrays of CuPy, PyTorch and JAX over GPU memory that we own: same pointer, right order, freed with the last view."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.gpu import has_gpu

from epcomm.arrays import ArrayView, array_spec, import_array
from epcomm.arrays.device import device_array
from epcomm.arrays.streams import as_stream, current_stream
from epcomm.dlpack import CUDA
from epcomm.memory.blocks import BlockPool
from epcomm.memory.device import DeviceMemory
from epcomm.memory.local_pool import LocalPool
from epcomm.memory.timeline import CudaTimeline

cupy = pytest.importorskip("cupy", reason="optional package cupy is not installed (extra cuda12 or cuda13)")
pytestmark = pytest.mark.skipif(not cupy.cuda.is_available(), reason="no GPU")

DTYPES = [
    np.dtype(scalar)
    for scalar in (
        ml_dtypes.bfloat16,
        np.float16,
        np.float32,
        ml_dtypes.float8_e4m3fn,
        np.int32,
        np.int64,
        np.uint8,
        np.bool_,
    )
]
FRAMEWORKS = ["cupy", "torch", "jax", "dlpack"]
SHAPE = (16, 64)
# Cycles for which a kernel of `busy` keeps its stream: some 20 ms.
SPIN_CYCLES = 40_000_000

busy_kernel = cupy.RawKernel(
    'extern "C" __global__ void busy(long long cycles, int* x, int value) {'
    "  long long start = clock64(); while (clock64() - start < cycles) {} *x = value; }",
    "busy",
)


def need(framework: str) -> None:
    if not has_gpu(framework):
        pytest.skip(f"{framework} has no GPU")


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    memory = DeviceMemory.allocate(1 << 20, 0, shareable=False, zeroed=True)
    pool = BlockPool(memory.ptr, memory.num_bytes, CudaTimeline(0))
    yield pool
    gc.collect()
    cupy.cuda.runtime.deviceSynchronize()
    assert pool.settle(synchronize=True)
    memory.close()


def view_of(ptr: int, shape: tuple[int, ...], dtype: Any, owner: object) -> ArrayView:
    return ArrayView(array_spec("", shape, None, np.dtype(dtype), (CUDA, 0)), ptr, owner)


def over(ptr: int, num_bytes: int, owner: object = None) -> Any:
    """The bytes there, as a CuPy array."""
    memory = cupy.cuda.UnownedMemory(ptr, num_bytes, owner, 0)
    return cupy.ndarray((num_bytes,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))


def bits_of(array: Any, framework: str) -> np.ndarray:
    """The bytes of an array, read through its framework."""
    if framework == "torch":
        torch = importlib.import_module("torch")
        return array.contiguous().view(torch.uint8).cpu().numpy().reshape(-1)
    if framework == "jax":
        return np.asarray(array).reshape(-1).view(np.uint8)
    view = import_array(array, "x")
    return over(view.ptr, int(np.prod(view.shape)) * view.dtype.itemsize).get()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_round_trip_by_pointer(pool: BlockPool, framework: str, dtype: np.dtype[Any]) -> None:
    need(framework)
    num_bytes = SHAPE[0] * SHAPE[1] * dtype.itemsize
    octets = (np.arange(num_bytes) % (2 if dtype.kind == "b" else 120)).astype(np.uint8)
    stream = cupy.cuda.get_current_stream(0).ptr
    block = pool.allocate(num_bytes, stream)
    assert block is not None
    over(block.ptr, num_bytes).set(octets)
    array = device_array(framework, view_of(block.ptr, SHAPE, dtype, block), stream)
    if framework == "jax" and dtype == np.int64 and array.dtype == np.int32:
        return  # JAX without x64 copies
    view = import_array(array, "x", stream=stream)
    assert (view.framework, view.ptr, view.shape, view.strides) == (framework, block.ptr, SHAPE, (64, 1))
    assert (view.dtype, view.device) == (dtype, (CUDA, 0))
    assert bits_of(array, framework).tolist() == octets.tolist()


@pytest.mark.parametrize("source", FRAMEWORKS[:3])
def test_zero_rows(pool: BlockPool, source: str) -> None:
    need(source)
    block = pool.allocate(0, 0)
    assert block is not None
    array = device_array(source, view_of(block.ptr, (0, 64), np.float32, block), 0)
    assert import_array(array, "x", stream=0).shape == (0, 64)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_consumers_wait_for_the_stream_that_fills_the_memory(pool: BlockPool, framework: str) -> None:
    need(framework)
    ours = cupy.cuda.Stream(non_blocking=True)
    block = pool.allocate(4, ours.ptr)
    assert block is not None
    x = over(block.ptr, 4).view(np.int32)
    for value in (7, 8):
        with ours:
            busy_kernel((1,), (1,), (np.int64(SPIN_CYCLES), x, np.int32(value)))
        array = device_array(framework, view_of(block.ptr, (1,), np.int32, block), ours.ptr)
        if framework == "torch":
            read = int((array + 0).cpu())
        elif framework == "jax":
            read = int(np.asarray(array + 0)[0])
        elif framework == "dlpack":
            read = int((cupy.from_dlpack(array) + 0).get()[0])
        else:
            read = int((array + 0).get()[0])
        assert read == value
        del array


def test_memory_is_reused_behind_its_readers(pool: BlockPool) -> None:
    """The reader's kernel is slow; the next owner, on another stream, writes only when it is done."""
    reader, writer = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    seen = cupy.zeros(1, np.int32)
    cupy.cuda.runtime.deviceSynchronize()
    everything = pool.stats["bytes_total"]
    first = pool.allocate(everything, reader.ptr)
    assert first is not None
    address = first.ptr
    with reader:
        x = device_array("cupy", view_of(address, (1,), np.int32, first), reader.ptr)
        busy_kernel((1,), (1,), (np.int64(SPIN_CYCLES), x, np.int32(1)))
        cupy.copyto(seen, x)
    del first, x
    second = pool.allocate(everything, writer.ptr)
    assert second is not None
    assert second.ptr == address
    with writer:
        over(address, 4).view(np.int32).fill(2)
    cupy.cuda.runtime.deviceSynchronize()
    assert int(seen[0]) == 1
    assert int(over(address, 4).view(np.int32)[0]) == 2


@pytest.mark.parametrize("framework", FRAMEWORKS[:3])
def test_block_is_freed_with_the_last_view(pool: BlockPool, framework: str) -> None:
    need(framework)
    block = pool.allocate(4096, 0)
    assert block is not None
    array = device_array(framework, view_of(block.ptr, (32, 32), np.float32, block), 0)
    view = array[3:5]  # for JAX a copy
    del block
    pool.largest_free()
    assert pool.stats["num_live"] == 1
    del array
    gc.collect()
    pool.largest_free()
    assert pool.stats["num_live"] == (0 if framework == "jax" else 1)
    del view
    gc.collect()
    pool.largest_free()
    assert pool.stats["num_live"] == 0


def test_capture_takes_memory_for_good(pool: BlockPool) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    used = pool.allocate(1 << 18, stream.ptr)
    assert used is not None
    used.note_reader(stream.ptr)
    with stream:
        busy_kernel((1,), (1,), (np.int64(SPIN_CYCLES), over(used.ptr, 4), np.int32(1)))
        del used
        pool.largest_free()
        stream.begin_capture()
        block = pool.allocate(1 << 18, stream.ptr)
        local = LocalPool(0, CudaTimeline(0))
        grown = local.allocate(1 << 20, stream.ptr)  # mapping memory is allowed during a capture
        over(grown.ptr, 16).fill(3)
        graph = stream.end_capture()
    assert block is not None
    graph.launch(stream)
    stream.synchronize()
    assert over(grown.ptr, 16).get().tolist() == [3] * 16
    del block, grown
    pool.largest_free()
    assert pool.stats["bytes_pinned"] == 1 << 18
    local.release()


def test_streams_of_the_frameworks() -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert current_stream("cupy", 0) == stream.ptr == as_stream(stream)
    if "torch" in sys.modules and has_gpu("torch"):
        torch = sys.modules["torch"]
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            assert current_stream("torch", 0) == other.cuda_stream == as_stream(other)


PROGRAM = """
import sys, types
import {framework}
import numpy as np
import cupy
from epcomm.arrays import ArrayView, array_spec
from epcomm.arrays.device import device_array
from epcomm.memory.blocks import BlockPool
from epcomm.memory.device import DeviceMemory
from epcomm.memory.timeline import CudaTimeline
memory = DeviceMemory.allocate(1 << 20, 0, shareable=True, zeroed=True)
pool = BlockPool(memory.ptr, memory.num_bytes, CudaTimeline(0))
def output():
    block = pool.allocate(4096, 0)
    spec = array_spec("", (32, 32), None, np.dtype(np.float32), (2, 0))
    return device_array("{framework}", ArrayView(spec, block.ptr, block), 0)
keep = types.ModuleType("keep")
sys.modules["keep"] = keep
keep.output = output()
cycle = [output()]
cycle.append(cycle)
sys.attic = output()
"""


@pytest.mark.parametrize("framework", FRAMEWORKS[:3])
def test_interpreter_exit_with_live_outputs(framework: str) -> None:
    need(framework)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM.format(framework=framework)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr
