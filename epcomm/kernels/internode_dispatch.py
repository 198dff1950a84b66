"""``cuda_src/kernels/internode_dispatch.cu``: rows to their final places on several nodes, in two hops."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

from epcomm.jit import Program
from epcomm.kernels.dispatch import BESIDE_WARPS
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT, round_up
from epcomm.kernels.rings import MAX_UNIT, NODES, PLACES_BYTES, RING, Message
from epcomm.kernels.rows import Pieces, cut, num_warps, pipe_bytes

__all__ = ["ENTRY", "FIELDS", "PROGRAM", "WANTED_GROUPS", "Beside", "Shape", "beside", "rows", "shape"]

STAGES = 2
PROGRAM = Program("kernels/internode_dispatch.cu", (("KERNEL_STAGES", str(STAGES)),))
ENTRY = "epcomm_internode_dispatch"
_MAX_ROW_WARPS = 16  # half of them send, half of them forward
# As in `epcomm.kernels.dispatch`; a warp waits for its rows at the end of each message, so more are under way.
_BYTES_UNDER_WAY = 14 << 20
_MAX_PIECE = 14336  # bytes
# Through a network: a warp that sends copies its messages, too, so that many warps must, with what is under way between
# them.
_MAX_STAGED_PIECE = 7168
_SENDING = 0.6
_MOST_STAGED_TOKENS = 2  # what a node wants of these lies together
_UNIT_BYTES = 32 << 10  # of rows of a message: less is bound by latency, more comes late
_BESIDE_TOKENS = 8
WANTED_GROUPS = (256, 128)  # of rows, and of what is beside them

# area, ranks_per_node, num_nodes, own, local;
# rows: offset, num_groups, group_bytes, row_bytes, unit_tokens; beside: likewise; the same for what is handed over;
# entry: rows, metadata, num_tokens, unused, agreed[12]; slot_field[5], has_metadata;
# x, scales, scale_stride_token, scale_stride_scale, topk_idx, topk_weights, send_pos, rank_prefix; out[5];
# node_counts; pieces[3], stage_bytes; num_scales, scale_bytes, num_topk, index_bytes, num_local_experts,
# num_worst_tokens, is_forced, has_weights, num_senders, num_forwarders, num_takers, unused
_AREA = f"{NODES.format[1:]}{2 * RING.format[1:]}"
FIELDS = struct.Struct(f"<{2 * _AREA}2IiI{NUM_ENTRY_AGREED}I5Ii2Q2q4Q5QQ4I12i")


class Shape(NamedTuple):
    """Launch shape for rows of one size."""

    pieces: Pieces
    senders: int  # warps that send rows
    forwarders: int  # and that forward them
    takers: int  # and that take what is handed over
    threads: int
    shared_bytes: int


class Beside(NamedTuple):
    """What travels beside rows: offsets of the positions, scales, indices, weights and source in a row of it."""

    fields: tuple[int, int, int, int, int]
    message: Message


@functools.lru_cache(maxsize=256)
def shape(row_bytes: int, num_nodes: int, memory: int, blocks_on_gpu: int, is_staged: bool, is_windowed: bool) -> Shape:
    """As `epcomm.kernels.dispatch.shape`. Some warps send rows, the others forward them: from each other node about as
    many as are sent to the own one. Half of all take them where outputs are outside of the arena, if `is_windowed`.
    `is_staged` as for `epcomm.kernels.rings.Rings`.
    """
    most = _MAX_ROW_WARPS - (BESIDE_WARPS if is_windowed else 0)
    # What is staged or handed over is copied by warps that wait for each other: they cannot be too many.
    is_copied = is_staged or is_windowed
    pieces = cut(row_bytes, _MAX_STAGED_PIECE if is_copied else _MAX_PIECE)
    stage_bytes = STAGES * pieces.piece_bytes if memory else 0
    warps = most
    if memory:
        wanted = warps if is_copied else round(_BYTES_UNDER_WAY / (blocks_on_gpu * stage_bytes))
        warps = num_warps(memory, STAGES, stage_bytes, max(2, min(most, wanted)))
    takers = warps // 2 if is_windowed else 0
    movers = warps - takers
    senders = max(1, min(movers - 1, round(movers * (_SENDING if is_staged else 1 / num_nodes))))
    threads = 32 * (warps + (3 if is_windowed else 2) * BESIDE_WARPS)
    return Shape(pieces, senders, movers - senders, takers, threads, pipe_bytes(warps, STAGES, stage_bytes))


@functools.lru_cache(maxsize=256)
def rows(row_bytes: int, is_staged: bool, most_tokens: int = MAX_UNIT) -> Message:
    """A message of rows; `PLACES_BYTES` ahead of each say where it goes. `is_staged` as for `shape`."""
    tokens = max(1, min(most_tokens, _MOST_STAGED_TOKENS if is_staged else MAX_UNIT, _UNIT_BYTES // row_bytes))
    return Message(tokens, PLACES_BYTES + round_up(row_bytes, UNIT), is_common=True)


@functools.lru_cache(maxsize=256)
def beside(ranks_per_node: int, scales_bytes: int, topk_bytes: int, weights_bytes: int) -> Beside:
    """A message of what is beside rows; the arguments are bytes of one row's fields, 0 for those that do not travel."""
    offsets, offset = [], 0
    for num_bytes in (4 * ranks_per_node, scales_bytes, topk_bytes, weights_bytes, 4):
        offsets.append(offset)
        offset += round_up(num_bytes, 8)
    return Beside(tuple(offsets), Message(_BESIDE_TOKENS, round_up(offset, 16)))  # type: ignore[arg-type]
