"""Device memory and pinned memory."""

from __future__ import annotations

import ctypes
from typing import Any

from emulated_gpu import addresses, device, queues
from emulated_gpu.memory import Allocation

from cupy.cuda import runtime
from cupy.cuda.devices import Device
from cupy.cuda.streams import get_current_stream

__all__ = [
    "Memory",
    "MemoryPointer",
    "UnownedMemory",
    "alloc",
    "alloc_pinned_memory",
    "default_pool",
]


class Memory:
    """New device memory. Freed behind the work of the stream that was current when it was made, as CuPy's pool does:
    other streams have to be waited for before it goes."""

    def __init__(self, size: int) -> None:
        self.size, self.device_id = size, device.current()
        self._allocation = _allocate(size)
        self.ptr = self._allocation.ptr

    @property
    def device(self) -> Device:
        return Device(self.device_id)


@runtime.raising
def _allocate(size: int) -> Allocation:
    device.check()
    return Allocation(size, queues.find(get_current_stream().ptr))


class UnownedMemory:
    """Memory that is kept alive by `owner`."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner = ptr, size, owner
        self.device_id = device.current() if device_id == -1 else device_id

    @property
    def device(self) -> Device:
        return Device(self.device_id)


class MemoryPointer:
    """A place in a memory."""

    def __init__(self, mem: Memory | UnownedMemory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset
        self._offset = offset

    @property
    def device(self) -> Device:
        return self.mem.device

    @property
    def device_id(self) -> int:
        return self.mem.device_id

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, num_bytes: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self._offset + num_bytes)

    def copy_from_device_async(self, source: MemoryPointer, size: int, stream: Any = None) -> None:
        stream = stream or get_current_stream()
        runtime.memcpyAsync(self.ptr, source.ptr, size, runtime.memcpyDeviceToDevice, stream.ptr)


def alloc(size: int) -> MemoryPointer:
    """New memory, of undefined content."""
    return MemoryPointer(Memory(size), 0)


def alloc_pinned_memory(size: int) -> Any:
    """New pinned memory, a buffer with a `ptr`. As that of CuPy's pool it stays until the process ends."""
    num_bytes = -(-max(size, 1) // addresses.PAGE) * addresses.PAGE
    kind = type("PinnedMemoryPointer", (ctypes.c_uint8 * size,), {})  # with attributes, which ctypes' own has not
    memory = kind.from_address(addresses.new_pages(num_bytes))
    memory.ptr = ctypes.addressof(memory)
    return memory


class _MemoryPool:
    """CuPy's pool of device memory. This one keeps nothing back."""

    def free_all_blocks(self) -> None:
        pass


default_pool = _MemoryPool()
