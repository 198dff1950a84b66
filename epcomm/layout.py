"""Byte layout of the memory that ranks share on the host backend.

Every rank owns one *control segment* that all ranks of its host map: lines of one word each, then one
header cell for each (ring, slot). Payload lies in *windows*, segments of their own that grow.
All offsets are computed here and nowhere else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "ALIGNMENT",
    "HEADER_BYTES",
    "HEADER_NUMBERS",
    "HEADER_TEXTS",
    "MAX_AGREED",
    "MAX_FIELDS",
    "MAX_NAME",
    "MAX_SELECTS",
    "MAX_TEXT",
    "NUM_SLOTS",
    "ControlLayout",
    "Ring",
    "align",
]

ALIGNMENT = 64  # bytes: a cache line, and what every array in a window is aligned to
NUM_SLOTS = 2  # calls of one ring that may be under way at once
MAX_FIELDS = 8
MAX_SELECTS = 2
MAX_AGREED = 16
MAX_NAME = 256  # bytes of a window's name
MAX_TEXT = 1024  # bytes of the reason of a rejection


class Ring(IntEnum):
    """Independent sequences of calls. Calls of one ring happen in the same order on every rank."""

    THROUGHPUT = 0
    LOW_LATENCY_DISPATCH = 1
    LOW_LATENCY_COMBINE = 2
    SYNC = 3


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


# What a rank says about its part of a call, `backends.host.header.Header`: numbers, then two texts of the lengths that
# are among the numbers. One `struct` each way: a call reads the headers of all ranks, and a NumPy record costs more for
# every single field.
HEADER_NUMBERS = struct.Struct(f"<{8 + MAX_AGREED + 4 * MAX_FIELDS + 2 * MAX_SELECTS}q")
HEADER_TEXTS = (HEADER_NUMBERS.size, HEADER_NUMBERS.size + MAX_NAME)  # where the texts start
HEADER_BYTES = HEADER_NUMBERS.size + MAX_NAME + MAX_TEXT


@dataclass(frozen=True)
class ControlLayout:
    """Offsets inside a control segment for a job of `num_ranks` ranks.

    Words, one a line: `closed`, `gave_up`, then for each (ring, slot) `posted`, `opened` and `done`. Each word
    has one writer, the owner of the segment, and only ever grows. A header cell is `HEADER_BYTES` followed by
    int64 ``[2, MAX_SELECTS, num_ranks]``: for each selection how many rows go to each rank, and the first of them.
    """

    num_ranks: int

    closed = 0
    gave_up = ALIGNMENT

    @staticmethod
    def _slot(ring: Ring, slot: int) -> int:
        return int(ring) * NUM_SLOTS + slot

    def posted(self, ring: Ring, slot: int) -> int:
        return (2 + 3 * self._slot(ring, slot)) * ALIGNMENT

    def opened(self, ring: Ring, slot: int) -> int:
        return self.posted(ring, slot) + ALIGNMENT

    def done(self, ring: Ring, slot: int) -> int:
        return self.posted(ring, slot) + 2 * ALIGNMENT

    @property
    def routes_bytes(self) -> int:
        return 2 * MAX_SELECTS * self.num_ranks * 8

    @property
    def cell_bytes(self) -> int:
        return align(HEADER_BYTES + self.routes_bytes)

    def cell(self, ring: Ring, slot: int) -> int:
        words = 2 + 3 * len(Ring) * NUM_SLOTS
        return words * ALIGNMENT + self._slot(ring, slot) * self.cell_bytes

    @property
    def num_bytes(self) -> int:
        return self.cell(Ring.SYNC, NUM_SLOTS - 1) + self.cell_bytes
