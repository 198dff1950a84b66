"""When the GPU has come how far: events on streams, as the block allocator needs them."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from epcomm.errors import EpcommError
from epcomm.memory import driver

__all__ = ["CudaTimeline", "Timeline"]

LEGACY_STREAM = 1  # cudaStreamLegacy: what 0 means, whatever the default of the caller's runtime is

_SUCCESS, _NOT_READY = "CUDA_SUCCESS", "CUDA_ERROR_NOT_READY"
_DISABLE_TIMING = 2  # cudaEventDisableTiming
_CAPTURE_IMPLICIT = 906  # cudaErrorStreamCaptureImplicit
# Events that may be under way before `record` looks for finished ones to use again.
_NUM_KEPT = 64


class Timeline(Protocol):
    """Events and streams; streams are raw handles."""

    def record(self, stream: int) -> object:
        """An event that happens when all work in `stream` so far is done."""

    def wait(self, stream: int, event: Any) -> None:
        """Later work in `stream` waits for `event`. Does not block the host."""

    def done(self, event: Any) -> bool:
        """Whether `event` has happened. Does not block."""

    def synchronize(self) -> None:
        """Block the host until all work of this process on the device is done."""

    def is_capturing(self, stream: int) -> bool:
        """Whether `stream` is being captured into a graph."""

    def capture_of(self, stream: int) -> int:
        """The number of the capture that `stream` is in, which no other of this process has; -1 if nobody knows."""


class _Event:
    __slots__ = ("finished", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.finished = False


class CudaTimeline:
    """The timeline of one device. One thread at a time.

    The device of the streams 0, 1 and 2, which every thread has its own of, is the one current in the calling thread:
    it must be `device`.

    Args:
        device: CUDA device number of this process.
    """

    def __init__(self, device: int) -> None:
        import cupy

        self._device = cupy.cuda.Device(device)
        self._runtime = cupy.cuda.runtime
        self._query = driver.load().cuEventQuery
        self._free: list[int] = []
        self._under_way: deque[_Event] = deque()

    def record(self, stream: int) -> _Event:
        if len(self._under_way) >= _NUM_KEPT:
            while self._under_way and self.done(self._under_way[0]):
                self._under_way.popleft()
        event = _Event(self._free.pop() if self._free else self._create())
        self._runtime.eventRecord(event.handle, stream or LEGACY_STREAM)
        self._under_way.append(event)
        return event

    def wait(self, stream: int, event: _Event) -> None:
        if not event.finished:  # the handle of a finished one may be another event by now
            self._runtime.streamWaitEvent(stream or LEGACY_STREAM, event.handle, 0)

    def done(self, event: _Event) -> bool:
        if event.finished:
            return True
        # The driver's call: the runtime's leaves "not ready" behind as an error that other libraries then report.
        (status,) = self._query(event.handle)
        if status.name == _NOT_READY:
            return False
        if status.name != _SUCCESS:
            raise EpcommError(
                f"cuda:{self._device.id}", got=status.name, do="an earlier kernel failed: look at the first CUDA error"
            )
        event.finished = True
        self._free.append(event.handle)
        return True

    def synchronize(self) -> None:
        with self._device:
            self._runtime.deviceSynchronize()

    def is_capturing(self, stream: int) -> bool:
        try:
            return bool(self._runtime.streamIsCapturing(stream or LEGACY_STREAM))
        except self._runtime.CUDARuntimeError as error:
            if error.status != _CAPTURE_IMPLICIT:
                raise
            # The legacy stream cannot be asked while another stream captures; it must be left alone then, too.
            return True

    def capture_of(self, stream: int) -> int:
        status, values = driver.status_of("cuStreamGetCaptureInfo", stream or LEGACY_STREAM)
        return int(values[1]) if status == _SUCCESS else -1

    def _create(self) -> int:
        with self._device:
            return int(self._runtime.eventCreateWithFlags(_DISABLE_TIMING))
