"""What the low-latency kernels share. Twin of ``cuda_src/sync/slot.cuh``, and the layout of the low-latency area."""

from __future__ import annotations

from typing import NamedTuple

from epcomm.config import COMBINE_LANES, NUM_LOW_LATENCY_SLOTS
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT, round_up

__all__ = ["RECEIVE", "SEND", "SLOT", "THREADS", "Area", "Slot", "piece_bytes"]

# offset, num_bytes, operation, halves, is_rejected, leaves_late, agreed[12]
SLOT = f"2Q4I{NUM_ENTRY_AGREED}I"
SEND, RECEIVE = 1, 2
THREADS = 512
_WARP_BYTES = 512  # that a warp moves at once: 16 a lane
_MAX_PIECE = 8 * _WARP_BYTES


class Slot(NamedTuple):
    """Where a slot lies in a region."""

    offset: int
    num_bytes: int


class Area(NamedTuple):
    """The low-latency area of a region: `config.low_latency_bytes`, from `offset` on."""

    offset: int
    num_bytes: int
    num_ranks: int

    @property
    def lane_bytes(self) -> int:
        """What one source of a dispatch may stage."""
        return self.num_bytes // (NUM_LOW_LATENCY_SLOTS * (self.num_ranks + COMBINE_LANES)) // UNIT * UNIT

    def dispatch_slot(self, slot: int) -> Slot:
        num_bytes = self.num_ranks * self.lane_bytes
        return Slot(self.offset + slot * num_bytes, num_bytes)

    def combine_slot(self, slot: int) -> Slot:
        num_bytes = COMBINE_LANES * self.lane_bytes
        first = self.offset + NUM_LOW_LATENCY_SLOTS * self.num_ranks * self.lane_bytes
        return Slot(first + slot * num_bytes, num_bytes)


def piece_bytes(row_bytes: int, num_rows: int, num_warps: int, most: int = _MAX_PIECE) -> int:
    """How much of a row a warp takes at once: as much as it can have under way, less if warps had nothing to do."""
    wanted = -(-row_bytes // most)
    if num_rows * wanted < 2 * num_warps:
        wanted = max(wanted, min(-(-row_bytes // _WARP_BYTES), -(-2 * num_warps // max(num_rows, 1))))
    return round_up(-(-row_bytes // wanted), _WARP_BYTES)
