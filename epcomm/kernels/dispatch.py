"""``cuda_src/kernels/dispatch.cu``: rows to their final places."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from epcomm.jit import Program
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT, round_up
from epcomm.kernels.rows import Pieces, cut, num_warps, pipe_bytes

__all__ = ["BESIDE_WARPS", "ENTRY", "FIELDS", "PROGRAM", "Shape", "Slot", "shape", "slot"]

STAGES = 2
PROGRAM = Program("kernels/dispatch.cu", (("KERNEL_STAGES", str(STAGES)),))
ENTRY = "epcomm_dispatch"
_MAX_WARPS = 16
BESIDE_WARPS = 4  # that write what travels beside rows, and as many again that take it out of the window
# Measured on an H200 with 1 to 8 ranks on it: above that, writes to many places slow each other down by up to 17 %;
# below it, there is too little to hide latency (NVLink needs 0.7 MB).
_BYTES_UNDER_WAY = 3_670_016

# window: offset, area_bytes, slot_bytes, num_slots; entry: rows, metadata, num_tokens, unused, agreed[12];
# slot_field[5], unused; x, scales, scale_stride_token, scale_stride_scale, topk_idx, topk_weights, send_pos,
# rank_prefix; out[5]; pieces[3], stage_bytes; num_scales, scale_bytes, num_topk, index_bytes,
# num_local_experts, num_worst_tokens, is_forced, has_weights
FIELDS = struct.Struct(f"<2Q2I2IiI{NUM_ENTRY_AGREED}I6I2Q2q4Q5Q4I8i")


class Shape(NamedTuple):
    """Launch shape for rows of one size."""

    pieces: Pieces
    threads: int
    shared_bytes: int


class Slot(NamedTuple):
    """A slot of the window: one row and what travels beside it. Rows start at multiples of UNIT, as in outputs."""

    fields: tuple[int, int, int, int, int, int]  # offsets of row, scales, topk_idx, topk_weights, source; unused
    num_bytes: int


@functools.lru_cache(maxsize=256)
def shape(row_bytes: int, memory: int, blocks_on_gpu: int, is_windowed: bool) -> Shape:
    """Warps for as many bytes under way as a GPU's memory takes without mixing up its pages.

    Args:
        row_bytes: bytes of a row.
        memory: `stage_memory`, through which the copy engine moves rows; 0: there is none, they go through registers.
        blocks_on_gpu: blocks of this operation that all ranks of the GPU run at once.
        is_windowed: half of the warps empty the window; then as many as have room.
    """
    pieces = cut(row_bytes)
    beside = BESIDE_WARPS * (1 + is_windowed)
    stage_bytes = STAGES * pieces.piece_bytes if memory else 0
    warps = _MAX_WARPS
    if memory:
        wanted = _MAX_WARPS if is_windowed else round(_BYTES_UNDER_WAY / (blocks_on_gpu * stage_bytes))
        room = memory - beside * STAGES * 8
        warps = num_warps(room, STAGES, stage_bytes, max(2, min(_MAX_WARPS, wanted)))
    shared_bytes = pipe_bytes(warps + beside, STAGES, 0) + warps * stage_bytes
    return Shape(pieces, 32 * (warps + beside), shared_bytes)


@functools.lru_cache(maxsize=256)
def slot(row_bytes: int, scales_bytes: int, topk_bytes: int, weights_bytes: int) -> Slot:
    """Layout of a slot; the arguments are bytes of one row's fields, 0 for those that do not travel."""
    offsets, offset = [], 0
    for num_bytes in (row_bytes, scales_bytes, topk_bytes, weights_bytes, 4):
        offsets.append(offset)
        offset += round_up(num_bytes, 8)
    return Slot((*offsets, 0), round_up(offset, UNIT))  # type: ignore[arg-type]
