"""Streams, events and graphs as CuPy's objects, which destroy what they stand for when they go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

from emulated_gpu import device, graphs, queues

from cupy.cuda import runtime

__all__ = ["Event", "ExternalStream", "Graph", "Stream", "get_current_stream", "get_elapsed_time"]

_thread = threading.local()


class Event:
    """A point in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess:
            raise NotImplementedError("events between processes are not emulated")
        self.ptr = runtime.eventCreateWithFlags(2 if disable_timing else 0)

    def __del__(self, is_ending: Callable[[], bool] = device.is_ending) -> None:
        if hasattr(self, "ptr") and not is_ending():
            runtime.eventDestroy(self.ptr)

    @property
    def done(self) -> bool:
        return runtime.eventQuery(self.ptr)

    def record(self, stream: Stream | ExternalStream | None = None) -> None:
        runtime.eventRecord(self.ptr, (stream or get_current_stream()).ptr)

    def synchronize(self) -> None:
        runtime.eventSynchronize(self.ptr)


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds."""
    return runtime.eventElapsedTime(start.ptr, end.ptr)


class Graph:
    """A captured graph, ready to be launched."""

    def __init__(self, graph: graphs.Graph) -> None:
        self._graph = graph

    def launch(self, stream: Stream | ExternalStream | None = None) -> None:
        runtime.graphLaunch(self._graph, (stream or get_current_stream()).ptr)


class _BaseStream:
    ptr: int
    device_id: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseStream) and other.ptr == self.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ptr} (device {self.device_id})>"

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> Any:
        _thread.__dict__.setdefault("stack", []).append(get_current_stream())
        return self.use()

    def __exit__(self, *details: object) -> None:
        _thread.stack.pop().use()

    def use(self) -> Any:
        """Make it the current stream of this thread."""
        if self.device_id not in (-1, device.current()):
            raise RuntimeError(f"a stream of device {self.device_id} while device {device.current()} is current")
        _thread.__dict__.setdefault("current", {})[device.current()] = self
        return self

    @property
    def done(self) -> bool:
        return runtime.streamQuery(self.ptr)

    def synchronize(self) -> None:
        runtime.streamSynchronize(self.ptr)

    def record(self, event: Event | None = None) -> Event:
        """An event after what is here; a new one takes no time."""
        event = event or Event(disable_timing=True)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        runtime.streamWaitEvent(self.ptr, event.ptr)

    def begin_capture(self, mode: int | None = None) -> None:
        runtime.streamBeginCapture(self.ptr, runtime.streamCaptureModeRelaxed if mode is None else mode)

    def end_capture(self) -> Graph:
        return Graph(runtime.streamEndCapture(self.ptr))

    def is_capturing(self) -> bool:
        return runtime.streamIsCapturing(self.ptr)


class Stream(_BaseStream):
    """A stream of its own, unless `null` or `ptds` (that of the thread)."""

    null: ClassVar[Stream]
    ptds: ClassVar[Stream]

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self.device_id = -1 if null or ptds else device.current()
        self._is_own = not (null or ptds)
        if self._is_own:
            self.ptr = runtime.streamCreateWithPriority(runtime.streamNonBlocking if non_blocking else 0, priority or 0)
        else:
            self.ptr = queues.PER_THREAD if ptds else 0

    def __del__(self, is_ending: Callable[[], bool] = device.is_ending) -> None:
        if getattr(self, "_is_own", False) and hasattr(self, "ptr") and not is_ending():
            runtime.streamDestroy(self.ptr)


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


class ExternalStream(_BaseStream):
    """Somebody else's stream."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr, self.device_id = ptr, device_id


def get_current_stream(device_id: int = -1) -> Any:
    """The stream in which this thread's work on a device goes."""
    number = device.current() if device_id == -1 else device_id
    return _thread.__dict__.get("current", {}).get(number, Stream.null)
