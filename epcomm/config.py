"""Tuning configuration, its tables and the buffer size hints."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from epcomm.errors import ShapeError

__all__ = [
    "COMBINE_LANES",
    "LANE_PARTS",
    "MAX_LOW_LATENCY_PIECE",
    "NUM_LOW_LATENCY_SLOTS",
    "Config",
    "LowLatencyNeed",
    "LowLatencyPieces",
    "combine_config",
    "dispatch_config",
    "low_latency_bytes",
    "low_latency_combine_need",
    "low_latency_combine_pieces",
    "low_latency_dispatch_need",
    "low_latency_dispatch_pieces",
    "low_latency_lanes",
    "low_latency_row_stride",
    "low_latency_size_hint",
]

_MIB = 1 << 20
_HINT_TOKENS = 8192  # tokens a rank that an arena of the hinted size has room for
_MAX_TOPK = 32
_ROW_METADATA_BYTES = _MAX_TOPK * (8 + 4) + 16  # expert indices, weights and source of one received row
_MAX_VALUE = 2**31 - 1
_RANKS_PER_NODE = 8  # what DeepEP's formulas assume of a node


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Config:
    """DeepEP V1's tuning knobs of dispatch and combine, in its positional order.

    All ranks must pass the same one, except that `num_sms`, the number of SMs a CUDA operation uses, may
    differ. The four chunk sizes describe DeepEP's ring queues; epcomm writes rows to their final place without
    queues inside a node, so they only enter the size hints. The host backend uses none of the fields.

    Attributes:
        num_sms: SMs an operation may use, at least 1 (odd numbers too).
        num_max_nvl_chunked_send_tokens: tokens of one send inside a node.
        num_max_nvl_chunked_recv_tokens: tokens of a receive ring inside a node.
        num_max_rdma_chunked_send_tokens: tokens of one send between nodes.
        num_max_rdma_chunked_recv_tokens: tokens of a receive ring between nodes.

    Raises:
        ShapeError: a value below 1 or above 2^31 - 1, or a send chunk larger than its ring.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or not 1 <= value <= _MAX_VALUE:
                raise ShapeError(f"Config.{name}", got=repr(value), wanted=f"an integer from 1 to {_MAX_VALUE}")
        for link in ("nvl", "rdma"):
            send = getattr(self, f"num_max_{link}_chunked_send_tokens")
            recv = getattr(self, f"num_max_{link}_chunked_recv_tokens")
            if send > recv:
                raise ShapeError(
                    f"Config.num_max_{link}_chunked_send_tokens", got=str(send), wanted=f"at most the ring of {recv}"
                )

    def values(self) -> tuple[int, ...]:
        """The five numbers in positional order; ranks compare them."""
        return tuple(vars(self).values())

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for ``num_nvl_bytes``: an arena in which the rows of one dispatch fit, however 8192 tokens a rank go.

        Formula: ``8192 * local_ranks * (hidden_bytes rounded up to 16 + 400 bytes of metadata)``, where
        every rank of a node sends all of its tokens to this one; rounded up to 2 MiB.

        Args:
            hidden_bytes: bytes of one row.
            num_ranks: ranks of the job.
        """
        row_bytes = _round_up(hidden_bytes, 16) + _ROW_METADATA_BYTES
        return _round_up(_HINT_TOKENS * min(num_ranks, _RANKS_PER_NODE) * row_bytes, 2 * _MIB)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for ``num_rdma_bytes``: send and receive rings between nodes; 0 on one node.

        Formula: ``2 * nodes * channels * num_max_rdma_chunked_recv_tokens * row``, with
        ``channels = max(1, num_sms // 2)`` and the row as in `get_nvl_buffer_size_hint`; rounded up to 2 MiB.
        """
        if num_ranks <= _RANKS_PER_NODE:
            return 0
        num_nodes = -(-num_ranks // _RANKS_PER_NODE)
        row_bytes = _round_up(hidden_bytes, 16) + _ROW_METADATA_BYTES
        rows = 2 * num_nodes * max(1, self.num_sms // 2) * self.num_max_rdma_chunked_recv_tokens
        return _round_up(rows * row_bytes, 2 * _MIB)


# (nvl_send, nvl_recv, rdma_send, rdma_recv) by number of ranks: the values DeepEP V1 documents, kept so that
# programs which read them see what they expect.
_DISPATCH = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    160: (2, 720, 8, 128),
}


def _from_table(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    if num_ranks < 1:
        raise ShapeError("num_ranks", got=str(num_ranks), wanted="at least 1")
    row = next((table[size] for size in sorted(table) if size >= num_ranks), table[max(table)])
    return Config(num_sms, *row)


@functools.lru_cache(maxsize=64)  # every call of dispatch asks
def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """Recommended dispatch configuration for any number of ranks (the next larger row of the table)."""
    return _from_table(_DISPATCH, num_ranks, num_sms)


@functools.lru_cache(maxsize=64)
def combine_config(num_ranks: int, num_sms: int) -> Config:
    """Recommended combine configuration for any number of ranks (the next larger row of the table)."""
    return _from_table(_COMBINE, num_ranks, num_sms)


# The low-latency area of a rank has two slots of each kind, of equal lanes: a dispatch has one for each rank, and a
# combine has as many as there are choices of a token in the hint. Of each lane one part in 32 holds cells, the words
# that say what has arrived, and the others hold rows.
NUM_LOW_LATENCY_SLOTS = 2
COMBINE_LANES = 10
LANE_PARTS = 32
_LANE_UNIT = 128  # bytes; rows start at multiples of it
_CELL_BYTES = 8
_COLUMN_BYTES = 512  # that a warp moves at once: 16 a lane
_WANTED_PIECES = 512  # of all tokens, so that many warps have something to do


class LowLatencyPieces(NamedTuple):
    """How low-latency rows are cut: the same on all ranks."""

    piece_bytes: int
    num_pieces: int


def low_latency_pieces(row_bytes: int, num_max_dispatch_tokens_per_rank: int, max_piece: int) -> LowLatencyPieces:
    """Pieces of multiples of 512 bytes, at most `max_piece` and the last one shorter: many where there are few rows."""
    most = -(-row_bytes // _COLUMN_BYTES)
    wanted = max(-(-row_bytes // max_piece), min(most, -(-_WANTED_PIECES // num_max_dispatch_tokens_per_rank)))
    piece = _round_up(-(-row_bytes // wanted), _COLUMN_BYTES)
    return LowLatencyPieces(piece, -(-row_bytes // piece))


MAX_LOW_LATENCY_PIECE = 4096  # bytes of bfloat16, before a cast


def low_latency_dispatch_pieces(hidden: int, max_tokens: int, use_fp8: bool) -> LowLatencyPieces:
    """Pieces of a row of a dispatch as it travels, without its scales."""
    if use_fp8:
        return low_latency_pieces(hidden, max_tokens, MAX_LOW_LATENCY_PIECE // 2)
    return low_latency_pieces(2 * hidden, max_tokens, MAX_LOW_LATENCY_PIECE)


def low_latency_combine_pieces(hidden: int, max_tokens: int) -> LowLatencyPieces:
    """Pieces of a row of a combine."""
    return low_latency_pieces(2 * hidden, max_tokens, MAX_LOW_LATENCY_PIECE)


def low_latency_row_stride(hidden: int, use_fp8: bool) -> int:
    """Bytes between rows of a low-latency dispatch on their way; with fp8 their scales lie behind them."""
    return _round_up(hidden + 4 * -(-hidden // 128) if use_fp8 else 2 * hidden, _LANE_UNIT)


class LowLatencyNeed(NamedTuple):
    """Bytes that a call takes of a lane."""

    rows: int
    cells: int


def low_latency_dispatch_need(
    max_tokens: int, hidden: int, num_ranks: int, num_experts: int, num_topk: int, use_fp8: bool
) -> LowLatencyNeed:
    """Of a dispatch: cells for the counts, the headers and the pieces."""
    num_pieces = low_latency_dispatch_pieces(hidden, max_tokens, use_fp8).num_pieces
    cells = -(-num_experts // num_ranks) + 1 + max_tokens * (1 + num_topk + num_pieces)
    return LowLatencyNeed(max_tokens * low_latency_row_stride(hidden, use_fp8), _CELL_BYTES * cells)


def low_latency_combine_need(
    max_tokens: int, hidden: int, num_ranks: int, num_experts: int, num_topk: int, pre_reduce: bool
) -> LowLatencyNeed:
    """Of a combine, which has `COMBINE_LANES`: cells for the first rows at each expert, the pieces, and weights."""
    rows = max_tokens * num_topk
    cells = num_experts + rows * low_latency_combine_pieces(hidden, max_tokens).num_pieces
    if pre_reduce:
        cells += num_ranks * rows
    return LowLatencyNeed(-(-rows * 2 * hidden // COMBINE_LANES), -(-_CELL_BYTES * cells // COMBINE_LANES))


def low_latency_lanes(num_ranks: int) -> int:
    """Lanes of an area."""
    return NUM_LOW_LATENCY_SLOTS * (num_ranks + COMBINE_LANES)


def low_latency_bytes(
    num_max_dispatch_tokens_per_rank: int,
    hidden: int,
    num_ranks: int,
    num_experts: int,
    *,
    num_topk: int = COMBINE_LANES,
) -> int:
    """Bytes of an area in which dispatches and combines of such sizes have room."""
    tokens = num_max_dispatch_tokens_per_rank
    needs = [low_latency_dispatch_need(tokens, hidden, num_ranks, num_experts, num_topk, fp8) for fp8 in (False, True)]
    needs.append(low_latency_combine_need(tokens, hidden, num_ranks, num_experts, num_topk, pre_reduce=True))
    part = max(
        max(-(-_round_up(need.rows, _LANE_UNIT) // (LANE_PARTS - 1)) for need in needs),
        max(need.cells for need in needs),
    )
    return low_latency_lanes(num_ranks) * LANE_PARTS * _round_up(part, _LANE_UNIT)


def low_latency_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes for ``num_rdma_bytes`` of a low-latency Buffer, for up to 10 choices a token.

    Formula, with M = ``num_max_dispatch_tokens_per_rank``: ``2 slots * (num_ranks + 10) * lane``, where 31 parts in 32
    of a lane hold M rows of ``max(2 * hidden, hidden + 4 * ceil(hidden / 128))`` bytes (bfloat16, or fp8 with scales),
    rounded up to 128. The last part, which decides where rows are short, holds 8 bytes for each local expert and
    ``8 * (11 + pieces)`` for each token of a dispatch, or for each token of a combine ``8 * (num_ranks + pieces)``, and
    8 bytes for every tenth expert; pieces of a row have up to 4 KiB, and there are about 512 / M of them if M is small.
    A dispatch takes one lane for each rank, a combine one for each choice of a token; with more than 10 choices in
    proportion more. Rounded up to 2 MiB.
    """
    for name, value in (
        ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
        ("hidden", hidden),
        ("num_ranks", num_ranks),
        ("num_experts", num_experts),
    ):
        if value < 1:
            raise ShapeError(name, got=str(value), wanted="at least 1")
    return _round_up(low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts), 2 * _MIB)
