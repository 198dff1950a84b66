"""Selections of tokens and ordered sums of rows, shared by the one-level and the two-level operations."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty
from epcomm.backends.host.fields import Selection, by_index
from epcomm.numerics import accumulate, round_to

__all__ = ["keep_first", "reduce_rows", "select_tokens"]

_BLOCK_BYTES = 1 << 20  # float32 sums of this size stay in a core's cache while the ranks are added up


def select_tokens(is_token_in_rank: NDArray[np.bool_]) -> Selection:
    """Tokens for each rank, ascending, from a mask ``[T, R]``."""
    ranks, tokens = np.nonzero(is_token_in_rank.T)
    return by_index(tokens.astype(np.int32), np.bincount(ranks, minlength=is_token_in_rank.shape[1]))


def keep_first(mask: NDArray[np.bool_], num_kept: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of every column of `mask`, the first ``num_kept[column]`` set entries."""
    return mask & (np.cumsum(mask, axis=0) <= num_kept)


@np.errstate(all="ignore")  # Inf and NaN are results here, not events to warn about
def reduce_rows(
    parts: Sequence[NDArray[np.uint8]],
    mask: NDArray[np.bool_],
    width: int,
    dtype: np.dtype[Any],
    biases: Sequence[NDArray[Any]] = (),
) -> NDArray[Any]:
    """Sum one row of each part that takes part: biases first, then parts in order; one rounding.

    Args:
        parts: by column of `mask`, the bytes of its rows; row i belongs to the i-th set entry of the column.
        mask: bool ``[T, len(parts)]``.
        width: elements of a row.
        dtype: of rows, biases and result.

    Returns:
        ``[T, width]``.
    """
    num_tokens = mask.shape[0]
    out = empty((num_tokens, width), dtype)
    starts = np.arange(0, num_tokens, max(1, _BLOCK_BYTES // (4 * width)))
    columns = [_Column(part, selected, starts) for part, selected in zip(parts, mask.T, strict=True)]
    num_sums = (int(starts[1]) if len(starts) > 1 else num_tokens) * width
    acc_block = _scratch("sums", 4 * num_sums).view(np.float32).reshape(-1, width)
    row_block = _scratch("rows", dtype.itemsize * num_sums).view(dtype).reshape(-1, width)
    for number, start in enumerate(starts):
        block = slice(int(start), min(int(start) + len(acc_block), num_tokens))
        acc, rows = acc_block[: block.stop - block.start], row_block[: block.stop - block.start]
        acc.fill(0)
        for bias in biases:
            accumulate(acc, bias[block])
        for column in columns:
            column.add_to(acc, rows, block, number)
        round_to(acc, out[block])
    return out


_reused = threading.local()  # of the thread, because ranks may be threads


def _scratch(name: str, num_bytes: int) -> NDArray[np.uint8]:
    """Working memory that stays mapped between calls: fresh pages would cost more than the sums in them."""
    memory: NDArray[np.uint8] | None = getattr(_reused, name, None)
    if memory is None or memory.size < num_bytes:
        memory = empty((num_bytes,), np.uint8)
        setattr(_reused, name, memory)
    return memory[:num_bytes]


class _Column:
    """The rows of one part, and which tokens they belong to. Indices are made once, for all blocks of tokens."""

    def __init__(self, part: NDArray[np.uint8], selected: NDArray[np.bool_], starts: NDArray[np.int64]) -> None:
        self._part = part
        self._row: NDArray[np.int64] = np.cumsum(selected, dtype=np.int64) - 1
        self._is_dense = 2 * len(part) > len(selected)
        # The tokens that are handled one by one: those without a row, or where these are many, those with one.
        self._tokens = np.flatnonzero(selected != self._is_dense)
        self._cuts = [*np.searchsorted(self._tokens, starts).tolist(), len(self._tokens)]

    def add_to(self, acc: NDArray[np.float32], rows: NDArray[Any], block: slice, number: int) -> None:
        """Add the rows of tokens `block`, the block with this number, to `acc`; `rows` is working memory."""
        tokens = self._tokens[self._cuts[number] : self._cuts[number + 1]]
        if self._is_dense:
            # Sums start at +0 and so are never -0: adding +0 changes no bit. One dense addition costs a third of an
            # indexed one.
            row_bytes = rows.view(np.uint8)
            self._part.take(self._row[block], axis=0, out=row_bytes, mode="clip")
            if len(tokens):
                row_bytes[tokens - block.start] = 0
            accumulate(acc, rows)
        elif len(tokens):
            sums = acc[tokens - block.start]
            accumulate(sums, self._part[self._row[tokens]].view(rows.dtype))
            acc[tokens - block.start] = sums
