"""Blocks of private device memory, for outputs that need not lie in the arena."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from epcomm.errors import CapacityError
from epcomm.memory.blocks import BlockPool
from epcomm.memory.device import DeviceMemory
from epcomm.memory.timeline import Timeline

__all__ = ["LocalPool"]

SLAB_BYTES = 64 << 20
_SLAB_UNIT = 2 << 20


class _Memory(Protocol):
    ptr: int
    num_bytes: int

    def close(self) -> None: ...


class LocalPool(BlockPool):
    """A pool that grows by slabs, so `allocate` always finds room, or raises. A block's `offset` is its address.

    Growing maps new memory without waiting for the device, unlike ``cudaMalloc``: a kernel that waits for a peer may
    be running. Slabs are kept until `release`.

    Args:
        device: CUDA device number of this process.
        timeline: events and streams of the device.
        may_synchronize: as for `BlockPool`.
        allocate_slab: makes a slab of so many bytes; for tests.
    """

    def __init__(
        self,
        device: int,
        timeline: Timeline,
        *,
        may_synchronize: bool = True,
        allocate_slab: Callable[[int], _Memory] | None = None,
    ) -> None:
        super().__init__(0, 0, timeline, may_synchronize=may_synchronize)
        self._device = device
        self._allocate_slab = allocate_slab or (lambda size: DeviceMemory.allocate(size, device, shareable=False))
        self._slabs: list[_Memory] = []

    def _find(self, size: int, stream: int, high: bool, is_captured: bool) -> int | None:
        """Room, for which the pool grows if need be.

        Raises:
            CapacityError: out of device memory, or the pool is closed.
        """
        start = super()._find(size, stream, high, is_captured)
        if start is None:
            self._grow(size)
            start = super()._find(size, stream, high, is_captured)
        return start

    def release(self) -> None:
        """Close the pool and unmap its slabs; the caller knows that nothing uses them (`settle`). Does not wait."""
        self.close()
        slabs, self._slabs = self._slabs, []
        for slab in slabs:
            slab.close()

    def _grow(self, num_bytes: int) -> None:
        if self._is_closed:
            raise CapacityError("output memory", got="a closed pool", wanted="one in use")
        rounded = -(-num_bytes // _SLAB_UNIT) * _SLAB_UNIT or _SLAB_UNIT
        try:
            slab = self._allocate_slab(max(rounded, SLAB_BYTES))
        except CapacityError:
            slab = self._allocate_last(rounded)
        self._slabs.append(slab)
        self._add_region(slab.ptr, slab.num_bytes)

    def _allocate_last(self, num_bytes: int) -> _Memory:
        try:
            return self._allocate_slab(num_bytes)
        except CapacityError as error:
            held = self.stats
            raise CapacityError(
                "out of device memory",
                got=f"{error}; outputs of this Buffer hold {held['bytes_live']} of {held['bytes_total']} bytes",
                wanted=f"{num_bytes} bytes on cuda:{self._device} for an output",
                do="drop outputs that are not needed, or leave epcomm more memory",
            ) from error
