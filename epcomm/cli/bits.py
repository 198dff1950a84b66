"""Floats as bits, for NumPy and CuPy alike: CuPy has no arithmetic for the 8-bit floats, and little for bfloat16.

`xp` is the module ``numpy`` or ``cupy``; bits are unsigned integers of the width of the dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_bits", "as_rows", "round_to", "widen"]


def as_rows(bits: Any, dtype: np.dtype[Any]) -> Any:
    """The memory of contiguous `bits` as an array of `dtype`."""
    if isinstance(bits, np.ndarray):
        return bits.view(dtype)
    return type(bits)(bits.shape, dtype, bits.data)


def as_bits(rows: Any) -> Any:
    """The memory of contiguous `rows` as bits."""
    word = np.dtype(f"u{rows.dtype.itemsize}")
    if isinstance(rows, np.ndarray):
        return rows.view(word)
    return type(rows)(rows.shape, word, rows.data)


def widen(xp: Any, bits: Any, dtype: np.dtype[Any]) -> Any:
    """The values of bfloat16, float16 or float32 bits, as float32."""
    if dtype.name == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(xp.float32)
    return bits.view(xp.float16 if dtype.name == "float16" else xp.float32).astype(xp.float32)


def round_to(xp: Any, values: Any, dtype: np.dtype[Any]) -> Any:
    """The bits of float32 values, rounded to nearest even; NaN stays NaN."""
    if dtype.name == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return xp.where(xp.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return values.astype(xp.float16).view(np.uint16) if dtype.name == "float16" else values.view(np.uint32)
