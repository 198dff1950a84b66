"""Memory of the GPU: what CuPy allocates, and CUDA's virtual memory management with file descriptors."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from emulated_gpu import addresses, device
from emulated_gpu.queues import Queue
from emulated_gpu.status import GpuError, Status

__all__ = [
    "GRANULARITY",
    "Allocation",
    "copy",
    "export",
    "fill",
    "free_and_total",
    "import_descriptor",
    "map_memory",
    "new_memory",
    "release",
    "reserve",
    "set_access",
    "unmap",
    "unreserve",
]

GRANULARITY = 2 << 20
_ALIGNMENT = 512  # of what CuPy allocates
_TOTAL_BYTES = int(os.environ.get("EPCOMM_EMULATOR_MEMORY", str(4 << 30)))
_HANDLES = itertools.count(0x9A000000)

_lock = threading.RLock()  # a finalizer may come in between
_used_bytes = 0


def free_and_total() -> tuple[int, int]:
    """Bytes; of what this process itself has taken."""
    return _TOTAL_BYTES - _used_bytes, _TOTAL_BYTES


def _take(num_bytes: int) -> None:
    global _used_bytes
    with _lock:
        if _used_bytes + num_bytes > _TOTAL_BYTES:
            raise GpuError(Status.OUT_OF_MEMORY, f"no room for {num_bytes} bytes")
        _used_bytes += num_bytes


def _give(num_bytes: int) -> None:
    global _used_bytes
    with _lock:
        _used_bytes -= num_bytes


class Allocation:
    """Pages that end with the allocation: behind it, and after it is freed, an access crashes.

    Args:
        num_bytes: of any number.
        queue: the stream whose operations may use the memory until it is unmapped.
    """

    def __init__(self, num_bytes: int, queue: Queue) -> None:
        size = max(-(-num_bytes // _ALIGNMENT), 1) * _ALIGNMENT
        self._num_pages_bytes = -(-size // addresses.PAGE) * addresses.PAGE
        _take(self._num_pages_bytes)
        self._pages = addresses.new_pages(self._num_pages_bytes)
        self._queue = queue
        self.ptr = self._pages + self._num_pages_bytes - size

    def __del__(self, is_ending: Callable[[], bool] = device.is_ending) -> None:
        if hasattr(self, "_queue") and not is_ending():
            self._queue.release(_Free(self._pages, self._num_pages_bytes))


class _Free:
    """Unmaps an allocation."""

    def __init__(self, pages: int, num_bytes: int) -> None:
        self._pages, self._num_bytes = pages, num_bytes

    def __call__(self) -> None:
        # The addresses are never used again, so that whoever still does crashes.
        addresses.map_file(self._pages, self._num_bytes + addresses.PAGE, None)
        _give(self._num_bytes)


# -- virtual memory management ------------------------------------------------------------------------------------


class _Physical:
    """Memory without an address; goes with the last handle and mapping."""

    def __init__(self, descriptor: int, num_bytes: int, is_own: bool) -> None:
        self.descriptor, self.num_bytes, self._is_own = descriptor, num_bytes, is_own

    def __del__(self, is_ending: Callable[[], bool] = device.is_ending) -> None:
        if not is_ending():
            os.close(self.descriptor)
            if self._is_own:
                _give(self.num_bytes)


@dataclass
class _Reservation:
    num_bytes: int
    memory: _Physical | None = field(default=None)


_handles: dict[int, _Physical] = {}
_reserved: dict[int, _Reservation] = {}


def new_memory(num_bytes: int) -> int:
    """A handle of new memory of zeros."""
    if num_bytes <= 0 or num_bytes % GRANULARITY:
        raise GpuError(Status.INVALID_VALUE, f"{num_bytes} bytes are no multiple of the granularity")
    _take(num_bytes)
    descriptor = os.memfd_create("emulated-gpu", os.MFD_CLOEXEC)
    os.truncate(descriptor, num_bytes)
    return _handle(_Physical(descriptor, num_bytes, True))


def _handle(memory: _Physical) -> int:
    handle = next(_HANDLES)
    _handles[handle] = memory
    return handle


def _memory(handle: int) -> _Physical:
    memory = _handles.get(handle)
    if memory is None:
        raise GpuError(Status.INVALID_VALUE, "a handle that was released")
    return memory


def release(handle: int) -> None:
    """Give a handle back; mappings keep the memory."""
    _memory(handle)
    del _handles[handle]


def export(handle: int) -> int:
    """A new descriptor."""
    return os.dup(_memory(handle).descriptor)


def import_descriptor(descriptor: int) -> int:
    """A handle of the memory of another process; the descriptor stays the caller's."""
    try:
        own = os.dup(descriptor)
    except OSError as error:
        raise GpuError(Status.INVALID_VALUE, str(error)) from error
    return _handle(_Physical(own, os.fstat(own).st_size, False))


def reserve(num_bytes: int) -> int:
    """Addresses without memory."""
    if num_bytes <= 0 or num_bytes % GRANULARITY:
        raise GpuError(Status.INVALID_VALUE, f"{num_bytes} bytes are no multiple of the granularity")
    address = addresses.reserve(num_bytes, GRANULARITY)
    _reserved[address] = _Reservation(num_bytes)
    return address


def unreserve(address: int, num_bytes: int) -> None:
    if _reservation(address, num_bytes).memory is not None:
        raise GpuError(Status.INVALID_VALUE, "addresses with memory behind them")
    del _reserved[address]
    addresses.unmap(address, num_bytes)


def _reservation(address: int, num_bytes: int) -> _Reservation:
    """Of exactly this range: all that epcomm needs."""
    reservation = _reserved.get(address)
    if reservation is None or reservation.num_bytes != num_bytes:
        raise GpuError(Status.INVALID_VALUE, f"{num_bytes} bytes at {address:#x} were not reserved")
    return reservation


def map_memory(address: int, num_bytes: int, handle: int) -> None:
    """Put memory behind reserved addresses. Nobody may use them before `set_access`."""
    reservation, memory = _reservation(address, num_bytes), _memory(handle)
    if reservation.memory is not None or memory.num_bytes != num_bytes:
        raise GpuError(Status.INVALID_VALUE, "addresses in use, or memory of another size")
    addresses.map_file(address, num_bytes, memory.descriptor)
    reservation.memory = memory


def set_access(address: int, num_bytes: int) -> None:
    if _reservation(address, num_bytes).memory is None:
        raise GpuError(Status.INVALID_VALUE, "no memory behind these addresses")
    addresses.allow(address, num_bytes)


def unmap(address: int, num_bytes: int) -> None:
    """Take the memory away from its addresses. Does not wait: kernels that still use it crash."""
    reservation = _reservation(address, num_bytes)
    if reservation.memory is None:
        raise GpuError(Status.INVALID_VALUE, "no memory behind these addresses")
    addresses.map_file(address, num_bytes, None)
    reservation.memory = None


# -- what is done with memory -------------------------------------------------------------------------------------


def fill(address: int, value: int, num_bytes: int) -> None:
    """Write one byte everywhere."""
    reservation = _reserved.get(address)
    if value == 0 and reservation is not None and reservation.memory and reservation.num_bytes == num_bytes:
        addresses.punch(reservation.memory.descriptor, num_bytes)  # a new arena costs no pages until it is used
    else:
        ctypes.memset(address, value, num_bytes)


def copy(to: int, source: int, num_bytes: int) -> None:
    ctypes.memmove(to, source, num_bytes)
