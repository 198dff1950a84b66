"""What the low-latency kernels share. Twin of ``cuda_src/sync/slot.cuh``, and the layout of the low-latency area."""

from __future__ import annotations

from typing import NamedTuple

from epcomm.config import COMBINE_LANES, LANE_PARTS, NUM_LOW_LATENCY_SLOTS, low_latency_lanes
from epcomm.kernels.layout import NUM_ENTRY_AGREED, UNIT, round_up

__all__ = ["MAX_EXPERTS", "MAX_TOKENS", "RECEIVE", "SEND", "SLOT", "THREADS", "Area", "Slot"]

# rows, cells, operation, halves, is_rejected, leaves_late, digest, far, agreed[12]
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
    """The low-latency area of a rank: `config.low_latency_bytes`, from `offset` on. Rows of all lanes, then cells.

    Where ranks are behind a network, what this rank sends there has room behind it: of each slot a lane for a dispatch,
    and for each far rank the lanes of a combine.

    Attributes:
        offset: from a rank's ``Comm::control``.
        num_bytes: without what is sent.
        num_ranks: of the job.
        far: a bit for each rank that is behind the network.
    """

    offset: int
    num_bytes: int
    num_ranks: int
    far: int

    @property
    def cell_lane_bytes(self) -> int:
        """Cells of one lane."""
        return self.num_bytes // (LANE_PARTS * low_latency_lanes(self.num_ranks)) // _CELL_UNIT * _CELL_UNIT

    @property
    def row_lane_bytes(self) -> int:
        """Rows of one lane."""
        return (LANE_PARTS - 1) * self.cell_lane_bytes // UNIT * UNIT

    @property
    def end(self) -> int:
        """Offset behind it, and behind what is sent."""
        return self.dispatch_staging(NUM_LOW_LATENCY_SLOTS)

    @property
    def _staging_lanes(self) -> int:
        return 1 + self.far.bit_count() * COMBINE_LANES if self.far else 0

    def dispatch_staging(self, slot: int) -> int:
        """Offset of the rows that a dispatch sends through the network."""
        return self.offset + round_up(self.num_bytes, UNIT) + slot * self._staging_lanes * self.row_lane_bytes

    def combine_staging(self, slot: int) -> tuple[int, int]:
        """And of those of a combine, with the bytes for each far rank."""
        return self.dispatch_staging(slot) + self.row_lane_bytes, COMBINE_LANES * self.row_lane_bytes

    def dispatch_slot(self, slot: int) -> Slot:
        return self._slot(slot * self.num_ranks)

    def combine_slot(self, slot: int) -> Slot:
        return self._slot(NUM_LOW_LATENCY_SLOTS * self.num_ranks + slot * COMBINE_LANES)

    def _slot(self, first_lane: int) -> Slot:
        cells = self.offset + low_latency_lanes(self.num_ranks) * self.row_lane_bytes
        return Slot(self.offset + first_lane * self.row_lane_bytes, cells + first_lane * self.cell_lane_bytes)
