"""Events: points in streams."""

from __future__ import annotations

import itertools
import time

from emulated_gpu import device
from emulated_gpu.graphs import Capture
from emulated_gpu.queues import Queue
from emulated_gpu.status import GpuError, Status

__all__ = ["Event", "create", "destroy", "find"]

_HANDLES = itertools.count(0xE7E00000, 0x10)
_by_handle: dict[int, Event] = {}


class _Moment:
    """One recording of an event."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.time_s = 0.0
        self.number = queue.put(self._happen)

    def _happen(self) -> None:
        self.time_s = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return self.queue.is_done(self.number)


class Event:
    """An event that may be recorded again and again; waits refer to the recording that was the last one then."""

    def __init__(self, handle: int, has_time: bool) -> None:
        self.handle, self._has_time = handle, has_time
        self._moment: _Moment | None = None
        self._captured: tuple[Capture, frozenset[int]] | None = None

    def record(self, queue: Queue) -> None:
        if queue.capture is not None:
            self._captured, self._moment = (queue.capture, queue.capture.ends(queue)), None
        else:
            self._captured, self._moment = None, _Moment(queue)

    def wait_in(self, queue: Queue) -> None:
        """Later operations of `queue` come after the event."""
        if self._captured is not None:
            capture, ends = self._captured
            if not capture.is_active:
                raise GpuError(Status.CAPTURED_EVENT, "the event is of a capture that has ended")
            capture.join(queue, ends)
        elif self._moment is not None and queue.capture is not None:
            queue.capture.invalidate()
            raise GpuError(Status.STREAM_CAPTURE_ISOLATION, "a capture cannot wait for an event from outside")
        elif self._moment is not None and not self._moment.is_done:
            queue.put(None, [(self._moment.queue, self._moment.number)])

    def query(self) -> bool:
        """Whether it has happened."""
        self._check_not_captured()
        device.check()
        return self._moment is None or self._moment.is_done

    def synchronize(self) -> None:
        """Block the host until it has happened."""
        self._check_not_captured()
        if self._moment is not None:
            self._moment.queue.wait(self._moment.number)
        device.check()

    def ms_since(self, start: Event) -> float:
        for event in (start, self):
            if not event._has_time or event._moment is None:
                raise GpuError(Status.INVALID_HANDLE, "an event that was not recorded, or takes no time")
            if not event.query():
                raise GpuError(Status.NOT_READY, "an event that has not happened yet")
        assert self._moment is not None
        assert start._moment is not None
        return 1e3 * (self._moment.time_s - start._moment.time_s)

    def _check_not_captured(self) -> None:
        if self._captured is not None:
            raise GpuError(Status.CAPTURED_EVENT, "the event was recorded by a capture")


def create(has_time: bool) -> int:
    """Handle of a new event."""
    handle = next(_HANDLES)
    _by_handle[handle] = Event(handle, has_time)
    return handle


def find(handle: int) -> Event:
    event = _by_handle.get(handle)
    if event is None:
        raise GpuError(Status.INVALID_HANDLE, f"no event {handle:#x}")
    return event


def destroy(handle: int) -> None:
    _by_handle.pop(handle, None)
