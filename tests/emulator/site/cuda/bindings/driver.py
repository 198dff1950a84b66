"""Stand-in for ``cuda.bindings.driver``: the functions that epcomm calls, each with its status first."""

from __future__ import annotations

import ctypes
import enum
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from emulated_gpu import device, events, memory, modules, queues
from emulated_gpu.status import GpuError, Status

CUresult = enum.IntEnum(  # type: ignore[misc]
    "CUresult", {"CUDA_SUCCESS": 0, **{f"CUDA_ERROR_{status.name}": status.value for status in Status}}
)
_contexts = threading.local()


class CUstream_flags(enum.IntEnum):
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUmemAllocationType(enum.IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemLocationType(enum.IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemAllocationHandleType(enum.IntEnum):
    CU_MEM_HANDLE_TYPE_NONE = 0
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1


class CUmemAllocationGranularity_flags(enum.IntEnum):
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0
    CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1


class CUmemAccess_flags(enum.IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class _Location:
    __slots__ = ("id", "type")

    def __init__(self) -> None:
        self.type: CUmemLocationType | None = None
        self.id = 0


class CUmemAllocationProp:
    __slots__ = ("location", "requestedHandleTypes", "type")

    def __init__(self) -> None:
        self.type: CUmemAllocationType | None = None
        self.location = _Location()
        self.requestedHandleTypes = CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE


class CUmemAccessDesc:
    __slots__ = ("flags", "location")

    def __init__(self) -> None:
        self.location = _Location()
        self.flags: CUmemAccess_flags | None = None


class CUlaunchAttributeID(enum.IntEnum):
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _LaunchAttributeValue:
    programmaticStreamSerializationAllowed = 0


class CUlaunchAttribute:
    __slots__ = ("id", "value")

    def __init__(self) -> None:
        self.id: CUlaunchAttributeID | None = None
        self.value = _LaunchAttributeValue()


class CUlaunchConfig:
    gridDimX = gridDimY = gridDimZ = blockDimX = blockDimY = blockDimZ = sharedMemBytes = hStream = numAttrs = 0
    attrs: Sequence[CUlaunchAttribute] = ()


def _api(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """As the bindings answer: a tuple of the status and of what the function returns."""

    @functools.wraps(function)
    def answer(*args: Any) -> tuple[Any, ...]:
        try:
            result = function(*args)
        except GpuError as error:
            return (CUresult(error.status),)
        return (CUresult(0),) if result is None else (CUresult(0), *(result if type(result) is tuple else (result,)))

    return answer


def _stack() -> list[int]:
    stack: list[int] = _contexts.__dict__.setdefault("stack", [])
    return stack


def _check_device(number: int) -> None:
    if not 0 <= number < device.NUM_GPUS:
        raise GpuError(Status.INVALID_DEVICE, f"device {number}")


@_api
def cuInit(flags: int) -> None:
    pass


@_api
def cuDeviceGet(number: int) -> int:
    _check_device(number)
    return number


@_api
def cuDevicePrimaryCtxRetain(number: int) -> int:
    _check_device(number)
    return number


@_api
def cuCtxPushCurrent(context: int) -> None:
    _stack().append(device.current())
    device.set_current(context)


@_api
def cuCtxPopCurrent() -> int:
    popped = device.current()
    device.set_current(_stack().pop())
    return popped


@_api
def cuLaunchKernelEx(config: CUlaunchConfig, function: int, parameters: int, extra: int) -> None:
    """As ``launchKernel`` of CuPy's stand-in; kernels of a stream do not overlap."""
    if (config.gridDimY, config.gridDimZ, config.blockDimY, config.blockDimZ, extra) != (1, 1, 1, 1, 0):
        raise NotImplementedError("only grids and blocks of one dimension are emulated")
    if [attribute.id for attribute in config.attrs] != [
        CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    ] or config.numAttrs != 1:
        raise NotImplementedError("no other attribute is emulated")
    address = ctypes.c_void_p.from_address(parameters).value
    assert address is not None
    shape = config.gridDimX, config.blockDimX, config.sharedMemBytes
    modules.launch(function, *shape, config.hStream, address)


@_api
def cuMemGetInfo() -> tuple[int, int]:
    device.check()
    return memory.free_and_total()


@_api
def cuMemGetAllocationGranularity(properties: CUmemAllocationProp, option: CUmemAllocationGranularity_flags) -> int:
    return memory.GRANULARITY


@_api
def cuMemCreate(size: int, properties: CUmemAllocationProp, flags: int) -> int:
    device.check()
    _check_device(properties.location.id)
    return memory.new_memory(size)


@_api
def cuMemRelease(handle: int) -> None:
    memory.release(handle)


@_api
def cuMemExportToShareableHandle(handle: int, kind: CUmemAllocationHandleType, flags: int) -> int:
    return memory.export(handle)


@_api
def cuMemImportFromShareableHandle(descriptor: int, kind: CUmemAllocationHandleType) -> int:
    return memory.import_descriptor(descriptor)


@_api
def cuMemAddressReserve(size: int, alignment: int, address: int, flags: int) -> int:
    return memory.reserve(size)


@_api
def cuMemAddressFree(address: int, size: int) -> None:
    memory.unreserve(address, size)


@_api
def cuMemMap(address: int, size: int, offset: int, handle: int, flags: int) -> None:
    memory.map_memory(address, size, handle)


@_api
def cuMemUnmap(address: int, size: int) -> None:
    memory.unmap(address, size)


@_api
def cuMemSetAccess(address: int, size: int, descriptions: Sequence[CUmemAccessDesc], count: int) -> None:
    for description in descriptions[:count]:
        _check_device(description.location.id)
    memory.set_access(address, size)


@_api
def cuStreamCreate(flags: int) -> int:
    return queues.create(device.current(), not flags & CUstream_flags.CU_STREAM_NON_BLOCKING).handle


@_api
def cuStreamDestroy(stream: int) -> None:
    queues.find(stream).destroy()


@_api
def cuStreamSynchronize(stream: int) -> None:
    queues.find(stream).synchronize()


@_api
def cuMemsetD8Async(address: int, value: int, size: int, stream: int) -> None:
    queues.find(stream).submit(functools.partial(memory.fill, address, value, size))


@_api
def cuMemcpyHtoDAsync(address: int, source: bytes, size: int, stream: int) -> None:
    queues.find(stream).submit(functools.partial(ctypes.memmove, address, bytes(source), size))


@_api
def cuEventQuery(event: int) -> None:
    if not events.find(event).query():
        raise GpuError(Status.NOT_READY, "not ready")


@_api
def cuStreamGetCaptureInfo(stream: int) -> tuple[int, int]:
    capture = queues.find(stream).capture
    return (0, 0) if capture is None else (1, capture.number)
