"""Memory that other ranks can address, and blocks of GPU memory for outputs."""

from epcomm.memory.blocks import Block, BlockPool
from epcomm.memory.local_pool import LocalPool
from epcomm.memory.parked import close_or_park, sweep
from epcomm.memory.segments import FileSegments, LocalSegments, SegmentStore
from epcomm.memory.symmetric import SymmetricMemory
from epcomm.memory.timeline import CudaTimeline

__all__ = [
    "Block",
    "BlockPool",
    "CudaTimeline",
    "FileSegments",
    "LocalPool",
    "LocalSegments",
    "SegmentStore",
    "SymmetricMemory",
    "close_or_park",
    "sweep",
]
