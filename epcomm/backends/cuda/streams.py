"""In which CUDA stream an operation runs, and who waits for it.

An operation runs in the stream of its input's framework, in line with the caller's own work. It runs in the Buffer's
own stream, of high priority, when the caller wants to go on (`async_finish`), when the framework has no current stream
(JAX), and when the ranks are threads of one process.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from epcomm.arrays.streams import LEGACY, PER_THREAD, as_stream, current_stream, order
from epcomm.errors import InputError
from epcomm.event import EventOverlap
from epcomm.jit import current_device
from epcomm.memory import driver

__all__ = ["StreamEvent", "Streams", "capture_event"]

_HIGHEST = -5  # CUDA takes the highest that there is

# By Streams that are not released: what keeps the streams that their Buffer may still have to wait for. Garbage
# collection of a Buffer may finalize them before it, in any order.
_alive: dict[int, tuple[object, object]] = {}
_last = threading.local()  # .framework, .device: of the last input, for `capture_event`


class StreamEvent:
    """A point in a stream, as `EventOverlap` keeps it.

    Args:
        stream: raw handle; the event is recorded here and now.
        framework: whose current stream `current_stream_wait` speaks of.
        device: CUDA device number, which is current in this thread.
        outputs: blocks that streams which wait for this event are going to use.
    """

    def __init__(self, stream: int, framework: str, device: int, outputs: Iterable[Any] = ()) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._event = cupy.cuda.Event(block=False, disable_timing=True)
        self._runtime.eventRecord(self._event.ptr, stream or LEGACY)
        self.is_captured = bool(self._runtime.streamIsCapturing(stream or LEGACY))
        self._framework, self._device = framework, device
        self._outputs = [weakref.ref(block) for block in outputs]

    def wait_in(self, stream: int, keep: object) -> None:
        """Later work in `stream`, which `keep` keeps alive, waits for this event. Does not block the host."""
        self._runtime.streamWaitEvent(stream or LEGACY, self._event.ptr, 0)
        for reference in self._outputs:
            block = reference()
            if block is not None:
                block.note_reader(stream, keep)

    def current_stream_wait(self) -> None:
        """Later work in the framework's current stream waits for this event; JAX's arrays do so by themselves."""
        stream, keep = _current(self._framework, self._device)
        if stream is not None:
            self.wait_in(stream, keep)

    @property
    def done(self) -> bool:
        """Whether it has happened. Does not block."""
        # The driver's call: the runtime's leaves "not ready" behind as an error that other libraries then report.
        (status,) = driver.load().cuEventQuery(self._event.ptr)
        return bool(status.name == "CUDA_SUCCESS")


def _current(framework: str, device: int) -> tuple[int | None, object]:
    """The framework's current stream, and what keeps it alive: CuPy destroys a stream with its object."""
    if framework == "cupy":
        import cupy

        keeper = cupy.cuda.get_current_stream(device)
        return int(keeper.ptr), keeper
    return current_stream(framework, device), None


def capture_event() -> EventOverlap:
    """An event of the work so far in the current stream of the framework whose array came last; empty if none came."""
    framework = getattr(_last, "framework", None)
    if framework is None:
        return EventOverlap()
    stream = current_stream(framework, _last.device)
    if stream is None:
        return EventOverlap()
    with current_device(_last.device):
        return EventOverlap(StreamEvent(stream, framework, _last.device))


class Streams:
    """The streams of one Buffer: its own, and the one in which its last operation ran.

    Args:
        cupy: the module.
        device: CUDA device number.
        in_process: the ranks are threads of one process.

    Attributes:
        own: raw handle of the Buffer's own stream.
        keeper: the object that destroys that stream when it goes.
    """

    def __init__(self, cupy: Any, device: int, in_process: bool) -> None:
        self._runtime = cupy.cuda.runtime
        with cupy.cuda.Device(device):
            self.keeper = cupy.cuda.Stream(non_blocking=True, priority=_HIGHEST)
        self.own = int(self.keeper.ptr)
        self._cupy, self._device, self._in_process = cupy, device, in_process
        self._last: int = self.own
        _alive[id(self)] = (self.keeper, None)
        self._last_captured: int | None = None
        self._captured_keep: object = None
        self._in_flight: deque[tuple[StreamEvent, object]] = deque()

    def callers(self, framework: str | None, stream: Any) -> tuple[int | None, object]:
        """The caller's stream, None if there is none to speak of, and what keeps it alive.

        Raises:
            InputError: no stream; or the default stream, where ranks that are threads would wait for each other in it.
        """
        keep: object = stream
        if stream is not None:
            handle: int | None = as_stream(stream)
        else:
            handle, keep = (None, None) if framework is None else _current(framework, self._device)
        if framework is not None:
            _last.framework, _last.device = framework, self._device
        if self._in_process and handle is not None and handle in (0, LEGACY):
            raise InputError(
                "stream",
                got="the default stream, which all ranks of this process share",
                wanted="a stream of its own for each rank that is a thread",
                do="work under `with cupy.cuda.Stream(non_blocking=True):`, or torch.cuda.stream(torch.cuda.Stream())",
            )
        return handle, keep

    def is_capturing(self, stream: int) -> bool:
        """Whether `stream` is being captured into a graph."""
        return bool(self._runtime.streamIsCapturing(stream or LEGACY))

    def enter(self, run: int, keep: object) -> bool:
        """The next operation runs in `run`: after the last one, wherever that ran. Whether `run` is under capture."""
        if self.is_capturing(run):
            # A graph knows only of its own work: eager calls before it, and replays, are the caller's to order.
            if self._last_captured not in (None, run) and self.is_capturing(self._last_captured or 0):
                order(self._last_captured or 0, run, self._device)
            self._last_captured, self._captured_keep = run, keep
            return True
        if self._last != run:
            order(self._last, run, self._device)
            _alive[id(self)] = (self.keeper, keep)
        self._last = run
        return False

    def runs_in_own(self, callers: int | None, async_finish: bool) -> bool:
        """Whether an operation runs in the Buffer's own stream."""
        return async_finish or callers in (None, PER_THREAD) or self._in_process

    def keep_until(self, event: StreamEvent, kept: object) -> None:
        """Hold `kept`, the inputs, until `event`: their framework does not know that we read them.

        Inputs of a captured call are the caller's to keep as long as its graph; its event says nothing about replays.
        """
        if event.is_captured:
            return
        in_flight = self._in_flight
        while in_flight and in_flight[0][0].done:
            in_flight.popleft()
        in_flight.append((event, kept))

    def synchronize(self) -> None:
        """Block the host until the last operation is done, and the inputs of all are free."""
        if self._last_captured is not None:
            self._runtime.deviceSynchronize()  # graphs are replayed in streams that nobody tells of
        self._runtime.streamSynchronize(self._last or LEGACY)
        self._in_flight.clear()

    def release(self) -> None:
        """The streams need not be kept any more; after the last call."""
        _alive.pop(id(self), None)
