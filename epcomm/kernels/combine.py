"""``cuda_src/kernels/combine.cu``: rows back to their tokens, summed."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from epcomm.jit import Program
from epcomm.kernels.layout import NUM_ENTRY_AGREED, round_up
from epcomm.kernels.rows import Pieces, cut, num_warps, pipe_bytes

__all__ = ["ENTRY", "FIELDS", "PROGRAMS", "Shape", "shape"]

STAGES = 2
_ELEMENTS = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float"}
PROGRAMS = {
    dtype: Program("kernels/combine.cu", (("KERNEL_ELEMENT", element), ("KERNEL_STAGES", str(STAGES))))
    for dtype, element in _ELEMENTS.items()
}
ENTRY = "epcomm_combine"
_MAX_WARPS = 16
_WANTED_WARPS = 13
_PIECE_UNIT = 512  # bytes: a warp reads 16 bytes a lane
_MAX_PIECE = 4096

# window: offset, area_bytes, slot_bytes, num_slots; entry: rows, weights, num_tokens, unused, agreed[12];
# slot_weights, piece_bytes;
# x, x_weights, src_idx, send_pos, rank_prefix, bias[2], out, out_weights; feed[3];
# row_bytes, num_topk, num_worst_tokens
FIELDS = struct.Struct(f"<2Q2I2IiI{NUM_ENTRY_AGREED}I2I9Q3II2i")


class Shape(NamedTuple):
    """Launch shape for rows of one size."""

    piece_bytes: int
    feed: Pieces
    threads: int
    shared_bytes: int


@functools.lru_cache(maxsize=256)
def shape(row_bytes: int, num_ranks: int, memory: int) -> Shape:
    """Pieces as large as lets `_WANTED_WARPS` warps keep a piece from each rank in flight and another one ready.

    Rows are cut evenly: a short last piece leaves warps with unequal work.

    Args:
        row_bytes: bytes of a row.
        num_ranks: ranks of the job.
        memory: `stage_memory`, into which the copy engine pulls; 0: there is none, rows go through registers.
    """
    most = memory // (_WANTED_WARPS * STAGES * num_ranks) // _PIECE_UNIT * _PIECE_UNIT
    most = max(_PIECE_UNIT, min(_MAX_PIECE, most))
    piece = min(round_up(-(-row_bytes // -(-row_bytes // most)), _PIECE_UNIT), row_bytes)
    stage_bytes = piece * num_ranks
    feed = cut(row_bytes, stage_bytes // 16 * 16)
    if not memory:
        return Shape(piece, feed, 32 * _MAX_WARPS, pipe_bytes(_MAX_WARPS, 2 * STAGES, 0))
    warps = num_warps(memory, 2 * STAGES, STAGES * stage_bytes, _MAX_WARPS)
    return Shape(piece, feed, 32 * warps, pipe_bytes(warps, 2 * STAGES, STAGES * stage_bytes))
