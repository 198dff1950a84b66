"""Where the outputs of a dispatch are: in the arena, where peers write them, or outside, filled through the window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from epcomm.arrays import ArraySpec, ArrayView
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.turn import CudaTurn, output_spec
from epcomm.kernels import dispatch as kernel
from epcomm.kernels.layout import NO_BLOCK, THROUGH_WINDOW, UNIT, MetadataLayout, scales_offset
from epcomm.memory import Block, BlockPool

__all__ = ["Outputs", "Sizes"]

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


@dataclass(slots=True)
class Sizes:
    """What the kernels need to know of a request, apart from addresses."""

    num_tokens: int
    row_bytes: int
    scale_bytes: int  # of one scale
    num_scales: int
    num_topk: int
    index_bytes: int
    has_weights: bool

    @classmethod
    def of(
        cls, x: ArraySpec, scales: ArraySpec | None, topk_idx: ArraySpec | None, topk_weights: ArraySpec | None
    ) -> Sizes:
        return cls(
            num_tokens=x.shape[0],
            row_bytes=x.shape[1] * x.dtype.itemsize,
            scale_bytes=1 if scales is None else scales.dtype.itemsize,
            num_scales=0 if scales is None else math.prod(scales.shape[1:]),
            num_topk=0 if topk_idx is None else topk_idx.shape[1],
            index_bytes=8 if topk_idx is None else topk_idx.dtype.itemsize,
            has_weights=topk_weights is not None,
        )

    @property
    def slot(self) -> kernel.Slot:
        return kernel.slot(
            self.row_bytes,
            self.num_scales * self.scale_bytes,
            self.num_topk * self.index_bytes,
            self.num_topk * 4 if self.has_weights else 0,
        )


class Outputs:
    """Two blocks: rows with their scales, and what else travels beside them, which a handle keeps for longer.

    Args:
        turn: of the call.
        sizes: of its rows.
        num_rows: rows that the blocks have room for.
        has_metadata: false in a cached dispatch.

    Attributes:
        has_metadata: as above.
        num_rows: rows that there are.
        is_windowed: the blocks are outside of the arena.
        offsets: of the two blocks, as a rank enters with them.
    """

    def __init__(self, turn: CudaTurn, sizes: Sizes, num_rows: int, has_metadata: bool) -> None:
        self._turn, self._sizes, self.has_metadata = turn, sizes, has_metadata
        self.resize(num_rows)

    @classmethod
    def of(cls, job: Job, turn: CudaTurn, sizes: Sizes, num_rows: int, has_metadata: bool) -> Self:
        """In the arena if it has room, else outside of it."""
        outputs = cls(turn, sizes, num_rows, has_metadata)
        if not outputs._are_in_arena(job):
            outputs._allocate(job.outputs, high=False)
            outputs.is_windowed, outputs.offsets = True, (THROUGH_WINDOW, THROUGH_WINDOW)
        return outputs

    @classmethod
    def in_arena(cls, job: Job, turn: CudaTurn, sizes: Sizes, num_rows: int) -> Self | None:
        """With metadata; None if the arena has no room."""
        outputs = cls(turn, sizes, num_rows, True)
        return outputs if outputs._are_in_arena(job) else None

    def resize(self, num_rows: int) -> None:
        """There are this many rows, no more than the blocks have room for; where fields begin depends on it."""
        sizes = self._sizes
        self.num_rows = num_rows
        self._scales = scales_offset(num_rows, sizes.row_bytes)
        if self.has_metadata:
            self._beside = MetadataLayout(num_rows, sizes.num_topk, sizes.index_bytes, sizes.has_weights)

    def _are_in_arena(self, job: Job) -> bool:
        if not self._allocate(job.arena, high=True):
            return False
        first = job.arena_offset // UNIT
        metadata = NO_BLOCK if self._metadata is None else first + self._metadata.offset // UNIT
        self.is_windowed, self.offsets = False, (first + self._rows.offset // UNIT, metadata)
        return True

    def _allocate(self, pool: BlockPool, high: bool) -> bool:
        """Take both blocks, or none if there is no room; `high`: of what a handle keeps."""
        stream, is_captured, sizes = self._turn.stream, self._turn.is_captured, self._sizes
        num_bytes = self._scales + self.num_rows * sizes.num_scales * sizes.scale_bytes
        rows, metadata = pool.allocate(num_bytes, stream, is_captured=is_captured), None
        if rows is None:
            return False
        if self.has_metadata:
            metadata = pool.allocate(self._beside.num_bytes, stream, high=high, is_captured=is_captured)
            if metadata is None:
                return False
        self._rows, self._metadata = rows, metadata
        return True

    def give_back(self) -> None:
        """These are not the outputs of the call after all."""
        del self._rows, self._metadata

    def own(self) -> None:
        """These are the outputs of the call."""
        self._turn.own(self._rows)
        if self._metadata is not None:
            self._turn.own(self._metadata)

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """By field of the kernel: row, scales, topk_idx, topk_weights, source."""
        rows = self._rows.ptr
        if self._metadata is None:
            return (rows, rows + self._scales, 0, 0, 0)
        metadata, beside = self._metadata.ptr, self._beside
        return (rows, rows + self._scales, metadata + beside.topk_idx, metadata + beside.topk_weights, metadata)

    def rows(self, like: ArrayView) -> ArrayView:
        return self._over(self._rows, 0, (self.num_rows, like.shape[1]), like.dtype)

    def scales(self, like: ArrayView | None) -> ArrayView | None:
        if like is None:
            return None
        return self._over(self._rows, self._scales, (self.num_rows, *like.shape[1:]), like.dtype)

    def topk_idx(self, like: ArrayView | None) -> ArrayView | None:
        if like is None or self._metadata is None:
            return None
        return self._over(self._metadata, self._beside.topk_idx, (self.num_rows, like.shape[1]), like.dtype)

    def topk_weights(self, like: ArrayView | None) -> ArrayView | None:
        if like is None or self._metadata is None:
            return None
        return self._over(self._metadata, self._beside.topk_weights, (self.num_rows, like.shape[1]), _FLOAT32)

    def src_idx(self) -> ArrayView:
        assert self._metadata is not None
        return self._over(self._metadata, 0, (self.num_rows,), _INT32)

    def _over(self, block: Block, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        return ArrayView(output_spec(shape, dtype, self._turn.place), block.ptr + offset, block)
