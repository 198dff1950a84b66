"""Rows to bring into LogFMT, and the check of what comes back of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm import reference

__all__ = ["ROWS", "assert_within_bound", "codes_of", "words_of"]

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN = 640  # five groups: their words do not fill a multiple of 16 bytes


def _rows() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shape = (64, HIDDEN)
    normal = rng.standard_normal(shape)
    every = np.resize(np.arange(1 << 16, dtype=np.uint16), (103, HIDDEN))
    finite = every & 0xFF7F  # no exponent of ones
    made = {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, shape),
        "outliers": normal * np.where(rng.random(shape) < 0.01, 1e4, 1),
        "many_octaves": normal * np.exp2(rng.integers(-20, 20, shape)),
        "few_octaves": rng.uniform(1, 1.1, shape) * rng.choice([-1, 1], shape),
        "one_magnitude": 3.0 * rng.choice([-1, 1], shape),
        "mostly_zeros": normal * (rng.random(shape) < 0.1),
        "signed_zeros": 0.0 * normal,
        "huge": normal * 1e38,
        "tiny": normal * 1e-37,
        "one_tiny_value": np.where(np.arange(HIDDEN) % 128 == 5, 1e-30, normal),
        "nan_and_inf": np.where(rng.random(shape) < 0.02, rng.choice([np.nan, np.inf, -np.inf], shape), normal),
        "nan_alone": np.full(shape, np.nan),
        "inf_and_zeros": np.where(rng.random(shape) < 0.5, np.inf, -0.0),
    }
    with np.errstate(over="ignore"):
        rows = {name: values.astype(BF16) for name, values in made.items()}
    rows["subnormal"] = rng.integers(0, 128, shape).astype(np.uint16).view(BF16)
    rows["every_value"] = every.view(BF16)
    rows["every_value_shuffled"] = rng.permutation(every.reshape(-1)).reshape(every.shape).view(BF16)
    rows["every_finite_value_shuffled"] = rng.permutation(finite.reshape(-1)).reshape(every.shape).view(BF16)
    return rows


ROWS = _rows()


def codes_of(rows: Array, hidden: int) -> Array:
    """The 10 bits of every channel: int64 ``[num_rows, hidden]``."""
    blocks = rows[:, : hidden // 128 * 160].reshape(len(rows), -1, 160)
    high = np.unpackbits(blocks[..., 128:], axis=-1, bitorder="little").reshape(*blocks.shape[:-1], 128, 2)
    return (blocks[..., :128] + high.astype(np.int64) @ [256, 512]).reshape(len(rows), hidden)


def words_of(rows: Array, hidden: int) -> Array:
    """The word of every group: uint32 ``[num_rows, hidden / 128]``."""
    first = hidden // 128 * 160
    return np.ascontiguousarray(rows[:, first : first + hidden // 128 * 4]).view("<u4")


def assert_within_bound(got: Array, x: Array, what: str = "") -> None:
    """`got`, what came back of x, is near enough to it; NaN and Inf are what they were."""
    assert got.dtype == np.float32
    with np.errstate(invalid="ignore"):  # signalling NaN
        wanted, is_finite = x.astype(np.float64), np.isfinite(x)
    np.testing.assert_array_equal(got[~is_finite], wanted[~is_finite], what)
    got, wanted, bound = got[is_finite], wanted[is_finite], reference.logfmt_bound(x)[is_finite]
    error = np.abs(got - wanted)
    if error.size:
        worst = np.argmax(error - bound)
        assert error[worst] <= bound[worst], (what, wanted[worst], got[worst], bound[worst])
    assert (np.signbit(got) == (np.signbit(wanted) & (got != 0))).all(), f"{what}: signs"
