"""Stream capture, and the graphs that come out of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from emulated_gpu.queues import LEGACY, Operation, Queue
from emulated_gpu.status import GpuError, Status

__all__ = ["Capture", "Graph", "begin", "end", "is_capturing"]

_numbers = itertools.count(1)


class Graph:
    """Recorded operations. A launch executes them one after the other, as they were recorded, in one stream."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._operations = list(operations)

    def launch(self, queue: Queue) -> None:
        if queue.capture is not None:
            queue.capture.invalidate()
            raise GpuError(Status.STREAM_CAPTURE_UNSUPPORTED, "graphs in graphs are not emulated")
        queue.put(self._execute)

    def _execute(self) -> None:
        for operation in self._operations:
            operation()


class Capture:
    """Operations of streams, with what each comes after.

    Args:
        origin: the stream in which it began; others join it by waiting for its events.
    """

    def __init__(self, origin: Queue) -> None:
        self.origin = origin
        self.number = next(_numbers)
        self.is_active = True
        self._is_valid = True
        self._operations: list[Operation] = []
        self._before: list[frozenset[int]] = []  # direct predecessors
        self._ends: dict[Queue, frozenset[int]] = {origin: frozenset()}  # what the next operation comes after

    def add(self, queue: Queue, operation: Operation) -> None:
        self._before.append(self._ends[queue])
        self._ends[queue] = frozenset((len(self._operations),))
        self._operations.append(operation)

    def ends(self, queue: Queue) -> frozenset[int]:
        """What an event that is recorded now stands for."""
        return self._ends[queue]

    def join(self, queue: Queue, ends: frozenset[int]) -> None:
        """Later operations of `queue`, which becomes a part of the capture, come after those of an event."""
        if queue.capture not in (None, self):
            self.invalidate()
            raise GpuError(Status.STREAM_CAPTURE_MERGE, "two captures cannot become one")
        if queue.handle == LEGACY:
            self.invalidate()
            raise GpuError(Status.STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured")
        queue.capture = self
        self._ends[queue] = self._ends.get(queue, frozenset()) | ends

    def invalidate(self) -> None:
        """Something was done that a capture forbids: it ends without a graph."""
        self._is_valid = False

    def finish(self) -> Graph:
        self.is_active = False
        for queue in self._ends:
            queue.capture = None
        if not self._is_valid:
            raise GpuError(Status.STREAM_CAPTURE_INVALIDATED, "something was done that a capture forbids")
        known: set[int] = set()
        left = set(self._ends[self.origin])
        while left:
            number = left.pop()
            known.add(number)
            left |= self._before[number] - known
        if any(ends - known for ends in self._ends.values()):
            raise GpuError(Status.STREAM_CAPTURE_UNJOINED, "the first stream does not wait for all others")
        return Graph(self._operations)


def begin(queue: Queue) -> None:
    """Record the operations of a stream from here on."""
    if queue.capture is not None:
        raise GpuError(Status.STREAM_CAPTURE_UNSUPPORTED, "the stream is captured already")
    if queue.handle == LEGACY:
        raise GpuError(Status.STREAM_CAPTURE_UNSUPPORTED, "the default stream cannot be captured")
    queue.capture = Capture(queue)


def end(queue: Queue) -> Graph:
    """The graph of what was recorded since `begin`."""
    capture = queue.capture
    if capture is None:
        raise GpuError(Status.STREAM_CAPTURE_UNMATCHED, "the stream is not captured")
    if capture.origin is not queue:
        capture.invalidate()
        raise GpuError(Status.STREAM_CAPTURE_UNMATCHED, "the capture did not begin in this stream")
    return capture.finish()


def is_capturing(queue: Queue) -> bool:
    if queue.handle == LEGACY:
        queue.check_implicit()
    return queue.capture is not None
