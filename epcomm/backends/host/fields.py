"""What a rank posts: fields of rows, and selections that say which rows go to which rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epcomm.layout import align

__all__ = [
    "Field",
    "Layout",
    "Selection",
    "as_bytes",
    "by_index",
    "by_range",
    "fill",
    "lay_out",
    "selections_of",
    "to_all",
]

Bytes = NDArray[np.uint8]


def as_bytes(rows: NDArray[Any]) -> Bytes:
    """Contiguous rows as uint8 ``[num_rows, row_bytes]``."""
    row_bytes = math.prod(rows.shape[1:]) * rows.itemsize
    return rows.reshape(-1).view(np.uint8).reshape(rows.shape[0], row_bytes)


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows ``indices[begin[r] : begin[r] + counts[r]]`` go to rank r; without indices, those rows themselves."""

    begin: NDArray[np.int64]
    counts: NDArray[np.int64]
    indices: NDArray[np.int32] | None = None
    is_partition: bool = False  # no row goes to several ranks

    def rows_for(self, rank: int) -> NDArray[np.int32] | slice:
        """Index of the rows for one rank."""
        span = slice(int(self.begin[rank]), int(self.begin[rank] + self.counts[rank]))
        return span if self.indices is None else self.indices[span]


def by_index(indices: NDArray[np.int32], counts: NDArray[np.int64]) -> Selection:
    """Rows `indices`, sorted by destination, `counts` of them for each rank."""
    return Selection(np.cumsum(counts) - counts, counts, indices)


def by_range(begin: NDArray[np.int64], counts: NDArray[np.int64]) -> Selection:
    """A contiguous range of rows for each rank, ranges that do not overlap."""
    return Selection(begin, counts, is_partition=True)


def to_all(num_rows: int, num_ranks: int) -> Selection:
    """All rows for every rank."""
    return Selection(np.zeros(num_ranks, np.int64), np.full(num_ranks, num_rows, np.int64))


@dataclass(frozen=True, eq=False)
class Field:
    """An array of rows to post. Rows may be strided; what is posted is contiguous."""

    rows: NDArray[Any]
    selection: Selection

    @property
    def num_rows(self) -> int:
        return int(self.rows.shape[0])

    @property
    def row_bytes(self) -> int:
        return math.prod(self.rows.shape[1:]) * self.rows.itemsize

    @property
    def own_rows_stay(self) -> bool:
        """Whether a rank reads what it sends to itself where the caller has it. The caller must leave it there."""
        return self.selection.is_partition and bool(self.rows.flags.c_contiguous)

    def spans_for_others(self, rank: int) -> list[slice]:
        """The rows that peers of `rank` read: all, or all but its own range where no row goes to several ranks."""
        if not self.own_rows_stay:
            return [slice(0, self.num_rows)]
        begin, count = int(self.selection.begin[rank]), int(self.selection.counts[rank])
        return [slice(0, begin), slice(begin + count, self.num_rows)]

    def copy_to(self, target: Bytes, span: slice) -> None:
        """Write rows `span` to their place in `target`, the bytes of all rows."""
        if self.rows.flags.c_contiguous:
            place = slice(span.start * self.row_bytes, span.stop * self.row_bytes)
            target[place] = self.rows.reshape(-1).view(np.uint8)[place]
        else:
            target.view(self.rows.dtype).reshape(self.rows.shape)[span] = self.rows[span]

    def pack(self, rank: int) -> Bytes:
        """Bytes of the rows for one rank, contiguous."""
        rows = np.ascontiguousarray(self.rows[self.selection.rows_for(rank)])
        return rows.view(np.uint8).reshape(-1) if rows.size else np.empty(0, np.uint8)


def selections_of(fields: Sequence[Field]) -> list[Selection]:
    """The different selections of `fields`, in order of first use."""
    return list(dict.fromkeys(f.selection for f in fields))


class Layout(NamedTuple):
    """Where a post lies in its window: fields, then the indices of their selections."""

    fields: tuple[int, ...]  # as `Header.fields`
    selects: tuple[int, ...]  # as `Header.selects`
    num_bytes: int


def lay_out(fields: Sequence[Field], selections: Sequence[Selection]) -> Layout:
    """The layout of `fields`, whose `selections_of` are given."""
    places: list[int] = []
    selects: list[int] = []
    offset = 0
    for f in fields:
        num_rows, row_bytes = f.num_rows, f.row_bytes
        places += (offset, num_rows, row_bytes, selections.index(f.selection))
        offset += align(num_rows * row_bytes)
    for s in selections:
        selects += (s.indices is not None, offset)
        offset += align(0 if s.indices is None else s.indices.nbytes)
    return Layout(tuple(places), tuple(selects), offset)


def fill(
    memory: Bytes, layout: Layout, fields: Sequence[Field], selections: Sequence[Selection], rank: int, in_place: bool
) -> int:
    """Copy rows for the peers of `rank`, and indices, into `memory`, a window.

    Args:
        in_place: rows may have been written there by the caller; then they are not copied.

    Returns:
        The bytes of the rows that were copied.
    """
    num_copied = 0
    for f, start in zip(fields, layout.fields[::4], strict=True):
        num_bytes = f.num_rows * f.row_bytes
        if num_bytes == 0 or (in_place and f.rows.ctypes.data == memory.ctypes.data + start):
            continue
        target = memory[start : start + num_bytes]
        for span in f.spans_for_others(rank):
            f.copy_to(target, span)
            num_copied += (span.stop - span.start) * f.row_bytes
    for s, start in zip(selections, layout.selects[1::2], strict=True):
        if s.indices is not None:
            memory[start : start + s.indices.nbytes].view(np.int32)[:] = s.indices
    return num_copied
