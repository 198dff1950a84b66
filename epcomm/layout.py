"""Byte layout of the memory that ranks share on the host backend.

Every rank owns one *control segment* that all ranks of its host map: lines of one word each, then one
header cell for each (ring, slot). Payload lies in *windows*, segments of their own that grow.
All offsets are computed here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

__all__ = [
    "ALIGNMENT",
    "HEADER",
    "MAX_AGREED",
    "MAX_FIELDS",
    "MAX_SELECTS",
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


class Ring(IntEnum):
    """Independent sequences of calls. Calls of one ring happen in the same order on every rank."""

    THROUGHPUT = 0
    LOW_LATENCY_DISPATCH = 1
    LOW_LATENCY_COMBINE = 2
    SYNC = 3


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


_FIELD = np.dtype([("offset", "<i8"), ("num_rows", "<i8"), ("row_bytes", "<i8"), ("select", "<i8")])
_SELECT = np.dtype([("indexed", "<i8"), ("begin_offset", "<i8"), ("index_offset", "<i8")])

# What a rank says about its part of a call. `agreed` must be equal on all ranks; `status` is 0, or 1 when the
# rank rejected its own input, with the reason in `text`; `messages` is 1 when the payload does not fit into
# shared memory and has to travel by messages.
HEADER = np.dtype(
    [
        ("sequence", "<i8"),
        ("operation", "<i8"),
        ("status", "<i8"),
        ("messages", "<i8"),
        ("grew", "<i8"),
        ("window", "<i8"),
        ("window_bytes", "<i8"),
        ("num_tokens", "<i8"),
        ("agreed", "<i8", MAX_AGREED),
        ("fields", _FIELD, MAX_FIELDS),
        ("selects", _SELECT, MAX_SELECTS),
        ("window_name", "S256"),
        ("text", "S1024"),
    ]
)


@dataclass(frozen=True)
class ControlLayout:
    """Offsets inside a control segment for a job of `num_ranks` ranks.

    Words, one a line: `closed`, `gave_up`, then for each (ring, slot) `posted`, `opened` and `done`. Each word
    has one writer, the owner of the segment, and only ever grows. A header cell is a `HEADER` followed by
    int64 ``[MAX_SELECTS, num_ranks]``, the rows of each selection that go to each rank.
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
    def counts_bytes(self) -> int:
        return MAX_SELECTS * self.num_ranks * 8

    @property
    def cell_bytes(self) -> int:
        return align(HEADER.itemsize + self.counts_bytes)

    def cell(self, ring: Ring, slot: int) -> int:
        words = 2 + 3 * len(Ring) * NUM_SLOTS
        return words * ALIGNMENT + self._slot(ring, slot) * self.cell_bytes

    @property
    def num_bytes(self) -> int:
        return self.cell(Ring.SYNC, NUM_SLOTS - 1) + self.cell_bytes
