"""NVSHMEM for the emulated GPU of tests/emulator, between processes of one host: heaps are files that all PEs map.

`install` puts it where the package looks for the wheel and its host library; its device side is the twin of
``transport/nvshmem.cuh`` in tests/emulator/device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

from epcomm.jit import compiler
from epcomm.jit.nvshmem_wheel import NvshmemWheel
from epcomm.memory import nvshmem_start
from epcomm.memory.nvshmem_library import QueuePairs, Started

__all__ = ["State", "install"]

VERSION = (3, 5, 0)  # with queue pairs
MAX_QUEUE_PAIRS = 128
HEAP_BYTES = 1 << 30  # of addresses: pages come with their first use
MAX_PES = 64
LIMIT_S = 60.0
_CODES = {"good": 0, "bad": 7}


def install() -> None:
    """Does nothing where there is no emulated GPU."""
    if importlib.util.find_spec("emulated_gpu") is None:
        return
    compiler.find_nvshmem = lambda cuda_major: _Wheel(Path(__file__).parent, VERSION)
    nvshmem_start.NvshmemLibrary = EmulatedLibrary


@dataclass(frozen=True)
class _Wheel(NvshmemWheel):
    @property
    def device_library(self) -> Path:
        return Path(__file__)  # of which the disk cache looks at size and age


class State(ctypes.Structure):
    """``emulator::Nvshmem`` of tests/emulator/device/transport/nvshmem.cuh."""

    _fields_ = (
        ("pe", ctypes.c_int32),
        ("num_pes", ctypes.c_int32),
        ("heap_bytes", ctypes.c_uint64),
        ("heap", ctypes.c_uint64 * MAX_PES),
        ("num_queue_pairs", ctypes.c_int32),
        ("queue_pair", ctypes.c_int32 * MAX_QUEUE_PAIRS),
        ("num_messages", ctypes.c_uint32 * MAX_QUEUE_PAIRS),
        ("num_words", ctypes.c_uint32 * MAX_QUEUE_PAIRS),
        ("num_by_default", ctypes.c_uint32),
    )

    @classmethod
    def of_module(cls, module: int) -> State:
        """That of a loaded module, as it is now."""
        from emulated_gpu import modules

        return cls.in_dll(modules._modules[module], "emulated_nvshmem")


class EmulatedLibrary:
    """Stands in for `NvshmemLibrary`."""

    has_queue_pairs = True

    def __init__(self, path: Path) -> None:
        self._status, self._used_bytes = 0, 512
        self._state = State(heap_bytes=HEAP_BYTES)

    def version(self) -> tuple[int, int, int]:
        return VERSION

    def status(self) -> int:
        return self._status

    def unique_id(self) -> bytes:
        return os.urandom(16) + bytes(112)

    def start(self, unique_id: bytes, rank: int, num_ranks: int) -> Started:
        """Map the heaps of all ranks; behind each heap is a page in which they say that they have."""
        stem = f"/dev/shm/epcomm-emulated-nvshmem-{unique_id[:16].hex()}"
        own = f"{stem}-{rank}"
        try:
            with open(own + ".new", "xb") as file:
                os.truncate(file.fileno(), HEAP_BYTES + 4096)
            os.rename(own + ".new", own)
            for pe in range(num_ranks):
                self._state.heap[pe] = _map(f"{stem}-{pe}")
                ctypes.c_uint8.from_address(self._state.heap[pe] + HEAP_BYTES + rank).value = 1
            marks = (ctypes.c_uint8 * num_ranks).from_address(self._state.heap[rank] + HEAP_BYTES)
            _wait(lambda: all(marks))
        except TimeoutError:
            return Started(_CODES["bad"], 1)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(own)
        self._state.pe, self._state.num_pes = rank, num_ranks
        self._status = 3
        return Started(_CODES["good"], self._status)

    def my_pe(self) -> int:
        return int(self._state.pe)

    def num_pes(self) -> int:
        return int(self._state.num_pes)

    def malloc(self, num_bytes: int) -> int:
        num_bytes = -(-num_bytes // 512) * 512
        if self._used_bytes + num_bytes > HEAP_BYTES:
            return 0
        address = self._state.heap[self._state.pe] + self._used_bytes
        self._used_bytes += num_bytes
        return int(address)

    def ptr(self, address: int, pe: int) -> int:
        return int(address - self._state.heap[self._state.pe] + self._state.heap[pe])

    def is_behind_network(self, address: int, pe: int) -> bool:
        return pe != self._state.pe  # see emulator/network.h: what is put arrives late

    def create_queue_pairs(self, count: int) -> QueuePairs:
        handles = [self.num_pes() * (2 + number) for number in range(count)]
        self._state.num_queue_pairs, self._state.queue_pair[:count] = count, handles
        return QueuePairs(_CODES["good"], tuple(handles))

    def register_module(self, module: int) -> int:
        try:
            state = State.of_module(module)
        except ValueError:
            return _CODES["bad"]
        ctypes.memmove(ctypes.addressof(state), ctypes.addressof(self._state), ctypes.sizeof(State))
        return _CODES["good"]

    def unregister_module(self, module: int) -> int:
        return _CODES["good"]


def _map(path: str) -> int:
    """Address of a file that another process makes, in memory that is never unmapped."""
    from emulated_gpu import addresses

    _wait(lambda: os.path.exists(path))
    address = addresses.reserve(HEAP_BYTES + 4096, 2 << 20)
    descriptor = os.open(path, os.O_RDWR)
    try:
        addresses.map_file(address, HEAP_BYTES + 4096, descriptor)
    finally:
        os.close(descriptor)
    addresses.allow(address, HEAP_BYTES + 4096)
    return address


def _wait(is_there) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_there():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.001)
