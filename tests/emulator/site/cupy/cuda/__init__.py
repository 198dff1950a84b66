"""Stand-in for ``cupy.cuda``."""

from __future__ import annotations

from cupy.cuda import driver, runtime
from cupy.cuda.devices import Device, is_available
from cupy.cuda.memory import (
    Memory,
    MemoryPointer,
    UnownedMemory,
    alloc,
    alloc_pinned_memory,
)
from cupy.cuda.streams import Event, ExternalStream, Graph, Stream, get_current_stream, get_elapsed_time

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "Graph",
    "Memory",
    "MemoryPointer",
    "Stream",
    "UnownedMemory",
    "alloc",
    "alloc_pinned_memory",
    "driver",
    "get_current_stream",
    "get_elapsed_time",
    "is_available",
    "runtime",
]
