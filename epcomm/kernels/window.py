"""How the window of a rank is cut. Twin of ``Window`` in ``cuda_src/sync/window.cuh``."""

from __future__ import annotations

import functools
from typing import NamedTuple

from epcomm.errors import CapacityError
from epcomm.kernels.layout import UNIT, WORKSPACE_BYTES

__all__ = ["PARTS", "WINDOW_BYTES", "Cut", "Window"]

WINDOW_BYTES = 128 << 20
PARTS = 2


class Cut(NamedTuple):
    """The window for rows of one size: offset in a region, bytes of a part of an area, of a slot, slots of a part."""

    offset: int
    area_bytes: int
    slot_bytes: int
    num_slots: int


class Window:
    """The window of a job with `num_ranks` ranks: an area for each, in parts that are filled and emptied in turn."""

    def __init__(self, num_ranks: int) -> None:
        self._area_bytes = WINDOW_BYTES // (PARTS * num_ranks) // UNIT * UNIT
        self.cut = functools.lru_cache(maxsize=64)(self._cut)

    def _cut(self, slot_bytes: int) -> Cut:
        # The index, of 4 bytes a slot, starts an area and ends at a multiple of UNIT.
        num_slots = (self._area_bytes - UNIT) // (slot_bytes + 4)
        if num_slots <= 0:
            raise CapacityError(
                "hidden",
                got=f"rows of {slot_bytes} bytes with what travels beside them",
                wanted=f"at most {self._area_bytes - UNIT - 4}",
            )
        return Cut(WORKSPACE_BYTES, self._area_bytes, slot_bytes, num_slots)
