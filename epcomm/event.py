"""EventOverlap: a point in a stream of work that later work can wait for."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

__all__ = ["EventOverlap"]


class EventOverlap:
    """What an operation leaves behind for others to wait on, with DeepEP's interface.

    On the host backend every operation is complete when its call returns, so an event there has
    always happened and waiting for it returns at once.

    Args:
        event: the backend's event, None when there is nothing to wait for.
        extra_tensors: arrays that must stay alive until the event has happened.
    """

    def __init__(self, event: Any = None, extra_tensors: Sequence[Any] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make the caller's current stream wait for this event. Does not block the host."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        """``with event:`` runs the body first and waits at its end, so the body overlaps with the operation."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.current_stream_wait()
