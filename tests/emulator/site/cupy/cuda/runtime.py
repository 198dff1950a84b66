"""Stand-in for ``cupy.cuda.runtime``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from emulated_gpu import device, events, graphs, memory, queues
from emulated_gpu.status import GpuError, Status

memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = 1, 2, 3, 4
streamCaptureModeRelaxed = 2
streamNonBlocking = 1
_EVENT_DISABLE_TIMING = 2
_MEMCPY_KINDS = (memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault)

P, R = ParamSpec("P"), TypeVar("R")


class CUDARuntimeError(RuntimeError):
    """CuPy's, with the number of the error."""

    def __init__(self, status: Status, text: str) -> None:
        self.status = int(status)
        super().__init__(f"cudaError{status.name.title().replace('_', '')}: {text}")


def raising(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with the exceptions of this module."""

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except GpuError as error:
            raise CUDARuntimeError(error.status, error.text) from error

    return call


def runtimeGetVersion() -> int:
    return 13000


def driverGetVersion() -> int:
    return 13000


def getDeviceCount() -> int:
    return device.NUM_GPUS


def getDevice() -> int:
    return device.current()


@raising
def setDevice(number: int) -> None:
    device.set_current(number)


@raising
def deviceGetAttribute(attribute: int, number: int) -> int:
    if attribute not in device.ATTRIBUTES:
        raise GpuError(Status.INVALID_VALUE, f"device attribute {attribute} is not emulated")
    return device.ATTRIBUTES[attribute]


def getDeviceProperties(number: int) -> dict[str, object]:
    return {
        "name": device.NAME.encode(),
        "uuid": device.uuid_of(number),
        "multiProcessorCount": device.NUM_SMS,
        "major": device.ARCHITECTURE // 10,
        "minor": device.ARCHITECTURE % 10,
    }


@raising
def deviceSynchronize() -> None:
    queues.synchronize_device(device.current())


@raising
def memGetInfo() -> tuple[int, int]:
    device.check()
    return memory.free_and_total()


@raising
def free(address: int) -> None:
    if address != 0:
        raise GpuError(Status.INVALID_VALUE, "an address that cudaMalloc did not give")


@raising
def memcpyAsync(to: int, source: int, size: int, kind: int, stream: int) -> None:
    if kind not in _MEMCPY_KINDS:
        raise GpuError(Status.INVALID_VALUE, f"memcpy kind {kind}")
    queues.find(stream).submit(functools.partial(memory.copy, to, source, size))


@raising
def memsetAsync(address: int, value: int, size: int, stream: int) -> None:
    queues.find(stream).submit(functools.partial(memory.fill, address, value, size))


@raising
def streamCreateWithPriority(flags: int, priority: int) -> int:
    return queues.create(device.current(), not flags & streamNonBlocking).handle


@raising
def streamDestroy(stream: int) -> None:
    queues.find(stream).destroy()


@raising
def streamSynchronize(stream: int) -> None:
    queues.find(stream).synchronize()


@raising
def streamQuery(stream: int) -> bool:
    return queues.find(stream).query()


@raising
def streamWaitEvent(stream: int, event: int, flags: int = 0) -> None:
    events.find(event).wait_in(queues.find(stream))


@raising
def streamBeginCapture(stream: int, mode: int = streamCaptureModeRelaxed) -> None:
    if mode != streamCaptureModeRelaxed:
        raise NotImplementedError("only relaxed captures, CuPy's own default, are emulated")
    graphs.begin(queues.find(stream))


@raising
def streamEndCapture(stream: int) -> graphs.Graph:
    return graphs.end(queues.find(stream))


@raising
def streamIsCapturing(stream: int) -> bool:
    return graphs.is_capturing(queues.find(stream))


@raising
def graphLaunch(graph: graphs.Graph, stream: int) -> None:
    graph.launch(queues.find(stream))


@raising
def eventCreateWithFlags(flags: int) -> int:
    return events.create(not flags & _EVENT_DISABLE_TIMING)


@raising
def eventRecord(event: int, stream: int) -> None:
    events.find(event).record(queues.find(stream))


@raising
def eventQuery(event: int) -> bool:
    return events.find(event).query()


@raising
def eventSynchronize(event: int) -> None:
    events.find(event).synchronize()


@raising
def eventElapsedTime(start: int, end: int) -> float:
    return events.find(end).ms_since(events.find(start))


def eventDestroy(event: int) -> None:
    events.destroy(event)
