"""How kernels cut rows, and how much shared memory their pipes take. Twin of ``cuda_src/sync/rows.cuh``."""

from __future__ import annotations

from typing import NamedTuple

from epcomm.kernels.layout import UNIT, round_up

__all__ = ["Pieces", "cut", "num_warps", "pipe_bytes", "stage_memory"]

_STATIC_BYTES = 3 * 1024  # shared memory that kernels take for other things
_MAX_PIECE = 14336  # bytes
_BULK_ARCHITECTURE = 90  # the first with a copy engine in the SM


class Pieces(NamedTuple):
    """Pieces of `piece_bytes`, the last one shorter; all multiples of 16 bytes."""

    row_bytes: int
    piece_bytes: int
    num_pieces: int


def stage_memory(block_bytes: int, architecture: str) -> int:
    """Dynamic shared memory of a block through which the copy engine of its SM moves rows; 0: there is no such engine.

    All that the GPU lets a block have, `block_bytes`: the more is under way, the fewer SMs will do. `architecture` as
    for `epcomm.jit.compile_program`.
    """
    return block_bytes - _STATIC_BYTES if int(architecture) >= _BULK_ARCHITECTURE else 0


def cut(row_bytes: int, max_piece: int = _MAX_PIECE) -> Pieces:
    """Cut rows into as few pieces as possible, of about equal size."""
    wanted = -(-row_bytes // max_piece)
    piece = round_up(-(-row_bytes // wanted), 16)
    return Pieces(row_bytes, piece, -(-row_bytes // piece))


def pipe_bytes(num_warps: int, words_per_warp: int, stage_bytes_per_warp: int) -> int:
    """Dynamic shared memory of a block: the barriers of all warps, then their stages."""
    return round_up(num_warps * words_per_warp * 8, UNIT) + num_warps * stage_bytes_per_warp


def num_warps(memory: int, words_per_warp: int, stage_bytes_per_warp: int, most: int) -> int:
    """As many warps as have stages in `memory`, at least the two that the roles of a kernel need."""
    fitting = (memory - UNIT) // (stage_bytes_per_warp + words_per_warp * 8)
    return max(2, min(most, fitting))
