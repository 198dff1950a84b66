"""How many rows the next dispatch is likely to bring."""

from __future__ import annotations

__all__ = ["Forecast"]


class Forecast:
    """Room is made for that many rows before the counts are known.

    Attributes:
        rows: at most an eighth more than a recent dispatch has brought; 0 before the first one.
    """

    def __init__(self) -> None:
        self.rows = 0

    def note(self, num_received: int) -> None:
        """A dispatch brought this many. The number changes rarely: blocks of one size are used again at no cost."""
        if self.rows // 2 <= num_received <= self.rows:
            return
        unit = max(64, 1 << max(0, num_received.bit_length() - 4))
        self.rows = -(-num_received // unit) * unit
