"""Where the outputs of a dispatch are: in the arena, where peers write them, or outside, filled through the window."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import DispatchRequest
from epcomm.kernels import dispatch as kernel
from epcomm.kernels.layout import NO_BLOCK, THROUGH_WINDOW, UNIT, MetadataLayout, scales_offset

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
    def of(cls, request: DispatchRequest) -> Sizes:
        x, scales, topk_idx = request.x, request.scales, request.topk_idx
        return cls(
            num_tokens=x.shape[0],
            row_bytes=x.shape[1] * x.dtype.itemsize,
            scale_bytes=1 if scales is None else scales.dtype.itemsize,
            num_scales=0 if scales is None else math.prod(scales.shape[1:]),
            num_topk=0 if topk_idx is None else topk_idx.shape[1],
            index_bytes=8 if topk_idx is None else topk_idx.dtype.itemsize,
            has_weights=request.topk_weights is not None,
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
        job, turn: of the call.
        sizes: of its rows.
        num_rows: rows that the blocks have room for.
        has_metadata: false in a cached dispatch.

    Attributes:
        num_rows: rows that there are.
        is_windowed: the blocks are outside of the arena.
        offsets: of the two blocks, as a rank enters with them.
    """

    def __init__(self, job: Job, turn: CudaTurn, sizes: Sizes, num_rows: int, has_metadata: bool) -> None:
        self._turn, self._sizes = turn, sizes
        self.resize(num_rows)
        if self._allocate_in_arena(job, has_metadata):
            return
        self.is_windowed = True
        self.offsets = (THROUGH_WINDOW, THROUGH_WINDOW)
        allocate = functools.partial(job.outputs.allocate, stream=turn.stream, is_captured=turn.is_captured)
        rows = allocate(self._num_bytes)
        assert rows is not None  # that pool grows
        self._rows = rows
        self._metadata = allocate(self._beside.num_bytes) if has_metadata else None

    @classmethod
    def in_arena(cls, job: Job, turn: CudaTurn, sizes: Sizes, num_rows: int) -> Self | None:
        """Outputs with metadata, None if the arena has no room for them."""
        outputs = cls.__new__(cls)
        outputs._turn, outputs._sizes = turn, sizes
        outputs.resize(num_rows)
        return outputs if outputs._allocate_in_arena(job, True) else None

    def resize(self, num_rows: int) -> None:
        """There are this many rows, no more than the blocks have room for; where fields begin depends on it."""
        sizes = self._sizes
        self.num_rows = num_rows
        self._scales = scales_offset(num_rows, sizes.row_bytes)
        self._beside = MetadataLayout(num_rows, sizes.num_topk, sizes.index_bytes, sizes.has_weights)

    @property
    def _num_bytes(self) -> int:
        return self._scales + self.num_rows * self._sizes.num_scales * self._sizes.scale_bytes

    def _allocate_in_arena(self, job: Job, has_metadata: bool) -> bool:
        """Take both blocks, or none."""
        turn = self._turn
        allocate = functools.partial(job.arena.allocate, stream=turn.stream, is_captured=turn.is_captured)
        rows = allocate(self._num_bytes)
        if rows is None:
            return False
        metadata = allocate(self._beside.num_bytes, high=True) if has_metadata else None
        if has_metadata and metadata is None:
            return False
        self.is_windowed = False
        self._rows, self._metadata = rows, metadata
        in_region = job.arena_offset // UNIT
        self.offsets = (
            in_region + rows.offset // UNIT,
            NO_BLOCK if metadata is None else in_region + metadata.offset // UNIT,
        )
        return True

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """By field of the kernel: row, scales, topk_idx, topk_weights, source."""
        rows, metadata = self._rows.ptr, 0 if self._metadata is None else self._metadata.ptr
        if not metadata:
            return (rows, rows + self._scales, 0, 0, 0)
        beside = self._beside
        return (rows, rows + self._scales, metadata + beside.topk_idx, metadata + beside.topk_weights, metadata)

    def rows(self, like: ArrayView) -> ArrayView:
        return self._turn.over(self._rows, 0, (self.num_rows, like.shape[1]), like.dtype)

    def scales(self, like: ArrayView | None) -> ArrayView | None:
        if like is None:
            return None
        return self._turn.over(self._rows, self._scales, (self.num_rows, *like.shape[1:]), like.dtype)

    def topk_idx(self, like: ArrayView | None) -> ArrayView | None:
        if like is None or self._metadata is None:
            return None
        return self._turn.over(self._metadata, self._beside.topk_idx, (self.num_rows, like.shape[1]), like.dtype)

    def topk_weights(self, like: ArrayView | None) -> ArrayView | None:
        if like is None or self._metadata is None:
            return None
        shape = (self.num_rows, like.shape[1])
        return self._turn.over(self._metadata, self._beside.topk_weights, shape, _FLOAT32)

    def src_idx(self) -> ArrayView:
        assert self._metadata is not None
        return self._turn.over(self._metadata, 0, (self.num_rows,), _INT32)
