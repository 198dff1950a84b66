"""CUDA's virtual memory management without a GPU: physical memory is a memory file, addresses are numbers.

It counts what is open, so that tests see leaks, and refuses what a real driver would refuse or crash at.
"""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

GRANULARITY = 2 << 20
SUCCESS = SimpleNamespace(name="CUDA_SUCCESS")


class _Anything:
    """Enumerations and structures, of which only the assignments matter."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.__dict__[name] = _Anything()
        return value

    def __call__(self) -> _Anything:
        return _Anything()

    def __int__(self) -> int:
        return 1


class FakeDriver(_Anything):
    """Stands in for ``cuda.bindings.driver``. `fail` maps a function's name to the status that it shall give.

    Attributes:
        handles: open allocation handle -> descriptor of its memory.
        mapped: mapped address -> descriptor of its memory.
        reserved: reserved address -> bytes.
        access: mapped address -> devices.
    """

    def __init__(self, total_bytes: int = 1 << 40) -> None:
        self.fail: dict[str, str] = {}
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.reserved: dict[int, int] = {}
        self.access: dict[int, set[int]] = {}
        self.total_bytes = total_bytes
        self.streams = 0
        self._next = 1 << 44
        self._lock = threading.Lock()
        self._contexts = threading.local()

    @property
    def num_open(self) -> int:
        """Handles, mappings, reservations and streams; 0 when everything was given back."""
        return len(self.handles) + len(self.mapped) + len(self.reserved) + self.streams

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu"):
            status = object.__getattribute__(self, "fail").get(name)
            if status is not None:
                return lambda *_: (SimpleNamespace(name=status),)
        return object.__getattribute__(self, name)

    def _stack(self) -> list[int]:
        stack: list[int] = self._contexts.__dict__.setdefault("stack", [])
        return stack

    def _take(self, step: int = GRANULARITY) -> int:
        with self._lock:
            self._next += step
            return self._next - step

    def cuInit(self, flags: int) -> Any:
        return (SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return SUCCESS, device

    def cuCtxPushCurrent(self, context: int) -> Any:
        self._stack().append(context)
        return (SUCCESS,)

    def cuCtxPopCurrent(self) -> Any:
        return SUCCESS, self._stack().pop()

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> Any:
        return SUCCESS, GRANULARITY

    def cuMemGetInfo(self) -> Any:
        return SUCCESS, self.total_bytes, self.total_bytes

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> Any:
        assert self._stack(), "no current context"
        assert size % GRANULARITY == 0
        if size > self.total_bytes:
            return (SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"),)
        descriptor = os.memfd_create("device")
        os.truncate(descriptor, size)
        handle = self._take()
        self.handles[handle] = descriptor
        return SUCCESS, handle

    def cuMemRelease(self, handle: int) -> Any:
        os.close(self.handles.pop(handle))
        return (SUCCESS,)

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> Any:
        ptr = self._take(size)
        self.reserved[ptr] = size
        return SUCCESS, ptr

    def cuMemAddressFree(self, ptr: int, size: int) -> Any:
        assert ptr not in self.mapped
        assert self.reserved.pop(ptr) == size
        return (SUCCESS,)

    def cuMemMap(self, ptr: int, size: int, offset: int, handle: int, flags: int) -> Any:
        assert self.reserved[ptr] == size
        assert os.fstat(self.handles[handle]).st_size == size
        self.mapped[ptr] = os.dup(self.handles[handle])
        return (SUCCESS,)

    def cuMemUnmap(self, ptr: int, size: int) -> Any:
        os.close(self.mapped.pop(ptr))
        self.access.pop(ptr, None)
        return (SUCCESS,)

    def cuMemSetAccess(self, ptr: int, size: int, descriptions: list[Any], count: int) -> Any:
        assert ptr in self.mapped
        self.access.setdefault(ptr, set()).update(description.location.id for description in descriptions)
        return (SUCCESS,)

    def cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> Any:
        return SUCCESS, os.dup(self.handles[handle])

    def cuMemImportFromShareableHandle(self, descriptor: int, kind: Any) -> Any:
        handle = self._take()
        self.handles[handle] = os.dup(descriptor)
        return SUCCESS, handle

    def cuStreamCreate(self, flags: int) -> Any:
        self.streams += 1
        return SUCCESS, self.streams

    def cuMemsetD8Async(self, ptr: int, value: int, size: int, stream: int) -> Any:
        assert self.mapped[ptr]
        return (SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> Any:
        return (SUCCESS,)

    def cuStreamDestroy(self, stream: int) -> Any:
        self.streams -= 1
        return (SUCCESS,)
