"""The formats that rows travel in, other than their own."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from epcomm.errors import InputError, ShapeError
from epcomm.reference.checks import Array, ieee_754

__all__ = [
    "LOGFMT_CALC_DIFF",
    "LOGFMT_FLOOR",
    "LOGFMT_RELATIVE_ERROR",
    "cast_fp8",
    "decode_logfmt",
    "encode_logfmt",
    "logfmt_bound",
]

# How far a value may be from what comes back of it, see `logfmt_bound`: by this part of itself,
LOGFMT_RELATIVE_ERROR = 0.011
# or, if that is more, by this part of the largest magnitude of its group.
LOGFMT_FLOOR = 2.0**-16.9
# `epcomm.testing.calc_diff` of normally distributed values and what comes back of them.
LOGFMT_CALC_DIFF = 5e-6

_MAX_STEP = 1 / 32  # octaves
_SLACK = 2.0**-15  # octaves, for logarithms and powers in float32


@ieee_754
def cast_fp8(x: Array, *, round_scale: bool = False, use_ue8m0: bool = False) -> tuple[Array, Array]:
    """Cast to float8_e4m3fn with one scale for 128 channels; ``q * scale`` gives x back, nearly.

    In float32, each operation rounded once::

        m = fmax(max |x|, 1e-4)        v = m / 448
        scale = v,    s = 448 / m                                   round_scale=False
        scale = 2^e,  s = 2^-e,  e the smallest with 2^e >= v       round_scale=True
        q = e4m3(clip(x * s, -448, 448)), to nearest even

    NaN channels give NaN and do not count in the maximum (CUDA's fmaxf). In a group with an Inf, s is 0:
    Inf gives NaN, finite channels give zeros of their sign, and scale is Inf, or 2^127 with `round_scale`.

    Args:
        x: ``[..., H]`` bfloat16, float16 or float32; H a multiple of 128.
        round_scale: powers of two as scales.
        use_ue8m0: scales as exponent bytes; needs `round_scale`.

    Returns:
        ``(q, scales)``. q float8_e4m3fn ``[..., H]``. scales float32 ``[..., H / 128]``; with `use_ue8m0`
        int32 ``[..., ceil(H / 512)]``: byte i, little endian, of word j is e + 127 of group 4 j + i, 0 where
        there is no such group.

    Raises:
        ShapeError: H is not a multiple of 128.
        InputError: `use_ue8m0` without `round_scale`.
    """
    if use_ue8m0 and not round_scale:
        raise InputError("use_ue8m0", got="round_scale=False", wanted="powers of two", do="pass round_scale=True")
    if x.shape[-1] % 128:
        raise ShapeError("x", got=f"{x.shape[-1]} channels", wanted="a multiple of 128")
    num_groups = x.shape[-1] // 128
    groups = x.astype(np.float32).reshape(*x.shape[:-1], num_groups, 128)
    largest_e4m3 = np.float32(448)
    # Not np.fmax.reduce: NumPy's vector loops lose elements beside a signalling NaN.
    m = np.maximum(np.where(np.isnan(groups), 0, np.abs(groups)).max(axis=-1), np.float32(1e-4))
    scale, s = m / largest_e4m3, largest_e4m3 / m
    if round_scale:
        mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1)
        e = np.where(np.isinf(m), 127, np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.int32)
        scale = np.ldexp(np.float32(1), e)
        s = np.where(np.isinf(m), np.float32(0), np.ldexp(np.float32(1), -e))
    # ml_dtypes converts what is above 464 to NaN; the hardware conversion saturates.
    scaled = np.clip(groups * s[..., None], -largest_e4m3, largest_e4m3)
    q = scaled.astype(ml_dtypes.float8_e4m3fn).reshape(x.shape)
    if not use_ue8m0:
        return q, scale
    words = np.zeros((*x.shape[:-1], -(-num_groups // 4)), np.int32)
    for group in range(num_groups):
        words[..., group // 4] |= (e[..., group] + 127) << (8 * (group % 4))
    return q, words


@ieee_754
def encode_logfmt(x: Array) -> Array:
    """The 10-bit logarithmic format of a low-latency combine: a sign and the place on a grid of magnitudes.

    A group of 128 channels has a grid of its own. Its largest finite magnitude, A, is code `top`, which is 511; from
    each code to the one below it is `step` octaves, down to code 1; code 0 is zero::

        grid(code) = A * 2^((code - top) * step)
        octaves = log2(A / the smallest finite magnitude of the group but 0)
        step = min(octaves / (top - 1), rounded up to a bfloat16, 1 / 32)

    So the grid reaches down to the smallest magnitude, or as far as 15.9 octaves. A value gets the code with the
    nearest logarithm, ties to the even one; if it is below grid(1), then code 1 if it is more than half of that,
    else 0. The sign goes beside the code. Zeros, also those that a value is rounded to, have none. A comes back
    exactly.

    A group with NaN or Inf is marked. In such a group `top` is 510, code 511 is infinity, of either sign, and code 0
    with a sign is NaN. All other values are as if NaN and Inf were not there.

    A row is, H being 128 G and everything little endian::

        G x 160 bytes   for each group: 128 bytes, the lower 8 bits of each code; then 32 bytes, for each channel
                        2 bits, from the lowest bit on: the bit above, and the sign
        G x 4 bytes     for each group a word: the upper half the bits of A, the sign the mark, the lower half step
        zeros           up to a multiple of 16 bytes

    Backends agree with this up to their log2 and exp2, which may turn a code into its neighbour: compare values
    with `logfmt_bound`, not bits.

    Args:
        x: bfloat16 ``[..., H]``, H a multiple of 128.

    Returns:
        uint8 ``[..., 160 G + 16 ceil(G / 4)]``.

    Raises:
        ShapeError: H is not a multiple of 128.
    """
    groups = _groups(x)
    largest, octaves, is_marked = _spans(groups)
    top = np.where(is_marked, 510, 511)[..., None]
    step = _steps(octaves, is_marked)[..., None]

    # In codes; 0 where all magnitudes are equal.
    below = (np.log2(largest[..., None]) - np.log2(np.abs(groups))) / np.where(step > 0, step, np.inf)
    nearest = np.maximum(np.rint(top - below), 1)
    is_zero = np.abs(groups) <= _grid(1, largest[..., None], step, top) / 2
    codes = np.where(is_zero, 0, nearest)
    codes = np.where(np.isinf(groups), 511, np.where(np.isnan(groups), 0, codes)).astype(int)
    signs = np.isnan(groups) | (np.signbit(groups) & (codes > 0))

    high = (codes >> 8 | signs.astype(int) << 1).reshape(*codes.shape[:-1], 32, 4)
    packed = np.concatenate([codes & 0xFF, (high * [1, 4, 16, 64]).sum(axis=-1)], axis=-1)
    words = _bits(largest).astype(np.uint32) << 16 | is_marked.astype(np.uint32) << 31 | _bits(step[..., 0])
    num_groups = words.shape[-1]
    rows = np.zeros((*x.shape[:-1], 160 * num_groups + 16 * -(-num_groups // 4)), np.uint8)
    for group in range(num_groups):
        rows[..., 160 * group : 160 * (group + 1)] = packed[..., group, :]
        for byte in range(4):
            rows[..., 160 * num_groups + 4 * group + byte] = words[..., group] >> 8 * byte & 0xFF
    return rows


@ieee_754
def decode_logfmt(rows: Array, hidden: int) -> Array:
    """The values that `encode_logfmt` stands for: float32 ``[..., hidden]``."""
    num_groups = hidden // 128
    packed = rows[..., : num_groups * 160].reshape(*rows.shape[:-1], num_groups, 160).astype(int)
    words = np.ascontiguousarray(rows[..., num_groups * 160 : num_groups * 164]).view("<u4")
    high = np.stack([packed[..., 128:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    high = high.reshape(*packed.shape[:-1], 128)
    codes, signs = packed[..., :128] | (high & 1) << 8, high >> 1
    is_marked = (words >> 31 == 1)[..., None]
    largest, step = (
        half.astype(np.uint16).view(ml_dtypes.bfloat16).astype(float)[..., None]
        for half in (words >> 16 & 0x7FFF, words & 0xFFFF)
    )
    values = np.where(codes == 0, 0.0, _grid(codes, largest, step, np.where(is_marked, 510, 511)))
    values = np.where(is_marked & (codes == 511), np.inf, values)
    values = np.where(is_marked & (codes == 0) & (signs == 1), np.nan, values)
    return np.where(signs == 1, -values, values).astype(np.float32).reshape(*rows.shape[:-1], hidden)


@ieee_754
def logfmt_bound(x: Array) -> Array:
    """How far each value may be from what comes back of it through LogFMT, on any backend.

    With the step of its group, in octaves, a value comes back within ``|x| (2^(step / 2) - 1)``: at most 1.1 %
    (`LOGFMT_RELATIVE_ERROR`), and 0.6 % where the magnitudes span 8.6 octaves, as normally distributed ones often
    do. Below the grid, that is below A / 2^15.9, it comes back within half of the grid's smallest magnitude:
    2^-16.9 A (`LOGFMT_FLOOR`).

    Args:
        x: bfloat16 ``[..., H]``, H a multiple of 128.

    Returns:
        float64 ``[..., H]``; 0 for NaN and Inf, which come back as they are.
    """
    groups = _groups(x)
    largest, octaves, is_marked = _spans(groups)
    # Rounding up to a bfloat16 adds up to 2^-7, and another logarithm may round to the next one.
    step = np.minimum(octaves / np.where(is_marked, 509, 510) * 1.008, _MAX_STEP)[..., None]
    relative = np.abs(groups) * (2 ** (step / 2 + _SLACK) - 1)
    bound = np.where(step < _MAX_STEP, relative, np.maximum(relative, largest[..., None] * LOGFMT_FLOOR))
    return np.where(np.isfinite(groups), bound, 0.0).reshape(x.shape)


def _groups(x: Array) -> Array:
    """float64 ``[..., G, 128]``."""
    if x.shape[-1] % 128:
        raise ShapeError("x", got=f"{x.shape[-1]} channels", wanted="a multiple of 128")
    return x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // 128, 128)


def _spans(groups: Array) -> tuple[Array, Array, Array]:
    """By group: the largest finite magnitude, the octaves down to the smallest but 0, whether there is NaN or Inf."""
    magnitudes = np.where(np.isfinite(groups), np.abs(groups), 0)
    largest = magnitudes.max(axis=-1)
    smallest = np.where(magnitudes > 0, magnitudes, np.inf).min(axis=-1)
    octaves = np.where(largest > 0, np.log2(largest) - np.log2(smallest), 0.0)
    return largest, octaves, np.logical_not(np.isfinite(groups).all(axis=-1))


def _steps(octaves: Array, is_marked: Array) -> Array:
    """The step of each group, in octaves."""
    exact = octaves / np.where(is_marked, 509, 510)
    rounded = exact.astype(ml_dtypes.bfloat16)
    next_up = (rounded.view(np.uint16) + np.uint16(1)).view(ml_dtypes.bfloat16)
    rounded_up = np.where(rounded.astype(float) < exact, next_up, rounded).astype(float)
    steps: Array = np.minimum(rounded_up, _MAX_STEP)
    return steps


def _grid(codes: Array | int, largest: Array, step: Array, top: Array) -> Array:
    """The magnitude of a code from 1 to `top`."""
    magnitudes: Array = largest * 2.0 ** ((codes - top) * step)
    return magnitudes


def _bits(values: Array) -> Array:
    """The bits of values that a bfloat16 holds exactly: uint16, of the same shape."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
