"""Memory that other ranks can address."""

from epcomm.memory.segments import FileSegments, LocalSegments, SegmentStore

__all__ = ["FileSegments", "LocalSegments", "SegmentStore"]
