"""The names of ``deep_ep.utils``."""

from __future__ import annotations

from epcomm.event import EventOverlap

__all__ = ["EventHandle", "EventOverlap"]


class EventHandle:
    """The work submitted so far to the current stream, to be wrapped as ``EventOverlap(EventHandle())``.

    On the host backend work is done when its call returns, so this always is in the past.
    """

    def current_stream_wait(self) -> None:
        """Make the current stream wait for this event. Does not block the host."""
