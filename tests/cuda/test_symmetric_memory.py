"""Memory of every rank, mapped by every rank, on a GPU: processes and threads write into each other's region."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
from helpers.gpu import need_gpu

from epcomm.bootstrap import Communicator, run_local
from epcomm.errors import BootstrapError, CapacityError
from epcomm.memory.device import DeviceMemory
from epcomm.memory.symmetric import SymmetricMemory

cupy = need_gpu()
pytestmark = pytest.mark.gpu

SIZE = 3 << 20  # no multiple of the granularity


def over(ptr: int, num_bytes: int, device: int) -> Any:
    """The bytes there, as a CuPy array that owns nothing."""
    memory = cupy.cuda.UnownedMemory(ptr, num_bytes, None, device)
    return cupy.ndarray((num_bytes,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))


def device_of(comm: Communicator) -> int:
    return comm.rank % int(cupy.cuda.runtime.getDeviceCount())


def write_to_all_and_read(comm: Communicator) -> None:
    """Each rank writes a slice of every region; then everybody reads all slices of its own."""
    device = device_of(comm)
    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
        memory = SymmetricMemory(comm, SIZE, device, timeout_s=60.0)
        assert memory.num_bytes >= SIZE
        assert memory.num_bytes == memory.sizes[comm.rank]
        own = over(memory.bases[comm.rank], memory.num_bytes, device)
        assert not own.any()
        comm.barrier()
        slice_bytes = SIZE // comm.size
        for peer, base in enumerate(memory.bases):
            over(base + comm.rank * slice_bytes, slice_bytes, device).fill(1 + comm.rank + 10 * peer)
        stream.synchronize()
        comm.barrier()
        for source in range(comm.size):
            part = own[source * slice_bytes : (source + 1) * slice_bytes]
            assert int(part.min()) == int(part.max()) == 1 + source + 10 * comm.rank
        stream.synchronize()
        comm.barrier()
        if comm.rank == 0:
            memory.close()
        comm.barrier()
        # The memory of a rank that has closed lives while others map it.
        if comm.rank:
            assert int(over(memory.bases[0], 1, device)[0]) == 1
        stream.synchronize()
        memory.close()
        memory.close()
        comm.barrier()


_listing = threading.Lock()


def num_open_files(comm: Communicator) -> int:
    """Of this process, while no other thread of it reads a directory, or opens anything."""
    with _listing:
        number = len(os.listdir("/proc/self/fd"))
    comm.barrier()
    return number


def create_and_close(comm: Communicator, num_cycles: int) -> None:
    device = device_of(comm)

    def cycle() -> None:
        with SymmetricMemory(comm, SIZE, device, timeout_s=60.0):
            comm.barrier()

    cycle()  # the driver opens files of its own at first use
    comm.barrier()
    num_open = num_open_files(comm)
    free, _ = cupy.cuda.runtime.memGetInfo()
    for _ in range(num_cycles):
        cycle()
    comm.barrier()
    assert num_open_files(comm) <= num_open
    assert free - cupy.cuda.runtime.memGetInfo()[0] < 64 << 20
    comm.barrier()


@pytest.mark.ranks((2, 4))
def test_processes_write_into_each_other(comm: Communicator) -> None:
    write_to_all_and_read(comm)


@pytest.mark.ranks((2, 4))
def test_200_buffers_between_processes(comm: Communicator) -> None:
    create_and_close(comm, 200)


@pytest.mark.ranks(2)
def test_all_ranks_raise_when_one_has_no_room(comm: Communicator) -> None:
    size = 1 << 50 if comm.rank == 1 else SIZE
    with pytest.raises(CapacityError if comm.rank == 1 else BootstrapError, match="device memory"):
        SymmetricMemory(comm, size, device_of(comm), timeout_s=60.0)
    write_to_all_and_read(comm)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_threads_write_into_each_other(size: int) -> None:
    run_local(size, write_to_all_and_read)


def test_200_buffers_between_threads() -> None:
    run_local(2, create_and_close, 200)


def test_the_current_device_and_its_context_stay() -> None:
    before = cupy.cuda.runtime.getDevice()
    last = int(cupy.cuda.runtime.getDeviceCount()) - 1
    memory = DeviceMemory.allocate(1, last, shareable=True, zeroed=True)
    assert memory.num_bytes % (1 << 16) == 0
    descriptor = memory.export_fd()
    again = DeviceMemory.import_fd(descriptor, memory.num_bytes, last)
    os.close(descriptor)
    memory.close()
    with cupy.cuda.Device(last):
        assert not over(again.ptr, again.num_bytes, last).any()
        cupy.cuda.runtime.deviceSynchronize()
    again.close()
    assert cupy.cuda.runtime.getDevice() == before
