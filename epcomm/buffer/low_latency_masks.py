"""Masks of a Buffer: the ranks that low-latency operations go without."""

from __future__ import annotations

from typing import Any

from epcomm.arrays import framework_or_none
from epcomm.backends import Turn
from epcomm.buffer.core import BufferCore, Entry
from epcomm.buffer.low_latency_arguments import writable_masks
from epcomm.errors import InputError

__all__ = ["LowLatencyMasks"]


class LowLatencyMasks(BufferCore):
    """`low_latency_update_mask_buffer` and its kin; R ranks."""

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency operations (`mask` True), or bring it back (False).

        Masking is not collective and does not wait. Bringing back is collective over all ranks, that one included, and
        makes the handles from before void.

        Raises:
            InputError: no such rank, or this one.
            UnsupportedOption: masking, with ranks that share no memory.
            PeerTimeout: bringing back, a rank did not call.
        """
        with Entry(self, "low_latency_update_mask_buffer"):
            if not 0 <= rank_to_mask < self.group_size or (mask and rank_to_mask == self.rank):
                raise InputError("rank_to_mask", got=repr(rank_to_mask), wanted="another rank of this Buffer")
            self._check_mode()
            turn = self._turn(None, None)
            if mask:
                self._backend.mask(turn, rank_to_mask)
            else:
                self._unmask(turn, [rank_to_mask])
            turn.finish(None)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Write 1 for every masked rank and 0 for the others into `mask_status`, int32 ``[R]``. Not collective."""
        with Entry(self, "low_latency_query_mask_buffer"):
            self._check_mode()
            turn = self._turn(None, framework_or_none(mask_status))
            status = writable_masks(turn, mask_status, self.group_size)
            self._backend.query_masks(turn, status)
            turn.finish(status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Bring all masked ranks back. Collective over all ranks; waits for them. Handles from before are void.

        Raises:
            PeerTimeout: a rank did not call.
        """
        with Entry(self, "low_latency_clean_mask_buffer"):
            self._check_mode()
            turn = self._turn(None, None)
            self._unmask(turn, list(range(self.group_size)))
            turn.finish(None)

    def _unmask(self, turn: Turn, ranks: list[int]) -> None:
        """Ranks may have made different calls before: what is under way is forgotten, and handles are void."""
        self._epoch += 1
        self._unreceived.clear()
        self._combine_buffer = None
        self._backend.unmask(turn, ranks)

    def _check_mode(self) -> None:
        if not self.low_latency_mode:
            raise InputError(
                "low-latency operation", got="a Buffer with low_latency_mode=False", wanted="low_latency_mode=True"
            )
