"""The formats that rows travel in, other than their own."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from epcomm.errors import InputError, ShapeError
from epcomm.reference.checks import Array, ieee_754

__all__ = ["cast_fp8"]


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
