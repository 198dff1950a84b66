"""Free ranges of addresses, and what must happen before each of them may be written again; no CUDA, no threads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

__all__ = ["FreeRanges"]

# Events that must have happened before a range is reused. Two ranges that were released together share the objects.
Events = tuple[object, ...]


class _Range:
    __slots__ = ("end", "events", "hidden", "start")

    def __init__(self, start: int, end: int, events: Events, hidden: bool) -> None:
        self.start, self.end, self.events, self.hidden = start, end, events, hidden


class FreeRanges:
    """The free ranges, by address. *Clean* ranges may be written at once; others wait for events, or are *hidden*:
    used by somebody whose work cannot be waited for except by waiting for the whole device.

    Neighbours with the same state are one range. Few ranges are expected, so the searches look at all of them.
    """

    def __init__(self) -> None:
        self._ranges: list[_Range] = []
        self._starts: list[int] = []  # of `_ranges`, for bisection
        self._borders: set[int] = set()

    def __iter__(self) -> Iterator[tuple[int, int, Events, bool]]:
        """Start, end, events and hidden of every free range, by address."""
        return iter([(r.start, r.end, r.events, r.hidden) for r in self._ranges])

    def add_border(self, address: int) -> None:
        """Never join what ends at `address` with what starts there: they are separate mappings."""
        self._borders.add(address)

    def add(self, start: int, end: int, events: Events = (), hidden: bool = False) -> None:
        """Free a range."""
        index = bisect_left(self._starts, start)
        ranges, starts = self._ranges, self._starts
        if index < len(ranges) and end not in self._borders:
            after = ranges[index]
            if after.start == end and after.events == events and after.hidden == hidden:
                del ranges[index], starts[index]
                end = after.end
        if index and start not in self._borders:
            before = ranges[index - 1]
            if before.end == start and before.events == events and before.hidden == hidden:
                before.end = end
                return
        ranges.insert(index, _Range(start, end, events, hidden))
        starts.insert(index, start)

    def take_clean(self, num_bytes: int, high: bool) -> int | None:
        """Take `num_bytes` that may be written at once; their address.

        The smallest range that is large enough gives its lower end; with `high`, the highest one gives its upper end.
        """
        best = -1
        room = 0
        for index, candidate in enumerate(self._ranges):
            if candidate.events or candidate.hidden:
                continue
            size = candidate.end - candidate.start
            if size >= num_bytes and (best < 0 or high or size < room):
                best, room = index, size
        return None if best < 0 else self._cut(best, num_bytes, high)

    def take_pending(self, num_bytes: int, high: bool) -> tuple[int, list[object]] | None:
        """Take `num_bytes` from a run of neighbours that are not hidden; their address, and the events to wait for."""
        best: tuple[int, int] | None = None
        room = 0
        for first, last in self._runs(with_pending=True, with_hidden=False):
            size = self._ranges[last].end - self._ranges[first].start
            if size >= num_bytes and (best is None or high or size < room):
                best, room = (first, last), size
        if best is None:
            return None
        first, last = best
        events: dict[int, object] = {}
        start = self._ranges[last].end - num_bytes if high else self._ranges[first].start
        missing = num_bytes
        while missing:
            # A range that is used up is gone from the list: from below, the next one then has the same index.
            index = last if high else first
            edge = self._ranges[index]
            part = min(missing, edge.end - edge.start)
            events.update((id(event), event) for event in edge.events)
            self._cut(index, part, high)
            missing -= part
            last -= 1
        return start, list(events.values())

    def largest(self, *, with_pending: bool, with_hidden: bool) -> int:
        """Bytes of the longest run of neighbours that `take_clean` or `take_pending` could give."""
        runs = self._runs(with_pending=with_pending, with_hidden=with_hidden)
        return max((self._ranges[last].end - self._ranges[first].start for first, last in runs), default=0)

    def settle(self, done: Callable[[object], bool]) -> bool:
        """Forget the events that are done; whether a range became clean."""
        changed = False
        for candidate in self._ranges:
            if candidate.events:
                left = tuple([event for event in candidate.events if not done(event)])
                if len(left) != len(candidate.events):
                    candidate.events = left
                    changed = True
        if changed:
            self._join()
        return changed

    def clean_all(self) -> None:
        """The whole device has been waited for: every range may be written."""
        for candidate in self._ranges:
            candidate.events, candidate.hidden = (), False
        self._join()

    def _cut(self, index: int, num_bytes: int, high: bool) -> int:
        """Take `num_bytes` off one end of a range; their address."""
        source = self._ranges[index]
        if source.end - source.start == num_bytes:
            del self._ranges[index], self._starts[index]
            return source.start
        if high:
            source.end -= num_bytes
            return source.end
        start = source.start
        source.start = self._starts[index] = start + num_bytes
        return start

    def _join(self) -> None:
        old, self._ranges, self._starts = self._ranges, [], []
        for piece in old:
            last = self._ranges[-1] if self._ranges else None
            if (
                last is not None
                and last.end == piece.start
                and piece.start not in self._borders
                and (last.events, last.hidden) == (piece.events, piece.hidden)
            ):
                last.end = piece.end
            else:
                self._ranges.append(piece)
                self._starts.append(piece.start)

    def _runs(self, *, with_pending: bool, with_hidden: bool) -> Iterator[tuple[int, int]]:
        """First and last index of every longest run of usable neighbours."""
        first = -1
        for index, candidate in enumerate(self._ranges):
            usable = (with_pending or not candidate.events) and (with_hidden or not candidate.hidden)
            joined = first >= 0 and self._ranges[index - 1].end == candidate.start
            if first >= 0 and not (usable and joined and candidate.start not in self._borders):
                yield first, index - 1
                first = -1
            if usable and first < 0:
                first = index
        if first >= 0:
            yield first, len(self._ranges) - 1
