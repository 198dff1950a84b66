"""Rows as a function of the global token index, for NumPy and CuPy alike.

Elements are hashes of (seed, token, channel) in the bits of a float of magnitude 0.5 to 2, either sign: no two rows are
alike, and there is no NaN, so that equal bits are equal values. `xp` is the module ``numpy`` or ``cupy``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["make_bits"]


class _Pattern(NamedTuple):
    """Bits of a hash to keep, and bits to set."""

    word: type[np.unsignedinteger[Any]]
    keep: int
    set: int


# Sign, lowest bit of the exponent and mantissa are kept; the other bits of the exponent are those of 0.5.
_PATTERNS = {
    "bfloat16": _Pattern(np.uint16, 0x80FF, 0x3F00),
    "float16": _Pattern(np.uint16, 0x87FF, 0x3800),
    "float32": _Pattern(np.uint32, 0x80FFFFFF, 0x3F000000),
    "float8_e4m3fn": _Pattern(np.uint8, 0x8F, 0x30),
}
_BLOCK_ELEMENTS = 1 << 24  # bounds the memory of hashes, which take 8 bytes each


def make_bits(xp: Any, tokens: Any, num_columns: int, dtype: np.dtype[Any], seed: int) -> Any:
    """The bits of the rows of `tokens`, ``[T, num_columns]``.

    Args:
        xp: numpy or cupy.
        tokens: global indices, any integer array ``[T]`` of `xp`.
        num_columns: channels, or scales.
        dtype: bfloat16, float16, float32 or float8_e4m3fn.
        seed: rows of two seeds have nothing in common.
    """
    pattern = _PATTERNS[dtype.name]
    bits = xp.empty((len(tokens), num_columns), pattern.word)
    columns = xp.arange(num_columns, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    starts = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    starts += np.uint64((seed * 0xC2B2AE3D27D4EB4F + 1) % 2**64)
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    for begin in range(0, len(tokens), step):
        z = starts[begin : begin + step, None] + columns  # then the finalizer of SplitMix64
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z >>= np.uint64(32)
        z &= np.uint64(pattern.keep)
        z |= np.uint64(pattern.set)
        bits[begin : begin + step] = z.astype(pattern.word)
    return bits
