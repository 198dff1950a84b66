"""Twin of ``cuda_src/common/layout.cuh``: the memory that ranks share, and the page that the host reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from epcomm.config import NUM_LOW_LATENCY_SLOTS

__all__ = [
    "HOST_PAGE",
    "LOW_LATENCY_COMBINE",
    "LOW_LATENCY_DISPATCH",
    "MAX_LOCAL_EXPERTS",
    "MAX_QUEUE_PAIRS",
    "MAX_RANKS",
    "MAX_TOPK",
    "NO_BLOCK",
    "NUM_AGREED",
    "NUM_ENTRY_AGREED",
    "OPERATIONS",
    "PHASES",
    "QUEUE_PAIRS_OFFSET",
    "REJECTED",
    "THROUGH_WINDOW",
    "UNIT",
    "WORKSPACE_BYTES",
    "MetadataLayout",
    "queue_pairs_bytes",
    "round_up",
    "scales_offset",
]

MAX_RANKS = 32  # of a job
MAX_TOPK = 32
MAX_LOCAL_EXPERTS = 1024
NUM_AGREED, NUM_ENTRY_AGREED = 16, 12
UNIT = 128  # bytes; offsets in a region travel in units of this
WORKSPACE_BYTES = 2 << 20

MAX_QUEUE_PAIRS = 127
_QUEUE_PAIRS = struct.Struct(f"<I{MAX_QUEUE_PAIRS}i")
QUEUE_PAIRS_OFFSET = WORKSPACE_BYTES - _QUEUE_PAIRS.size

# What a rank says instead of the offset of a block.
THROUGH_WINDOW, REJECTED, NO_BLOCK = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD

LOW_LATENCY_DISPATCH, LOW_LATENCY_COMBINE = 4, 6  # of slot 0
OPERATIONS = (
    *("dispatch, counts", "dispatch", "combine", "barrier"),
    *["low_latency_dispatch"] * NUM_LOW_LATENCY_SLOTS,
    *["low_latency_combine"] * NUM_LOW_LATENCY_SLOTS,
)
PHASES = ("counts", "entry", "done", "ready", "ack")

HOST_PAGE = np.dtype(
    [
        ("error_kind", "<u4"),
        ("operation", "<u4"),
        ("sequence", "<u4"),
        ("phase", "<u4"),
        ("awaited", "<u4"),
        ("elapsed_us", "<u4"),
        ("abort", "<u4"),
        ("dropped", "<u4"),
        ("num_mismatches", "<u4"),
        ("seen_mismatches", "<u4"),
        ("mismatch_operation", "<u4"),
        ("num_voids", "<u4"),
        ("seen_voids", "<u4"),
        ("num_left_behind", "<u4"),
        ("other_choices", "<u4"),
        ("unused", "<u4", 17),
        ("tag", "<u4"),
        ("verdict", "<u4"),
        ("num_received", "<u4"),
        ("num_sent", "<u4"),
        ("rows_to_nodes", "<u8", 2),
        ("unused2", "<u4", 24),
        ("count", "<i4", MAX_RANKS * MAX_RANKS),
        ("agreed", "<u4", MAX_RANKS * NUM_AGREED),
        ("status", "<u4", MAX_RANKS),
        ("expert", "<i4", MAX_LOCAL_EXPERTS),
        ("num_rejections", "<u4", MAX_RANKS),
        ("mismatch", "<u4", MAX_RANKS * NUM_ENTRY_AGREED),
        ("void_agreed", "<u4", MAX_RANKS * NUM_AGREED),
        ("void_status", "<u4", MAX_RANKS),
    ]
)
assert HOST_PAGE.itemsize == 256 + 4096 + 2048 + 128 + 4096 + 128 + 1536 + 2048 + 128


def round_up(value: int, unit: int) -> int:
    """`value` rounded up to a multiple of `unit`."""
    return -(-value // unit) * unit


def queue_pairs_bytes(handles: Sequence[int]) -> bytes:
    """``QueuePairs`` of these handles; of more than `MAX_QUEUE_PAIRS`, the first ones."""
    used = handles[:MAX_QUEUE_PAIRS]
    return _QUEUE_PAIRS.pack(len(used), *used, *[0] * (MAX_QUEUE_PAIRS - len(used)))


def scales_offset(num_rows: int, row_bytes: int) -> int:
    """Offset of the scales behind `num_rows` received rows."""
    return round_up(num_rows * row_bytes, UNIT)


class MetadataLayout:
    """Offsets of the fields in a block of what travels beside rows; the source indices come first."""

    __slots__ = ("num_bytes", "topk_idx", "topk_weights")

    def __init__(self, num_rows: int, num_topk: int, index_bytes: int, has_weights: bool) -> None:
        self.topk_idx = round_up(num_rows * 4, UNIT)
        self.topk_weights = self.topk_idx + round_up(num_rows * num_topk * index_bytes, UNIT)
        self.num_bytes = self.topk_weights + (num_rows * num_topk * 4 if has_weights else 0)
