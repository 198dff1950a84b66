"""``cuda_src/kernels/link_probe.cu``: rows to and from the other ranks, and nothing else."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from epcomm.jit import Program
from epcomm.kernels.dispatch import STAGES, Shape
from epcomm.kernels.layout import MAX_RANKS
from epcomm.kernels.rows import cut, num_warps, pipe_bytes

__all__ = ["ENTRY", "FIELDS", "PROGRAM", "peers_of", "shape"]

PROGRAM = Program("kernels/link_probe.cu", (("KERNEL_STAGES", str(STAGES)),))
ENTRY = "epcomm_link_probe"
_MAX_WARPS = 16

# region[32], own; pieces[3], num_rows, rank, num_ranks, is_reading, unused
FIELDS = struct.Struct(f"<{MAX_RANKS}QQ3I4iI")


def shape(row_bytes: int, memory: int) -> Shape:
    """As many warps as have room for pieces. `memory`: `stage_memory`, or 0: rows go through registers."""
    pieces = cut(row_bytes)
    stage_bytes = STAGES * pieces.piece_bytes if memory else 0
    warps = num_warps(memory, STAGES, stage_bytes, _MAX_WARPS) if memory else _MAX_WARPS
    return Shape(pieces, 32 * warps, pipe_bytes(warps, STAGES, stage_bytes))


def peers_of(rank: int, num_ranks: int, num_rows: int) -> NDArray[np.int64]:
    """``[num_rows]``: the rank that each row goes to, or comes from."""
    draw = (np.arange(num_rows, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(16)
    return (rank + 1 + draw.astype(np.int64) % (num_ranks - 1)) % num_ranks
