"""``cuda_src/kernels/internode_combine.cu``: rows back to their tokens on several nodes, summed in two steps."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from epcomm.jit import Program
from epcomm.kernels import combine
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT, round_up
from epcomm.kernels.rings import MAX_UNIT, NODES, RING, Message
from epcomm.kernels.rows import num_warps, pipe_bytes

__all__ = ["ENTRY", "FIELDS", "PROGRAMS", "WANTED_GROUPS", "Messages", "Shape", "messages", "shape"]

PROGRAMS = {
    dtype: Program("kernels/internode_combine.cu", program.defines) for dtype, program in combine.PROGRAMS.items()
}
ENTRY = "epcomm_internode_combine"
_MAX_WARPS = 16  # half of them gather, half of them answer
_UNIT_BYTES = 56 << 10  # of rows of an answer
WANTED_GROUPS = 256

# area, ranks_per_node, num_nodes; asked: offset, num_groups, group_bytes, head_bytes, row_bytes, unit_tokens, unused;
# answered: likewise; entry: rows, weights, num_tokens, unused, agreed[12];
# x, x_weights, send_pos, rank_prefix, bias[2], out, out_weights;
# row_bytes, piece_bytes, answer_weights, num_topk, num_worst_tokens, unused
FIELDS = struct.Struct(f"{NODES.format}{RING.format[1:]}{RING.format[1:]}2IiI{NUM_ENTRY_AGREED}I8Q3I2iI")


class Shape(NamedTuple):
    """Launch shape for rows of one size."""

    piece_bytes: int
    threads: int
    shared_bytes: int


class Messages(NamedTuple):
    """Which rows are to be summed, and the sums; `weights` is the offset of the weights' sum in a row of these."""

    asked: Message
    answered: Message
    weights: int


@functools.lru_cache(maxsize=256)
def shape(row_bytes: int, ranks_per_node: int, num_nodes: int, memory: int) -> Shape:
    """As `epcomm.kernels.combine.shape`: pieces come from the ranks of a node, and from the other nodes."""
    sources = ranks_per_node + num_nodes - 1
    piece = combine.shape(row_bytes, sources, memory).piece_bytes
    stages = combine.STAGES * (piece * sources if memory else 8 * sources)
    warps = num_warps(memory, 2 * combine.STAGES, stages, _MAX_WARPS) // 2 * 2 if memory else _MAX_WARPS
    return Shape(piece, 32 * warps, pipe_bytes(warps, 2 * combine.STAGES, stages))


@functools.lru_cache(maxsize=256)
def messages(row_bytes: int, num_topk: int, ranks_per_node: int) -> Messages:
    """What travels of a unit of tokens; `num_topk`: 0 without weights."""
    tokens = max(1, min(MAX_UNIT, _UNIT_BYTES // row_bytes))
    asked = Message(tokens, 0, round_up(4 * ranks_per_node, 16))
    return Messages(asked, Message(tokens, 0, round_up(row_bytes + 4 * num_topk, UNIT)), row_bytes)
