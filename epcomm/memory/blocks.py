"""Blocks of device memory that live as long as somebody looks at them.

A block is handed to the user inside an array of some framework and comes back when the last view of it goes: in any
thread, inside the garbage collector, while the interpreter ends. So a release only appends to a deque. The next
allocation takes the released blocks out of it and, for every stream that used one, records an event: whoever gets the
memory next waits for it, on the GPU. That event is recorded then and not earlier, because work was queued until the
release.

The pool holds the readers, not only the block, and so the objects that destroy their streams: in a cycle of garbage,
the finalizers of the block and of its streams run in any order, and the pool would be left with streams that are gone.

A block that was allocated under capture is part of a graph. Only later calls of the same capture, in the same stream,
may have its memory again: replays execute them in that order, and two replays of one graph never overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from epcomm.memory.ranges import FreeRanges
from epcomm.memory.timeline import Timeline

__all__ = ["GRANULE", "Block", "BlockPool"]

GRANULE = 256  # bytes; blocks start and end at multiples of it


_FOREVER = -1  # pinned by a graph that did not allocate the block, or is not known; captures have positive numbers


class _Use:
    """A piece of memory that is not free: a block has it, or had it last.

    Attributes:
        start: address.
        offset: the same from the base of the pool.
        size: bytes.
        readers: stream -> what keeps the stream alive.
        is_hidden: there are readers that are not known.
        capture: number of the capture that pins it; 0 for none.
    """

    __slots__ = ("capture", "is_hidden", "offset", "readers", "size", "start")

    def __init__(self, start: int, offset: int, size: int, capture: int) -> None:
        self.start, self.offset, self.size, self.capture = start, offset, size, capture
        self.readers: dict[int, object] = {}
        self.is_hidden = False


class Block:
    """A piece of a pool's memory, free again when this object goes. Keep it as the owner of every array over it.

    Attributes:
        ptr: device address, a multiple of 256.
        num_bytes: what was asked for.
    """

    __slots__ = ("__weakref__", "_release", "_use", "num_bytes", "ptr")

    def __init__(self, use: _Use, num_bytes: int, release: Callable[[_Use], None]) -> None:
        self.ptr = use.start
        self.num_bytes = num_bytes
        self._use = use
        self._release = release

    @property
    def offset(self) -> int:
        """From the base of the pool."""
        return self._use.offset

    def __repr__(self) -> str:
        return f"Block({self.num_bytes} bytes at {self.ptr:#x})"

    def note_reader(self, stream: int, keep: object = None) -> None:
        """Work on the memory is, or may be, queued in `stream`. Any thread.

        Args:
            stream: raw handle. It must be valid until the memory is used again, after the release of this block.
            keep: kept until then; the object that destroys the stream when it goes (a CuPy stream).
        """
        readers = self._use.readers
        if keep is not None or stream not in readers:
            readers[stream] = keep

    def note_hidden_reader(self) -> None:
        """A framework works on the memory in streams that it does not tell: only the whole device can be waited for."""
        self._use.is_hidden = True

    def pin(self, capture: int) -> None:
        """A graph under capture has the address: unless the block is of that capture, its memory is not used again
        before the pool closes.

        Args:
            capture: its number, `Timeline.capture_of`.
        """
        if self._use.capture != capture:
            self._use.capture = _FOREVER

    def __del__(self) -> None:
        # NOTE: nothing else may happen here (no CUDA call, lock, log or import): see the top of this file.
        self._release(self._use)


class BlockPool:
    """Hands out blocks of one region. One thread at a time; blocks may be released in any thread.

    Args:
        base: device address of the region, a multiple of 256.
        num_bytes: its size.
        timeline: events and streams of the device.
        may_synchronize: whether `allocate` may wait for the whole device to get at memory with hidden readers. False
            for ranks that are threads of one process: the device may be busy with a kernel that waits for this rank.
    """

    def __init__(self, base: int, num_bytes: int, timeline: Timeline, *, may_synchronize: bool = True) -> None:
        self._base = base
        self._timeline = timeline
        self._may_synchronize = may_synchronize
        self._free = FreeRanges()
        self._live: dict[int, _Use] = {}  # by address; also of blocks that were released since the last `_drain`
        self._released: deque[_Use] = deque()
        self._release = self._released.append
        self._unrecorded: list[_Use] = []  # a reader is being captured: its event cannot be recorded yet
        self._under_way: deque[object] = deque()  # events that free ranges wait for, oldest first
        self._pinned: list[_Use] = []
        # Released by one stream, which may have it again without an event: (bytes, stream) -> what was released.
        self._warm: dict[tuple[int, int], list[_Use]] = {}
        # Released in the capture that allocated them: (capture, stream, bytes) -> starts.
        self._in_capture: dict[tuple[int, int, int], list[int]] = {}
        self._is_closed = False
        self._bytes_live = self._bytes_peak = self._bytes_total = 0
        if num_bytes >= GRANULE:
            self._add_region(base, num_bytes)

    def allocate(
        self, num_bytes: int, stream: int, *, high: bool = False, is_captured: bool | None = None
    ) -> Block | None:
        """A block for work in `stream`, None if there is no room. Not collective.

        `stream` waits (on the GPU) for what may still use the memory. Preferred are a block of the same size whose only
        reader was `stream`, which needs no wait, and memory that nobody uses. Blocks the
        host only where hidden readers hold the last room. While `stream` is captured into a graph, only memory that
        nobody uses, or that the same capture released, is taken, and it stays that graph's until the pool closes.

        Args:
            num_bytes: 0 is a block of its own, too.
            stream: raw handle of the stream whose work uses the memory first.
            high: take from the upper end: small blocks that live long, out of the way of large ones.
            is_captured: whether `stream` is under capture; None: the pool asks.
        """
        size = -(-num_bytes // GRANULE) * GRANULE or GRANULE
        if is_captured is None:
            is_captured = self._timeline.is_capturing(stream)
        if self._released or self._unrecorded or self._under_way:
            self._drain(is_captured)
        warm = None if is_captured else self._warm.get((size, stream))
        use = warm.pop() if warm else self._new_use(size, stream, high, is_captured)
        if use is None:
            return None
        self._live[use.start] = use
        self._bytes_live = bytes_live = self._bytes_live + size
        if bytes_live > self._bytes_peak:
            self._bytes_peak = bytes_live
        return Block(use, num_bytes, self._release)

    def _new_use(self, size: int, stream: int, high: bool, is_captured: bool) -> _Use | None:
        capture = self._timeline.capture_of(stream) if is_captured else 0
        again = self._in_capture.get((capture, stream, size)) if is_captured else None
        start = again.pop() if again else self._find(size, stream, high, is_captured)
        return None if start is None else _Use(start, start - self._base, size, capture)

    def _find(self, size: int, stream: int, high: bool, is_captured: bool) -> int | None:
        if self._is_closed:
            return None
        start = self._free.take_clean(size, high)
        if start is None and self._warm and not is_captured:
            self._cool()
            start = self._free.take_clean(size, high)
        if start is None and not is_captured:
            start = self._take_used(size, stream, high)
        return start

    def note_reader(self, ptr: int, stream: int, keep: object) -> None:
        """`Block.note_reader` of the block around an address, if there is one. The thread of `allocate`."""
        for use in self._live.values():
            if use.start <= ptr < use.start + use.size:
                use.readers[stream] = keep or use.readers.get(stream)

    def _cool(self) -> None:
        """Give up the memory that is kept for its last stream."""
        warm = [use for uses in self._warm.values() for use in uses]
        self._warm.clear()
        if warm or self._unrecorded:
            self._record([*self._unrecorded, *warm], False)

    def largest_free(self, stream: int | None = None) -> int:
        """Bytes that an `allocate` next would find room for.

        Args:
            stream: the stream to be allocated for, if it may be under capture; None: it is not.
        """
        is_captured = stream is not None and self._timeline.is_capturing(stream)
        self._drain(is_captured)
        if not is_captured:
            self._cool()
        with_hidden = self._may_synchronize and not is_captured
        return self._free.largest(with_pending=not is_captured, with_hidden=with_hidden)

    def settle(self, *, synchronize: bool = False) -> bool:
        """Whether the memory may go: nobody holds a block, and no known work uses one. Does not block by default.

        Args:
            synchronize: wait for the device first, which is the only end of hidden readers.
        """
        self._drain(False)
        self._cool()
        if synchronize:
            self._timeline.synchronize()
            self.note_synchronized()
        self._free.settle(self._timeline.done)
        used = any(events or hidden for _, _, events, hidden in self._free)
        return not (self._live or self._unrecorded or used)

    def note_synchronized(self) -> None:
        """The caller has just waited for the whole device, after the last release: nobody uses free memory."""
        self._cool()
        self._under_way.clear()
        self._free.clean_all()

    def close(self) -> None:
        """Hand out nothing any more; `allocate` returns None. Graphs with pinned blocks may not be replayed."""
        self._is_closed = True
        self._warm.clear()
        self._pinned.clear()
        self._in_capture.clear()

    @property
    def stats(self) -> dict[str, int]:
        """Counts, as of the last `allocate`: blocks and bytes that are held, their peak, bytes free, in use by queued
        work, and pinned by graphs whose arrays are gone; bytes of the whole pool."""
        sizes = [(end - start, bool(events or hidden)) for start, end, events, hidden in self._free]
        kept = sum(size * len(uses) for (size, _), uses in self._warm.items())
        return {
            "num_live": len(self._live),
            "bytes_live": self._bytes_live,
            "bytes_peak": self._bytes_peak,
            "bytes_free": sum(size for size, _ in sizes) + kept,
            "bytes_pending": sum(size for size, is_used in sizes if is_used) + kept,
            "bytes_pinned": sum(use.size for use in self._pinned)
            + sum(size * len(starts) for (_, _, size), starts in self._in_capture.items()),
            "bytes_total": self._bytes_total,
        }

    def _add_region(self, start: int, num_bytes: int) -> None:
        """Add memory; the granule that does not fit at its end stays unused."""
        end = start + num_bytes // GRANULE * GRANULE
        self._free.add_border(start)
        self._free.add(start, end)
        self._bytes_total += end - start

    def _take_used(self, size: int, stream: int, high: bool) -> int | None:
        """Room that was in use when it was released; `stream` waits for that."""
        if self._free.settle(self._timeline.done):
            start = self._free.take_clean(size, high)
            if start is not None:
                return start
        taken = self._free.take_pending(size, high)
        if taken is not None:
            start, events = taken
            for event in events:
                self._timeline.wait(stream, event)
            return start
        if not self._may_synchronize or self._free.largest(with_pending=True, with_hidden=True) < size:
            return None
        self._timeline.synchronize()
        self.note_synchronized()
        return self._free.take_clean(size, high)

    def _drain(self, is_captured: bool) -> None:
        """Take in the released blocks."""
        released, used = self._released, self._unrecorded
        while released:
            use = released.popleft()
            del self._live[use.start]
            self._bytes_live -= use.size
            readers = use.readers
            if len(readers) == 1 and not (use.is_hidden or use.capture or is_captured):
                (reader,) = readers
                warm = self._warm.get((use.size, reader))
                if warm is None:
                    warm = self._warm[use.size, reader] = []
                warm.append(use)
            elif readers or use.capture:
                used.append(use)
            else:
                self._free.add(use.start, use.start + use.size, (), use.is_hidden)
        if used:
            self._record(used, is_captured)
        if self._under_way and not is_captured:
            self._forget_done()

    def _record(self, uses: list[_Use], is_captured: bool) -> None:
        """Record the events of blocks that had readers. During a capture they would become part of the graph, so
        those blocks wait until it is over."""
        self._unrecorded = []
        events: dict[int, object] = {}  # one a stream serves all blocks; None: it is being captured
        for use in uses:
            if use.capture:
                self._keep_pinned(use)
                continue
            for reader in use.readers:
                if reader not in events:
                    is_capturing = is_captured or self._timeline.is_capturing(reader)
                    events[reader] = None if is_capturing else self._timeline.record(reader)
            awaited = tuple([events[reader] for reader in use.readers])
            if None in awaited:
                self._unrecorded.append(use)
            else:
                self._free.add(use.start, use.start + use.size, awaited, use.is_hidden)
        self._under_way.extend([event for event in events.values() if event is not None])

    def _keep_pinned(self, use: _Use) -> None:
        if use.capture != _FOREVER and len(use.readers) == 1 and not use.is_hidden:
            (reader,) = use.readers
            self._in_capture.setdefault((use.capture, reader, use.size), []).append(use.start)
        else:
            self._pinned.append(use)

    def _forget_done(self) -> None:
        """Look at the oldest events, so that the list of ranges stays short at the price of one question a call."""
        finished = []
        while self._under_way and self._timeline.done(self._under_way[0]):
            finished.append(self._under_way.popleft())
        if finished:
            done = {id(event) for event in finished}
            self._free.settle(lambda event: id(event) in done)
