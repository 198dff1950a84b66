"""In which CUDA stream an operation runs, and who waits for it.

An operation runs in the stream of its input's framework, in line with the caller's own work. It runs in the Buffer's
own stream, of high priority, when the caller wants to go on (`async_finish`), when the framework has no current stream
(JAX), and when the ranks are threads of one process.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from epcomm.arrays.streams import LEGACY, PER_THREAD, StreamRef, as_stream, current_stream, order
from epcomm.errors import InputError
from epcomm.event import EventOverlap
from epcomm.jit import current_device, load_cupy
from epcomm.memory import driver

__all__ = ["StreamEvent", "Streams", "capture_event"]

_HIGHEST = -5  # CUDA takes the highest that there is

# By Streams that are not released: what keeps the streams that their Buffer may still have to wait for. Garbage
# collection of a Buffer may finalize them before it, in any order.
_alive: dict[int, tuple[object, object]] = {}
_last = threading.local()  # .input: framework and device of the last one, for `capture_event`


class StreamEvent:
    """A point in a stream, as `EventOverlap` keeps it.

    Args:
        stream: raw handle; the event is recorded here and now.
        framework: whose current stream `current_stream_wait` speaks of.
        device: CUDA device number, which is current in this thread.
        is_captured: `stream` is being captured into a graph.
        outputs: blocks that streams which wait for this event are going to use.
    """

    def __init__(
        self, stream: int, framework: str, device: int, is_captured: bool, outputs: Iterable[Any] = ()
    ) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._event = cupy.cuda.Event(block=False, disable_timing=True)
        self._runtime.eventRecord(self._event.ptr, stream or LEGACY)
        self.is_captured = is_captured
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
        keeper = sys.modules["cupy"].cuda.get_current_stream(device)
        return keeper.ptr, keeper
    return current_stream(framework, device), None


def capture_event() -> EventOverlap:
    """An event of the work so far in the current stream of the framework whose array came last; empty if none came."""
    framework, device = getattr(_last, "input", (None, 0))
    stream = None if framework is None else current_stream(framework, device)
    if framework is None or stream is None:
        return EventOverlap()
    with current_device(device):
        is_captured = bool(load_cupy().cuda.runtime.streamIsCapturing(stream or LEGACY))
        return EventOverlap(StreamEvent(stream, framework, device, is_captured))


class Streams:
    """The streams of one Buffer: its own, and the one in which its last operation ran.

    Args:
        cupy: the module.
        device: CUDA device number.
        in_process: the ranks are threads of one process.

    Attributes:
        own: the Buffer's own stream.
    """

    def __init__(self, cupy: Any, device: int, in_process: bool) -> None:
        self._runtime = cupy.cuda.runtime
        with cupy.cuda.Device(device):
            keeper = cupy.cuda.Stream(non_blocking=True, priority=_HIGHEST)
        self.own = StreamRef(int(keeper.ptr), keeper)
        self._device, self._in_process = device, in_process
        self._last = self._callers = self.own
        _alive[id(self)] = (keeper, None)
        self._last_captured: StreamRef | None = None
        self._in_flight: deque[tuple[StreamEvent, object]] = deque()

    def of_caller(self, framework: str | None, stream: Any) -> StreamRef | None:
        """The caller's stream, None if there is none to speak of.

        Raises:
            InputError: no stream; or the default stream, where ranks that are threads would wait for each other in it.
        """
        if framework is not None:
            _last.input = framework, self._device
        if stream is not None:
            handle: int | None = as_stream(stream)
            keep = stream
        elif framework is not None:
            handle, keep = _current(framework, self._device)
        else:
            return None
        if handle is None:
            return None
        if self._in_process and handle in (0, LEGACY):
            raise InputError(
                "stream",
                got="the default stream, which all ranks of this process share",
                wanted="a stream of its own for each rank that is a thread",
                do="work under `with cupy.cuda.Stream(non_blocking=True):`, or torch.cuda.stream(torch.cuda.Stream())",
            )
        callers = self._callers  # of the last call, and of this one too as a rule
        if callers.ptr != handle or callers.keep is not keep:
            callers = self._callers = StreamRef(handle, keep)
        return self.own if handle == self.own.ptr else callers

    def runs_in_own(self, callers: StreamRef | None, async_finish: bool) -> bool:
        """Whether an operation runs in the Buffer's own stream."""
        return callers is None or async_finish or self._in_process or callers.ptr == PER_THREAD

    def enter(self, run: StreamRef) -> bool:
        """The next operation runs in `run`: after the last one, wherever that ran. Whether `run` is under capture."""
        if self._runtime.streamIsCapturing(run.ptr or LEGACY):
            # A graph knows only of its own work: eager calls before it, and replays, are the caller's to order.
            before = self._last_captured
            if before is not None and before.ptr != run.ptr and self._runtime.streamIsCapturing(before.ptr or LEGACY):
                order(before.ptr, run.ptr, self._device)
            self._last_captured = run
            return True
        if self._last.ptr != run.ptr:
            order(self._last.ptr, run.ptr, self._device)
            _alive[id(self)] = (self.own.keep, run.keep)
            self._last = run
        return False

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
        self._runtime.streamSynchronize(self._last.ptr or LEGACY)
        self._in_flight.clear()

    def release(self) -> None:
        """The streams need not be kept any more; after the last call."""
        _alive.pop(id(self), None)
