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
    "LOGFMT_BLOCK",
    "ROW_DTYPES",
    "accumulate",
    "accumulate_weighted",
    "cast_fp8",
    "decode_logfmt",
    "encode_logfmt",
    "logfmt_row_bytes",
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

LOGFMT_BLOCK = 128  # channels that share one parameter word
_LOGFMT_BLOCK_BYTES = 160  # 128 low bytes, then 128 times the two bits above
_LOGFMT_WORD_BYTES = 4
_LOGFMT_TOP = 511  # the largest code
_LOGFMT_SIGN = 1 << 9
_LOGFMT_MAX_STEP = np.uint32(0x3D00)  # 1/32 octave, a bfloat16
_LOGFMT_MARK = np.uint32(1 << 31)  # in the word of a group with NaN or Inf


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


def logfmt_row_bytes(hidden: int) -> int:
    """Bytes of a row in LogFMT, a multiple of 16; `hidden` is a multiple of 128."""
    num_groups = hidden // LOGFMT_BLOCK
    return num_groups * _LOGFMT_BLOCK_BYTES + -(-num_groups * _LOGFMT_WORD_BYTES // 16) * 16


def encode_logfmt(x: NDArray[Any]) -> NDArray[np.uint8]:
    """Rows in LogFMT, the format that `epcomm.reference.encode_logfmt` defines.

    All in float32, each operation rounded once, but for one fused multiply-add. Backends differ in `log2` only.

    Args:
        x: bfloat16 ``[num_rows, hidden]``, hidden a multiple of 128.

    Returns:
        uint8 ``[num_rows, logfmt_row_bytes(hidden)]``.
    """
    num_rows, hidden = x.shape
    rows = np.zeros((num_rows, logfmt_row_bytes(hidden)), np.uint8)
    # As many rows as stay in a core's cache with all that is made of them.
    step = max(1, (1 << 16) // hidden)
    for start in range(0, num_rows, step):
        _write_logfmt(x[start : start + step], rows[start : start + step])
    return rows


@np.errstate(all="ignore")  # Inf and NaN among the values, and logarithms of 0
def _write_logfmt(x: NDArray[Any], rows: NDArray[np.uint8]) -> None:
    """`encode_logfmt` of some rows."""
    blocks, words = _logfmt_parts(rows, x.shape[1])
    values = x.astype(np.float32).reshape(len(x), -1, LOGFMT_BLOCK)
    magnitude = np.abs(values)
    is_finite = np.isfinite(magnitude)
    is_marked = ~is_finite.all(axis=-1)
    largest = np.where(is_finite, magnitude, 0).max(axis=-1)
    smallest = np.where(is_finite & (magnitude > 0), magnitude, np.inf).min(axis=-1)

    # Scaled by a power of two, exactly: then logarithms are small, and none is of a subnormal that counts.
    exponent = np.clip(largest.view(np.uint32) >> 23, 1, 253)
    scale = ((254 - exponent) << 23).astype(np.uint32).view(np.float32)
    top = np.float32(_LOGFMT_TOP) - is_marked.astype(np.float32)
    top_octave = np.log2(largest * scale)
    octaves = np.fmax(top_octave - np.log2(smallest * scale), np.float32(0))
    exact_step = octaves * (1 / (top - 1))
    step_bits = np.minimum((exact_step.view(np.uint32) + 0xFFFF) >> 16, _LOGFMT_MAX_STEP)
    step = (step_bits << 16).view(np.float32)
    per_octave = np.where(step > 0, 1 / step, np.float32(0))
    offset = top - top_octave * per_octave

    # A place on the grid is a fused multiply-add; float64 holds the product.
    octave = np.log2(magnitude * scale[..., None]).astype(np.float64)
    place = (octave * per_octave[..., None] + offset[..., None]).astype(np.float32)
    is_kept = is_finite & (place > 1 - per_octave[..., None])  # more than half of the smallest; NaN is not
    code = np.where(is_kept, np.maximum(np.rint(place), 1), 0).astype(np.uint16)
    code[is_kept & np.signbit(values)] |= _LOGFMT_SIGN
    if is_marked.any():
        code[np.isinf(values)] = _LOGFMT_TOP
        code[values == -np.inf] |= _LOGFMT_SIGN
        code[np.isnan(values)] = _LOGFMT_SIGN

    blocks[..., :LOGFMT_BLOCK] = code & 0xFF
    high = code.reshape(*code.shape[:-1], -1, 4) >> 8
    blocks[..., LOGFMT_BLOCK:] = (high << np.arange(0, 8, 2, dtype=np.uint16)).sum(axis=-1)
    words[...] = largest.view(np.uint32) | step_bits | np.where(is_marked, _LOGFMT_MARK, 0)


@np.errstate(all="ignore")
def decode_logfmt(rows: NDArray[np.uint8], hidden: int) -> NDArray[np.float32]:
    """What rows in LogFMT stand for; `exp2` apart, backends agree.

    Args:
        rows: uint8 ``[num_rows, logfmt_row_bytes(hidden)]``.
        hidden: a multiple of 128.

    Returns:
        float32 ``[num_rows, hidden]``.
    """
    blocks, words = _logfmt_parts(rows, hidden)
    high = blocks[..., LOGFMT_BLOCK:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    code = blocks[..., :LOGFMT_BLOCK] | high.reshape(*high.shape[:-2], LOGFMT_BLOCK).astype(np.uint16) << 8
    number = code & _LOGFMT_TOP
    is_marked = words >= _LOGFMT_MARK
    top = np.float32(_LOGFMT_TOP) - is_marked.astype(np.float32)
    largest, step = ((words & 0x7FFF0000).view(np.float32), (words << 16).view(np.float32))
    below = (number.astype(np.float32) - top[..., None]) * step[..., None]
    values = np.exp2(below) * largest[..., None]
    values[number == 0] = 0
    if is_marked.any():
        values[is_marked[..., None] & (number == _LOGFMT_TOP)] = np.inf
        values[is_marked[..., None] & (code == _LOGFMT_SIGN)] = np.nan
    np.negative(values, out=values, where=code >= _LOGFMT_SIGN)
    return values.reshape(len(rows), hidden)


def _logfmt_parts(rows: NDArray[np.uint8], hidden: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Views of rows in LogFMT: codes uint8 ``[num_rows, num_groups, 160]``, words uint32 ``[num_rows, num_groups]``."""
    num_groups = hidden // LOGFMT_BLOCK
    first_word = num_groups * _LOGFMT_BLOCK_BYTES
    blocks = rows[:, :first_word].reshape(len(rows), num_groups, _LOGFMT_BLOCK_BYTES)
    return blocks, rows[:, first_word : first_word + num_groups * _LOGFMT_WORD_BYTES].view("<u4")
