"""Pages of this process: memory of the GPU is mapped, protected and unmapped here, past Python's own allocators."""

from __future__ import annotations

import ctypes
import mmap
import os

from emulated_gpu.status import GpuError, Status

__all__ = ["PAGE", "allow", "map_file", "new_pages", "punch", "reserve", "unmap"]

PAGE = mmap.PAGESIZE
_FIXED, _NORESERVE = 0x10, 0x4000  # of sys/mman.h
_READ_WRITE, _NONE = mmap.PROT_READ | mmap.PROT_WRITE, 0
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # of linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _mprotect, _fallocate = _libc.mmap, _libc.munmap, _libc.mprotect, _libc.fallocate
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_MAP_FAILED = ctypes.c_void_p(-1).value


def new_pages(num_bytes: int) -> int:
    """Address of new zeroed pages that can be read and written; a page behind them that cannot."""
    address = _map(None, num_bytes + PAGE, _READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    _checked(_mprotect(address + num_bytes, PAGE, _NONE))
    return address


def reserve(num_bytes: int, alignment: int) -> int:
    """Addresses, aligned, without memory behind them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    address = _map(None, num_bytes + alignment, _NONE, flags, -1)
    aligned = -(-address // alignment) * alignment
    if aligned > address:
        unmap(address, aligned - address)
    unmap(aligned + num_bytes, address + alignment - aligned)
    return aligned


def map_file(address: int, num_bytes: int, descriptor: int | None) -> None:
    """Put a file behind reserved addresses, or None: nothing. Nobody may access them yet."""
    if descriptor is None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        _map(address, num_bytes, _NONE, flags | _FIXED, -1)
    else:
        _map(address, num_bytes, _NONE, mmap.MAP_SHARED | _FIXED, descriptor)


def allow(address: int, num_bytes: int) -> None:
    """Let the pages be read and written."""
    _checked(_mprotect(address, num_bytes, _READ_WRITE))


def unmap(address: int, num_bytes: int) -> None:
    """Give addresses back; whoever still uses them crashes."""
    if num_bytes:
        _checked(_munmap(address, num_bytes))


def punch(descriptor: int, num_bytes: int) -> None:
    """Make a file read as zeros, for all who have mapped it, without touching its pages."""
    _checked(_fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, 0, num_bytes))


def _map(address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int) -> int:
    result = _mmap(address, num_bytes, protection, flags, descriptor, 0)
    if result == _MAP_FAILED:
        raise GpuError(Status.OUT_OF_MEMORY, os.strerror(ctypes.get_errno()))
    return int(result)


def _checked(result: int) -> None:
    if result != 0:
        raise GpuError(Status.INVALID_VALUE, os.strerror(ctypes.get_errno()))
