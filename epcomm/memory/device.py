"""Device memory that another process can map: CUDA's virtual memory management with POSIX file descriptors.

Physical memory lives until the last process that mapped it lets go, so an owner may close before its peers do, which
freeing ``cudaMalloc`` memory under an open IPC handle forbids. Nothing here is stream-ordered, and neither making nor
closing synchronises the device. Nothing runs in a finalizer or at interpreter exit: the driver frees what is left.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from epcomm.errors import CapacityError, DeviceError, EpcommError, InputError
from epcomm.memory import driver

__all__ = ["DeviceMemory"]


class DeviceMemory:
    """One range of device addresses over one piece of physical memory, mapped in this process.

    Made by `allocate` and `import_fd`. Not collective; does not block but for zeroing. Any thread.

    Attributes:
        ptr: device address of the first byte, a multiple of 2 MiB on today's GPUs.
        num_bytes: what was asked for, rounded up to the granularity of the device.
        device: the CUDA device of this process that it was mapped for.
    """

    def __init__(self, ptr: int, num_bytes: int, device: int, handle: Any) -> None:
        self.ptr, self.num_bytes, self.device = ptr, num_bytes, device
        self._handle = handle  # of the allocation, for `export_fd`; None once released
        self._closing = threading.Lock()
        self._is_mapped = True

    def __repr__(self) -> str:
        return f"DeviceMemory({self.num_bytes} bytes at {self.ptr:#x} on cuda:{self.device})"

    @classmethod
    def allocate(cls, num_bytes: int, device: int, shareable: bool, *, zeroed: bool = False) -> DeviceMemory:
        """New memory, readable and writable on `device`.

        Args:
            num_bytes: at least one; rounded up.
            device: CUDA device number of this process.
            shareable: `export_fd` will be called.
            zeroed: fill it with zero bytes, and return when they are there (blocks the host; waits for no other work).

        Raises:
            CapacityError: the device has no room for it.
            DeviceError: the device cannot map memory this way.
        """
        if num_bytes < 1:
            raise InputError("num_bytes", got=num_bytes, wanted="at least 1")
        with driver.in_context(device):
            properties = _properties(device, shareable)
            size = _round_up(num_bytes, _granularity(properties))
            status, values = driver.status_of("cuMemCreate", size, properties, 0)
            if status != "CUDA_SUCCESS":
                raise _refused(status, size, device)
            (handle,) = values
            try:
                memory = cls(_map(handle, size, [device]), size, device, handle)
            except BaseException:
                driver.status_of("cuMemRelease", handle)
                raise
            if zeroed:
                try:
                    driver.fill_zero(memory.ptr, memory.num_bytes)
                except BaseException:
                    memory.close()
                    raise
            return memory

    @classmethod
    def import_fd(cls, fd: int, num_bytes: int, device: int) -> DeviceMemory:
        """Map the memory behind a descriptor of `export_fd`, for kernels of `device`.

        Args:
            fd: the descriptor, in this process; it stays open.
            num_bytes: `num_bytes` of the exporter's `DeviceMemory`.
            device: CUDA device number of this process; the memory may be another GPU's.

        Raises:
            EpcommError: the driver does not take the descriptor.
            DeviceError: `device` cannot address that memory.
        """
        with driver.in_context(device):
            handle = driver.call("cuMemImportFromShareableHandle", fd, _descriptor_type())
            try:
                ptr = _map(handle, num_bytes, [device])
            finally:
                # The mapping holds the memory from here on.
                driver.status_of("cuMemRelease", handle)
            return cls(ptr, num_bytes, device, None)

    def export_fd(self) -> int:
        """A new descriptor of this memory; the caller closes it.

        Raises:
            EpcommError: the memory is not shareable, imported, or closed.
        """
        if self._handle is None:
            raise EpcommError("export_fd", got=repr(self), wanted="open memory that this process allocated")
        with driver.in_context(self.device):
            return int(driver.call("cuMemExportToShareableHandle", self._handle, _descriptor_type(), 0))

    def allow(self, devices: Sequence[int]) -> None:
        """Let kernels of these devices of this process use the memory, at the same address.

        Raises:
            DeviceError: one of them cannot.
        """
        with driver.in_context(self.device):
            _set_access(self.ptr, self.num_bytes, devices)

    def close(self) -> None:
        """Unmap the memory here; it is freed when nobody else maps it. A second call does nothing.

        The caller knows that no kernel of this process uses it any more. Does not wait.
        """
        with self._closing:
            is_mapped, self._is_mapped = self._is_mapped, False
        if not is_mapped:
            return
        handle, self._handle = self._handle, None
        with driver.in_context(self.device):
            try:
                _unmap(self.ptr, self.num_bytes)
            finally:
                if handle is not None:
                    driver.status_of("cuMemRelease", handle)


def _properties(device: int, shareable: bool) -> Any:
    api = driver.load()
    properties = api.CUmemAllocationProp()
    properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    if shareable:
        properties.requestedHandleTypes = _descriptor_type()
    return properties


def _descriptor_type() -> Any:
    return driver.load().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _granularity(properties: Any) -> int:
    flags = driver.load().CUmemAllocationGranularity_flags
    recommended = flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    return int(driver.call("cuMemGetAllocationGranularity", properties, recommended))


def _round_up(num_bytes: int, granularity: int) -> int:
    return -(-num_bytes // granularity) * granularity


def _map(handle: Any, num_bytes: int, devices: Sequence[int]) -> int:
    """Addresses for an allocation, usable on `devices`; nothing stays behind when that fails."""
    ptr = int(driver.call("cuMemAddressReserve", num_bytes, 0, 0, 0))
    try:
        driver.call("cuMemMap", ptr, num_bytes, 0, handle, 0)
    except BaseException:
        driver.status_of("cuMemAddressFree", ptr, num_bytes)
        raise
    try:
        _set_access(ptr, num_bytes, devices)
    except BaseException:
        _unmap(ptr, num_bytes)
        raise
    return ptr


def _set_access(ptr: int, num_bytes: int, devices: Sequence[int]) -> None:
    api = driver.load()
    for device in devices:
        access = api.CUmemAccessDesc()
        access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        status, _ = driver.status_of("cuMemSetAccess", ptr, num_bytes, [access], 1)
        if status != "CUDA_SUCCESS":
            raise DeviceError(
                f"cuda:{device}",
                got=f"{status} when it was to address memory of another GPU of this node, or its own",
                wanted="GPUs that can address each other (NVLink, or PCIe peer-to-peer)",
                do="look at `nvidia-smi topo -p2p rw`; pass ranks_per_node= to keep such ranks in nodes of their own",
            )


def _unmap(ptr: int, num_bytes: int) -> None:
    driver.call("cuMemUnmap", ptr, num_bytes)
    driver.call("cuMemAddressFree", ptr, num_bytes)


def _refused(status: str, num_bytes: int, device: int) -> EpcommError:
    """The error for a `cuMemCreate` that failed."""
    if status == "CUDA_ERROR_OUT_OF_MEMORY":
        free, total = driver.call("cuMemGetInfo")
        return CapacityError(
            "device memory",
            got=f"a request for {num_bytes} bytes",
            wanted=f"at most what cuda:{device} has free, {free} of {total} bytes",
            do="pass a smaller num_nvl_bytes, or let the framework leave room (XLA_PYTHON_CLIENT_MEM_FRACTION)",
        )
    return DeviceError(
        f"cuda:{device}",
        got=f"{status} for {num_bytes} bytes",
        wanted="a GPU with virtual memory management and POSIX file descriptors",
        do="run `epcomm doctor` on this machine",
    )
