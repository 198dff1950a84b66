"""Row arithmetic of the host backend: fast NumPy with the bits of the contract.

Sums run in float32 in a fixed order with one rounding at the end; every product and sum is a separate
float32 operation, so no fused multiply-add can slip in. Subnormals are kept. `epcomm.reference` states
the same arithmetic independently and the tests compare the two bit for bit.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BFLOAT16",
    "COMBINE_DTYPES",
    "FP8_BLOCK",
    "FP8_E4M3",
    "FP8_MAX",
    "ROW_DTYPES",
    "accumulate",
    "accumulate_weighted",
    "cast_fp8",
    "num_packed_scales",
    "round_to",
    "start_sum",
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)

COMBINE_DTYPES = (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32))
ROW_DTYPES = (*COMBINE_DTYPES, FP8_E4M3, FP8_E5M2, np.dtype(np.uint8), np.dtype(np.int8))

FP8_BLOCK = 128  # channels that share one scale
FP8_MAX = np.float32(448.0)  # largest finite e4m3fn
_AMAX_FLOOR = np.float32(1e-4)


def accumulate(acc: NDArray[np.float32], rows: NDArray[Any]) -> None:
    """``acc += float32(rows)``, elementwise and exact in the conversion."""
    # The ufunc converts bfloat16 and float16 in cache-sized pieces: half the time of a converted copy.
    np.add(acc, rows, out=acc)


def start_sum(acc: NDArray[np.float32], rows: NDArray[Any]) -> None:
    """``acc = +0 + float32(rows)``: the first step of a sum, in which -0 becomes +0."""
    np.add(rows, 0, out=acc, dtype=np.float32)


def accumulate_weighted(acc: NDArray[np.float32], weights: NDArray[np.float32], rows: NDArray[Any]) -> None:
    """``acc += weights[:, None] * float32(rows)``: product rounded, then sum rounded."""
    np.add(acc, np.multiply(weights[:, None], rows, dtype=np.float32), out=acc)


def round_to(acc: NDArray[np.float32], out: NDArray[Any]) -> None:
    """Round float32 sums to the dtype of `out`, to nearest even."""
    with np.errstate(over="ignore"):
        np.copyto(out, acc, casting="unsafe")


def num_packed_scales(hidden: int) -> int:
    """Number of int32 words that hold the UE8M0 exponents of one row, four a word."""
    return -(-(hidden // FP8_BLOCK) // 4)


def cast_fp8(
    x: NDArray[Any], *, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cast rows to float8_e4m3fn with one scale for 128 channels.

    Args:
        x: ``[num_tokens, hidden]``, hidden a multiple of 128.
        round_scale: round each scale up to a power of two.
        use_ue8m0: return scales as exponent bytes, four packed in an int32 (needs `round_scale`).

    Returns:
        ``(q, scales)``: q float8_e4m3fn ``[num_tokens, hidden]``; scales float32
        ``[num_tokens, hidden / 128]`` or int32 ``[num_tokens, ceil(hidden / 512)]``.
    """
    num_tokens, hidden = x.shape
    blocks = x.astype(np.float32).reshape(num_tokens, hidden // FP8_BLOCK, FP8_BLOCK)
    # Like CUDA's fmaxf, the maximum passes over NaN. (np.fmax.reduce cannot be used: its vector loops lose elements
    # beside a signalling NaN.)
    magnitude = np.abs(blocks)
    magnitude[np.isnan(magnitude)] = 0
    amax = np.maximum(magnitude.max(axis=-1), _AMAX_FLOOR)
    with np.errstate(all="ignore"):
        if round_scale:
            bits = (amax / FP8_MAX).view(np.uint32)
            biased = np.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0), 254).astype(np.uint32)
            scales = (biased << 23).view(np.float32)
            factor = ((254 - biased) << 23).astype(np.uint32).view(np.float32)
        else:
            factor, scales = FP8_MAX / amax, amax / FP8_MAX
        np.multiply(blocks, factor[..., None], out=blocks)
        q = np.clip(blocks, -FP8_MAX, FP8_MAX, out=blocks).astype(FP8_E4M3).reshape(num_tokens, hidden)
    if not use_ue8m0:
        return q, scales
    packed = np.zeros((num_tokens, num_packed_scales(hidden) * 4), np.uint8)
    packed[:, : biased.shape[1]] = biased
    return q, packed.view("<i4").astype(np.int32, copy=False)
