"""Streams: each is a queue of operations and a thread that executes them in order.

The host runs ahead of them as of a GPU. The legacy default stream waits for all blocking streams, and they for it.
"""

from __future__ import annotations

import itertools
import queue as queues
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from emulated_gpu import device
from emulated_gpu.status import GpuError, Status

if TYPE_CHECKING:
    from emulated_gpu.graphs import Capture

__all__ = ["LEGACY", "PER_THREAD", "Operation", "Queue", "create", "find", "synchronize_device"]

LEGACY, PER_THREAD = 1, 2  # handles that every runtime knows; 0 means the first
_HANDLES = itertools.count(0x5EAD0000, 0x100)

Operation = Callable[[], None]
Point = tuple["Queue", int]  # an operation, by its number

# Makes the order in which operations are put the same for all queues; never held while an operation runs.
_order = threading.Lock()
_by_handle: dict[int, Queue] = {}
_alive: set[Queue] = set()  # with operations that may be under way, destroyed ones among them
_thread = threading.local()


class Queue:
    """One stream.

    Attributes:
        handle: what the API calls it by.
        device: whose.
        is_blocking: it and the legacy default stream wait for each other.
        capture: what its operations are recorded for instead of being executed.
    """

    def __init__(self, handle: int, gpu: int, is_blocking: bool) -> None:
        self.handle, self.device, self.is_blocking = handle, gpu, is_blocking
        self.capture: Capture | None = None
        self._last = self._done = 0
        self._items: queues.SimpleQueue[tuple[Operation | None, Sequence[Point], bool] | None] = queues.SimpleQueue()
        self._progress = threading.Condition()
        self._is_started = self._is_destroyed = False

    def submit(self, operation: Operation) -> None:
        """Have an operation executed after all that is here, or recorded where the stream is captured."""
        if self.capture is not None:
            self.capture.add(self, operation)
        else:
            self.put(operation)

    def put(self, operation: Operation | None, waits: Sequence[Point] = ()) -> int:
        """As `submit`, never recorded, after the operations `waits` of other queues; its number. Does not block."""
        device.check()
        with _order:
            if self._is_destroyed:
                raise GpuError(Status.INVALID_HANDLE, f"stream {self.handle:#x} was destroyed")
            waits = [*waits, *self._implicit_waits()]
            self._last += 1
            self._items.put((operation, waits, True))
            if not self._is_started:
                self._start()
            return self._last

    def release(self, free: Operation) -> None:
        """Have memory freed after all that is here. For finalizers: takes no lock that this thread may hold."""
        if self._is_started and not self._is_destroyed:
            self._items.put((free, (), False))
        elif self not in _alive:
            free()
        # else the queue ends, with operations that may use the memory: it stays.

    def is_done(self, number: int) -> bool:
        return self._done >= number

    def wait(self, number: int) -> None:
        """Block the calling thread until that operation is done."""
        if self._done < number:
            with self._progress:
                self._progress.wait_for(lambda: self._done >= number)

    def synchronize(self) -> None:
        """Block the host until all is done."""
        if self.capture is not None:
            self.capture.invalidate()
            raise GpuError(Status.STREAM_CAPTURE_UNSUPPORTED, "a stream under capture cannot be waited for")
        if self.handle == LEGACY:
            self.check_implicit()
            synchronize_blocking(self.device)
        self.wait(self._last)
        device.check()

    def query(self) -> bool:
        """Whether all is done."""
        if self.capture is not None:
            self.capture.invalidate()
            raise GpuError(Status.STREAM_CAPTURE_UNSUPPORTED, "a stream under capture cannot be asked")
        device.check()
        return self._done >= self._last

    def destroy(self) -> None:
        """Take the handle away; what is here gets done. For finalizers, too."""
        _by_handle.pop(self.handle, None)
        self._is_destroyed = True
        self._items.put(None)

    @property
    def pending(self) -> Point | None:
        """Its last operation, if that is not known to be done."""
        return (self, self._last) if self._done < self._last else None

    def check_implicit(self) -> None:
        """Raise where the legacy default stream, which this is, would wait for a captured one."""
        for queue in list(_by_handle.values()):
            if queue.capture is not None and queue.is_blocking and queue.device == self.device:
                queue.capture.invalidate()
                raise GpuError(Status.STREAM_CAPTURE_IMPLICIT, "the default stream would wait for a captured one")

    def _implicit_waits(self) -> list[Point]:
        if self.handle == LEGACY:
            self.check_implicit()
            points = [other.pending for other in list(_alive) if other.is_blocking and other.device == self.device]
            return [point for point in points if point is not None and point[0] is not self]
        if self.is_blocking:
            point = _legacy(self.device).pending
            return [] if point is None else [point]
        return []

    def _start(self) -> None:
        self._is_started = True
        _alive.add(self)
        threading.Thread(target=self._work, name=f"stream {self.handle:#x}", daemon=True).start()

    def _work(self) -> None:
        while (item := self._items.get()) is not None:
            operation, waits, is_counted = item
            for other, number in waits:
                other.wait(number)
            if operation is not None and not device.has_failed() and not device.is_ending():
                try:
                    operation()
                except BaseException as error:  # it must not end the thread: others wait for the queue
                    device.fail(f"stream {self.handle:#x}: {type(error).__name__}: {error}")
            del operation, item  # and with them what they keep alive
            if is_counted:
                with self._progress:
                    self._done += 1
                    self._progress.notify_all()
        _alive.discard(self)


def create(gpu: int, is_blocking: bool) -> Queue:
    """A new stream."""
    queue = Queue(next(_HANDLES), gpu, is_blocking)
    _by_handle[queue.handle] = queue
    return queue


def find(handle: int) -> Queue:
    """The stream that a handle means for the calling thread."""
    if handle in (0, LEGACY):
        return _legacy(device.current())
    if handle == PER_THREAD:
        mine: dict[int, Queue] = _thread.__dict__.setdefault("queues", {})
        gpu = device.current()
        if gpu not in mine:
            mine[gpu] = Queue(PER_THREAD, gpu, True)
        return mine[gpu]
    queue = _by_handle.get(handle)
    if queue is None:
        raise GpuError(Status.INVALID_HANDLE, f"no stream {handle:#x}, or one that was destroyed")
    return queue


def synchronize_blocking(gpu: int) -> None:
    """Wait for what is in the blocking streams of a device now."""
    _wait_for([queue for queue in list(_alive) if queue.device == gpu and queue.is_blocking])


def synchronize_device(gpu: int) -> None:
    """Wait for what is in all streams of a device now."""
    captured = [queue.capture for queue in list(_by_handle.values()) if queue.device == gpu and queue.capture]
    for capture in captured:
        capture.invalidate()
    if captured:
        raise GpuError(Status.STREAM_CAPTURE_UNSUPPORTED, "a device with a stream under capture cannot be waited for")
    _wait_for([queue for queue in list(_alive) if queue.device == gpu])
    device.check()


def _wait_for(waited: Sequence[Queue]) -> None:
    for point in [queue.pending for queue in waited]:
        if point is not None:
            point[0].wait(point[1])


_legacy_queues: dict[int, Queue] = {gpu: Queue(LEGACY, gpu, True) for gpu in range(device.NUM_GPUS)}


def _legacy(gpu: int) -> Queue:
    return _legacy_queues[gpu]
