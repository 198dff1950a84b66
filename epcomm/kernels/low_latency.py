"""What the low-latency kernels share. Twin of ``cuda_src/sync/slot.cuh``, and the layout of the low-latency area."""

from __future__ import annotations

from typing import NamedTuple

from epcomm.config import COMBINE_LANES, LANE_PARTS, NUM_LOW_LATENCY_SLOTS, low_latency_lanes
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT

__all__ = ["MAX_EXPERTS", "MAX_TOKENS", "RECEIVE", "SEND", "SLOT", "THREADS", "Area", "Slot"]

# rows, cells, operation, halves, is_rejected, leaves_late, digest, unused, agreed[12]
SLOT = f"2Q6I{NUM_ENTRY_AGREED}I"
SEND, RECEIVE = 1, 2
THREADS = 512
MAX_TOKENS = 1 << 17  # of a rank: what a header has bits for
MAX_EXPERTS = 2048  # of all ranks: what shared memory has room for
_CELL_UNIT = 16  # bytes


class Slot(NamedTuple):
    """Where a slot lies, from a rank's ``Comm::control``."""

    rows: int
    cells: int


class Area(NamedTuple):
    """The low-latency area of a rank: `config.low_latency_bytes`, from `offset` on. Rows of all lanes, then cells."""

    offset: int
    num_bytes: int
    num_ranks: int

    @property
    def cell_lane_bytes(self) -> int:
        """Cells of one lane."""
        return self.num_bytes // (LANE_PARTS * low_latency_lanes(self.num_ranks)) // _CELL_UNIT * _CELL_UNIT

    @property
    def row_lane_bytes(self) -> int:
        """Rows of one lane."""
        return (LANE_PARTS - 1) * self.cell_lane_bytes // UNIT * UNIT

    def dispatch_slot(self, slot: int) -> Slot:
        return self._slot(slot * self.num_ranks)

    def combine_slot(self, slot: int) -> Slot:
        return self._slot(NUM_LOW_LATENCY_SLOTS * self.num_ranks + slot * COMBINE_LANES)

    def _slot(self, first_lane: int) -> Slot:
        cells = self.offset + low_latency_lanes(self.num_ranks) * self.row_lane_bytes
        return Slot(self.offset + first_lane * self.row_lane_bytes, cells + first_lane * self.cell_lane_bytes)
