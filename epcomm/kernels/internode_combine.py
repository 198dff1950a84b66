"""``cuda_src/kernels/internode_combine.cu``: rows back to their tokens on several nodes, summed in two steps."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from epcomm.jit import Program
from epcomm.kernels import combine
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT, round_up
from epcomm.kernels.rings import MAX_UNIT, NODES, PLACES_BYTES, RING, Message
from epcomm.kernels.rows import num_warps, pipe_bytes

__all__ = ["ENTRY", "FIELDS", "PROGRAMS", "WANTED_GROUPS", "Messages", "Shape", "messages", "shape"]

PROGRAMS = {
    dtype: Program("kernels/internode_combine.cu", program.defines) for dtype, program in combine.PROGRAMS.items()
}
ENTRY = "epcomm_internode_combine"
_MAX_WARPS = 16
_PIECE_UNIT = 512  # bytes: a warp reads 16 bytes a lane
_UNIT_BYTES = 112 << 10  # of rows of an answer: each takes a fence and a question
WANTED_GROUPS = 512

# area, ranks_per_node, num_nodes, own, local;
# asked: offset, num_groups, group_bytes, row_bytes, unit_tokens; answered: likewise;
# handed: area, ranks_per_node, num_nodes, own, local; fed: offset, num_groups, group_bytes, row_bytes, unit_tokens;
# entry: rows, weights, num_tokens, unused, agreed[12];
# x, x_weights, src_idx, send_pos, rank_prefix, bias[2], out, out_weights;
# row_bytes, stage_bytes, answer_weights, num_topk, num_worst_tokens, num_feeding
FIELDS = struct.Struct(
    f"{NODES.format}{2 * RING.format[1:]}{NODES.format[1:]}{RING.format[1:]}2IiI{NUM_ENTRY_AGREED}I9Q3I3i"
)
_FEEDING = 4  # warps of a block, where x is outside of the arena


class Shape(NamedTuple):
    """Launch shape for rows of one size."""

    stage_bytes: int
    feeding: int  # warps; the others sum
    threads: int
    shared_bytes: int


class Messages(NamedTuple):
    """Which rows are to be summed, the sums, and rows that are fed; `weights`: their offset in a row of these two."""

    asked: Message
    answered: Message
    fed: Message
    weights: int


@functools.lru_cache(maxsize=256)
def shape(row_bytes: int, ranks_per_node: int, num_nodes: int, memory: int, is_windowed: bool) -> Shape:
    """Stages for pieces from the ranks of a node and from the other nodes, at least `_PIECE_UNIT` bytes of each.

    Args:
        row_bytes: bytes of a row.
        ranks_per_node, num_nodes: of the job.
        memory: `stage_memory`, into which the copy engine pulls; 0: there is none, rows go through registers.
        is_windowed: x is outside of the arena.
    """
    sources = ranks_per_node + num_nodes - 1
    stage = 8 * sources
    if memory:
        least = sources * min(_PIECE_UNIT, round_up(row_bytes, 16))
        fitting = memory // (_MAX_WARPS * combine.STAGES) - 2 * 8 - UNIT // _MAX_WARPS
        stage = min(max(least, fitting // 128 * 128), round_up(sources * row_bytes, 128))
    feeding, words = _FEEDING if is_windowed else 0, 2 * combine.STAGES
    summing = _MAX_WARPS - feeding
    if memory:  # who feeds has words there, and no stages
        summing = num_warps(memory - feeding * words * 8, words, combine.STAGES * stage, summing)
    warps = summing + feeding
    shared_bytes = pipe_bytes(warps, words, 0) + summing * combine.STAGES * stage
    return Shape(stage, feeding, 32 * warps, shared_bytes)


@functools.lru_cache(maxsize=256)
def messages(row_bytes: int, num_topk: int, ranks_per_node: int, most_tokens: int = MAX_UNIT) -> Messages:
    """What travels of a unit of tokens; `num_topk`: 0 without weights."""
    tokens = max(1, min(most_tokens, _UNIT_BYTES // row_bytes))
    asked = Message(tokens, round_up(4 * ranks_per_node, 16))
    row = round_up(row_bytes + 4 * num_topk, UNIT)
    return Messages(asked, Message(tokens, row), Message(tokens, PLACES_BYTES + row), row_bytes)
