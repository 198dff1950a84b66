"""Payload windows of the host backend: segments that grow when a call needs more room.

The owner replaces a window by a larger one and names it in its header; peers map it the first time they see
the name, say so, and the owner takes the name away within the same call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from epcomm.memory import SegmentStore

__all__ = ["OwnWindow", "PeerWindows"]

_SMALLEST = 64 << 10


class OwnWindow:
    """One window of this rank. `index` tells the windows of a rank apart."""

    def __init__(self, store: SegmentStore, index: int) -> None:
        self._store = store
        self.index = index
        self.name = ""
        self.bytes = np.empty(0, np.uint8)
        self.unread_name = False  # peers have not been told of this name yet

    def reserve(self, num_bytes: int) -> None:
        """Make the window at least `num_bytes` large; its old content is gone when it grows.

        Raises:
            OSError: no room for it.
        """
        if num_bytes <= self.bytes.size:
            return
        size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length() if num_bytes < 1 << 28 else num_bytes + num_bytes // 8)
        self.forget_name()
        # Let go of the old memory first: both together may not fit.
        self.bytes = np.empty(0, np.uint8)
        self.name, self.bytes = self._store.create(size)
        self.unread_name = True

    def forget_name(self) -> None:
        """Take the name away: every peer that needs the window has mapped it, or nobody ever will."""
        if self.unread_name:
            self._store.unlink(self.name)
            self.unread_name = False

    def retire(self) -> None:
        """Let go of the memory; the next use starts a new window."""
        self.forget_name()
        self.bytes = np.empty(0, np.uint8)


class PeerWindows:
    """The windows of the peers that this rank has mapped."""

    def __init__(self, store: SegmentStore) -> None:
        self._store = store
        self._mapped: dict[tuple[int, int], tuple[str, NDArray[np.uint8]]] = {}

    def get(self, rank: int, index: int, name: str, num_bytes: int) -> NDArray[np.uint8]:
        """Window `index` of `rank`, mapped anew when its name has changed.

        Raises:
            OSError: the segment cannot be mapped.
        """
        known = self._mapped.get((rank, index))
        if known is None or known[0] != name:
            known = (name, self._store.open(name, num_bytes))
            self._mapped[rank, index] = known
        return known[1]
