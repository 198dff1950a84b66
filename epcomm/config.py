"""Tuning configuration, its tables and the buffer size hints."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from epcomm.errors import ShapeError

__all__ = [
    "COMBINE_LANES",
    "NUM_LOW_LATENCY_SLOTS",
    "Config",
    "combine_config",
    "dispatch_config",
    "low_latency_bytes",
    "low_latency_combine_offset",
    "low_latency_row_stride",
    "low_latency_rows_offset",
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
# combine has as many as there are choices of a token in the hint.
NUM_LOW_LATENCY_SLOTS = 2
COMBINE_LANES = 10
_LANE_UNIT = 128  # bytes


def low_latency_row_stride(hidden: int, use_fp8: bool) -> int:
    """Bytes between staged rows of a low-latency dispatch; with fp8 their scales lie behind them."""
    return _round_up(hidden + 4 * -(-hidden // 128) if use_fp8 else 2 * hidden, _LANE_UNIT)


def low_latency_rows_offset(num_max_dispatch_tokens_per_rank: int, num_local_experts: int) -> int:
    """Bytes before the rows in a lane of a low-latency dispatch.

    A bit for each token and expert, an int32 for each expert, and one more.
    """
    words = -(-num_max_dispatch_tokens_per_rank // 32)
    return _round_up(4 * (num_local_experts * (words + 1) + 1), _LANE_UNIT)


def low_latency_combine_offset(num_experts: int) -> int:
    """Bytes before the rows in a slot of a low-latency combine: an int32 for each expert."""
    return _round_up(4 * num_experts, _LANE_UNIT)


def low_latency_bytes(
    num_max_dispatch_tokens_per_rank: int,
    hidden: int,
    num_ranks: int,
    num_experts: int,
    *,
    num_topk: int = COMBINE_LANES,
    use_fp8: bool = False,
) -> int:
    """Bytes of an area in which a dispatch of such rows, and a combine of so many choices a token, have room."""
    tokens = num_max_dispatch_tokens_per_rank
    before = low_latency_rows_offset(tokens, -(-num_experts // num_ranks))
    dispatch = before + tokens * low_latency_row_stride(hidden, use_fp8)
    combine = low_latency_combine_offset(num_experts) + tokens * num_topk * 2 * hidden
    lane = _round_up(max(dispatch, -(-combine // COMBINE_LANES)), _LANE_UNIT)
    return NUM_LOW_LATENCY_SLOTS * (num_ranks + COMBINE_LANES) * lane


def low_latency_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes for ``num_rdma_bytes`` of a low-latency Buffer, for up to 10 choices a token.

    Formula: ``2 slots * (num_ranks + 10) * lane``, where a lane holds ``num_max_dispatch_tokens_per_rank`` rows of
    ``max(2 * hidden, hidden + 4 * ceil(hidden / 128))`` bytes (bfloat16, or fp8 with scales), rounded up to 128, and
    beside them a bit for each token and local expert and 4 bytes for each expert; rounded up to 2 MiB. A dispatch takes
    one lane for each rank, a combine one for each choice of a token; with more than 10 choices in proportion more.
    """
    for name, value in (
        ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
        ("hidden", hidden),
        ("num_ranks", num_ranks),
        ("num_experts", num_experts),
    ):
        if value < 1:
            raise ShapeError(name, got=str(value), wanted="at least 1")
    sizes = (num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)
    return _round_up(max(low_latency_bytes(*sizes, use_fp8=use_fp8) for use_fp8 in (False, True)), 2 * _MIB)
