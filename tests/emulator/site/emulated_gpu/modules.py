"""Compiled programs: loading them, what their kernels are like, and launching those."""

from __future__ import annotations

import ctypes
import itertools
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emulated_gpu import device
from emulated_gpu.queues import find as find_queue
from emulated_gpu.status import GpuError, Status

__all__ = ["Function", "find", "function", "launch", "load", "occupancy", "pack"]

_HANDLES = itertools.count(0xC0DE0000, 0x10)
_STATIC_LIMIT, _SM_BYTES, _BLOCK_LIMIT = (device.ATTRIBUTES[number] for number in (8, 81, 97))
_SYSTEM_BYTES = 1024  # of shared memory, which each block takes beside its own
_REGISTERS = 32  # of a thread; the emulator has none to count

_modules: dict[int, ctypes.CDLL] = {}
_functions: dict[int, Function] = {}
_by_name: dict[tuple[int, str], int] = {}
_loading = threading.Lock()


@dataclass
class Function:
    """A kernel. `max_dynamic_shared` is what launches may ask for."""

    name: str
    address: Any
    start: Any  # emulator_launch of its program
    parameter_bytes: int
    parameter_offsets: list[int]  # and the end of the last one
    max_threads: int
    static_shared: int
    max_dynamic_shared: int = _STATIC_LIMIT

    def attribute(self, number: int) -> int:
        """By number of CUfunction_attribute."""
        known = {0: self.max_threads, 1: self.static_shared, 3: 0, 4: _REGISTERS, 8: self.max_dynamic_shared}
        if number not in known:
            raise GpuError(Status.INVALID_VALUE, f"function attribute {number} is not emulated")
        return known[number]

    def set_attribute(self, number: int, value: int) -> None:
        if number == 9:  # how much of an SM's memory is to be shared memory: a hint
            return
        if number != 8 or not 0 <= value <= _BLOCK_LIMIT - self.static_shared:
            raise GpuError(Status.INVALID_VALUE, f"invalid argument: {value} for function attribute {number}")
        self.max_dynamic_shared = value


def load(image: bytes) -> int:
    """Handle of a program."""
    if not image.startswith(b"\x7fELF"):
        raise GpuError(Status.INVALID_IMAGE, "device kernel image is invalid")
    # A new name for each: the loader takes equal names for equal libraries.
    handle, path = tempfile.mkstemp(suffix=".so", prefix="emulated-gpu-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    finally:
        os.unlink(path)
    compiled_for = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(library, "emulator_architecture"))).value
    if not _runs((compiled_for or b"").decode()):
        raise GpuError(Status.NO_BINARY_FOR_GPU, f"no kernel image is available: {compiled_for!r}")
    module = next(_HANDLES)
    _modules[module] = library
    return module


def _runs(architecture: str) -> bool:
    """Whether this GPU takes programs for ``sm_XX``, or for ``sm_XXa`` where it is just that."""
    number = int("".join(filter(str.isdigit, architecture)))
    if not architecture[-1].isdigit():
        return number == device.ARCHITECTURE
    return number // 10 == device.ARCHITECTURE // 10 and number <= device.ARCHITECTURE


def function(module: int, name: str) -> int:
    """Handle of a kernel."""
    with _loading:
        known = _by_name.get((module, name))
        if known is not None:
            return known
        library = _modules[module]
        try:
            address = getattr(library, name)
            parameter_bytes = ctypes.c_size_t.in_dll(library, f"{name}_parameter_bytes").value
            max_threads = ctypes.c_uint32.in_dll(library, f"{name}_max_threads").value
            count = ctypes.c_uint32.in_dll(library, f"{name}_parameter_count").value
            offsets = list((ctypes.c_uint32 * (count + 1)).in_dll(library, f"{name}_parameter_offsets"))
        except (AttributeError, ValueError) as error:
            raise GpuError(Status.NOT_FOUND, "named symbol not found") from error
        start = library.emulator_launch
        start.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p)
        handle = next(_HANDLES)
        entry = ctypes.cast(address, ctypes.c_void_p)
        static = library.emulator_static_shared_bytes()
        _functions[handle] = Function(name, entry, start, parameter_bytes, offsets, max_threads, static)
        _by_name[module, name] = handle
        return handle


def find(handle: int) -> Function:
    found = _functions.get(handle)
    if found is None:
        raise GpuError(Status.INVALID_HANDLE, f"no function {handle:#x}")
    return found


def pack(handle: int, values: Sequence[bytes]) -> bytes:
    """The parameters of a kernel as they lie in memory."""
    called = find(handle)
    sizes = [len(value) for value in values]
    offsets = called.parameter_offsets
    if len(values) != len(offsets) - 1 or any(a + n > b for a, n, b in zip(offsets, sizes, offsets[1:], strict=False)):
        raise GpuError(Status.INVALID_VALUE, f"{called.name}: parameters of {sizes} bytes at {offsets}")
    packed = bytearray(called.parameter_bytes)
    for offset, value in zip(offsets, values, strict=False):
        packed[offset : offset + len(value)] = value
    return bytes(packed)


def launch(handle: int, blocks: int, threads: int, shared_bytes: int, stream: int, arguments: int | bytes) -> None:
    """Launch a grid. `arguments` is the struct of its parameters or the address of one; it is copied now."""
    called = find(handle)
    if not (0 < blocks < 1 << 31 and 0 < threads <= called.max_threads):
        raise GpuError(Status.INVALID_VALUE, f"invalid argument: {blocks} blocks of {threads} threads")
    if not 0 <= shared_bytes <= called.max_dynamic_shared:
        raise GpuError(Status.INVALID_VALUE, f"invalid argument: {shared_bytes} bytes of shared memory")
    given = arguments if isinstance(arguments, bytes) else ctypes.string_at(arguments, called.parameter_bytes)
    if len(given) != called.parameter_bytes:
        raise GpuError(Status.INVALID_VALUE, f"{called.name}: {len(given)} bytes, not {called.parameter_bytes}")

    def execute() -> None:
        if called.start(called.address, blocks, threads, shared_bytes, given) != 0:
            device.fail(f"{called.name}: {blocks} blocks of {threads} threads failed")

    find_queue(stream).submit(execute)


def occupancy(handle: int, threads: int, shared_bytes: int) -> int:
    """Blocks of this size that fit one SM."""
    called = find(handle)
    if threads > called.max_threads or shared_bytes > called.max_dynamic_shared:
        return 0
    by_memory = _SM_BYTES // (shared_bytes + called.static_shared + _SYSTEM_BYTES)
    return min(device.ATTRIBUTES[106], device.ATTRIBUTES[39] // (-(-threads // 32) * 32), by_memory)
