"""Selections of tokens and ordered sums of rows, shared by the one-level and the two-level operations."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty
from epcomm.backends.host.fields import Selection, by_index
from epcomm.numerics import accumulate, round_to, start_sum

__all__ = ["OrderedSum", "keep_first", "select_tokens"]

_BLOCK_BYTES = 1 << 20  # float32 sums of this size stay in a core's cache while the ranks are added up


def select_tokens(is_token_in_rank: NDArray[np.bool_]) -> Selection:
    """Tokens for each rank, ascending, from a mask ``[T, R]``."""
    # Rank by rank: half the time, or less, of a search for pairs.
    tokens = [column.nonzero()[0] for column in np.ascontiguousarray(is_token_in_rank.T)]
    counts = np.array([len(column) for column in tokens])
    return by_index(np.concatenate(tokens, dtype=np.int32, casting="same_kind"), counts)


def keep_first(mask: NDArray[np.bool_], num_kept: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of every column of `mask`, the first ``num_kept[column]`` set entries."""
    return mask & (np.cumsum(mask, axis=0) <= num_kept)


class OrderedSum:
    """Sums of rows that belong to tokens, part by part in a fixed order.

    The indices are made once, for all parts and all blocks of tokens.

    Args:
        mask: bool ``[T, P]``; row i of part p belongs to the token of the i-th set entry of column p.

    Attributes:
        counts: the number of rows of each part.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._num_tokens, num_parts = mask.shape
        selected = np.ascontiguousarray(mask.T)
        self._row: NDArray[np.int64] = np.cumsum(selected, axis=1, dtype=np.int64)
        self.counts: list[int] = self._row[:, -1].tolist() if self._num_tokens else [0] * num_parts
        self._row -= 1
        self._is_dense = [2 * count > self._num_tokens for count in self.counts]
        # The tokens that are handled one by one: those without a row, or where these are many, those with one. One
        # list, part after part.
        self._single = np.flatnonzero(selected != np.array(self._is_dense, np.bool_)[:, None])

    @np.errstate(all="ignore")  # Inf and NaN are results here, not events to warn about
    def reduce(
        self,
        parts: Sequence[NDArray[np.uint8]],
        width: int,
        dtype: np.dtype[Any],
        biases: Sequence[NDArray[Any]] = (),
    ) -> NDArray[Any]:
        """Sum one row of each part that takes part: biases first, then parts in order; one rounding.

        Args:
            parts: the bytes of the rows.
            width: elements of a row.
            dtype: of rows, biases and result.

        Returns:
            ``[T, width]``.
        """
        num_tokens = self._num_tokens
        out = empty((num_tokens, width), dtype)
        step = max(1, min(num_tokens, _BLOCK_BYTES // (4 * width)))
        # By part and block, where the block's tokens begin in the list of single ones.
        bounds = np.minimum(np.arange(0, num_tokens + step, step), num_tokens)
        cuts = np.searchsorted(self._single, np.arange(len(parts))[:, None] * num_tokens + bounds).tolist()
        acc = _scratch("sums", 4 * step * width).view(np.float32).reshape(step, width)
        rows = _scratch("rows", dtype.itemsize * step * width).view(dtype).reshape(step, width)
        for number, start in enumerate(range(0, num_tokens, step)):
            block = slice(start, min(start + step, num_tokens))
            sums = _BlockSum(acc[: block.stop - start], rows[: block.stop - start])
            for bias in biases:
                sums.add(bias[block])
            for index, part in enumerate(parts):
                single = self._single[cuts[index][number] : cuts[index][number + 1]] - (index * num_tokens + start)
                if self._is_dense[index]:
                    sums.add_all_but(part, self._row[index, block], single)
                elif len(single):
                    sums.add_only(part, self._row[index, block], single)
            sums.round_to(out[block])
        return out


class _BlockSum:
    """The sums of a block of tokens while they grow; `rows` is working memory."""

    def __init__(self, acc: NDArray[np.float32], rows: NDArray[Any]) -> None:
        self._acc, self._rows, self._row_bytes = acc, rows, rows.view(np.uint8)
        self._is_zero = True  # the sums are +0, which is not written yet

    def add(self, rows: NDArray[Any]) -> None:
        """Add a row to every sum."""
        (start_sum if self._is_zero else accumulate)(self._acc, rows)
        self._is_zero = False

    def add_all_but(self, part: NDArray[np.uint8], row: NDArray[np.int64], without: NDArray[np.int64]) -> None:
        """Add ``part[row[t]]`` to the sum of token t, but not to those of tokens `without`."""
        # Sums start at +0 and so are never -0: adding +0 changes no bit. One dense addition costs a third of an
        # indexed one.
        part.take(row, axis=0, out=self._row_bytes, mode="clip")
        if len(without):
            self._row_bytes[without] = 0
        self.add(self._rows)

    def add_only(self, part: NDArray[np.uint8], row: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Add ``part[row[t]]`` to the sum of token t, for tokens `tokens`."""
        self._write_zero()
        sums = self._acc[tokens]
        accumulate(sums, part[row[tokens]].view(self._rows.dtype))
        self._acc[tokens] = sums

    def round_to(self, out: NDArray[Any]) -> None:
        """Round the sums to the dtype of `out`."""
        self._write_zero()
        round_to(self._acc, out)

    def _write_zero(self) -> None:
        if self._is_zero:
            self._acc.fill(0)
            self._is_zero = False


_reused = threading.local()  # of the thread, because ranks may be threads


def _scratch(name: str, num_bytes: int) -> NDArray[np.uint8]:
    """Working memory that stays mapped between calls: fresh pages would cost more than the sums in them."""
    memory: NDArray[np.uint8] | None = getattr(_reused, name, None)
    if memory is None or memory.size < num_bytes:
        memory = empty((num_bytes,), np.uint8)
        setattr(_reused, name, memory)
    return memory[:num_bytes]
