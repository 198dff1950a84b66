"""LogFMT: the oracle by hand and by search, the host's arithmetic against the oracle, and the bounds of both."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from helpers.logfmt import ROWS, assert_within_bound, codes_of, words_of
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm import numerics, reference
from epcomm.errors import ShapeError
from epcomm.testing import calc_diff

BF16 = np.dtype(ml_dtypes.bfloat16)
SIGN = 512

all_rows = pytest.mark.parametrize("x", ROWS.values(), ids=ROWS)


def group(*values: float) -> np.ndarray:
    """A row of one group that starts with `values`; zeros behind."""
    with np.errstate(invalid="ignore"):
        return np.array([[*values, *[0.0] * (128 - len(values))]], np.float32).astype(BF16)


def encoded(*values: float) -> tuple[list[int], int]:
    """Codes of `values` in a group of their own, and its word, on which the oracle and the host agree."""
    x = group(*values)
    rows = reference.encode_logfmt(x)
    assert numerics.encode_logfmt(x).tobytes() == rows.tobytes()
    assert not codes_of(rows, 128)[0, len(values) :].any()
    return codes_of(rows, 128)[0, : len(values)].tolist(), int(words_of(rows, 128)[0, 0])


class TestByHand:
    def test_steps_of_a_32nd_octave(self):
        codes, word = encoded(1, 0.5, -0.25, 2.0**-15, 2.0**-16, -(2.0**-17), 1e-30, 0.0, -0.0)
        assert word == 0x3F80_3D00  # 1.0 and 1 / 32
        # grid(1) is 2^-15.94: 2^-16 is nearer to it than to zero, 2^-17 is not.
        assert codes == [511, 511 - 32, SIGN | 511 - 64, 511 - 15 * 32, 1, 0, 0, 0, 0]

    def test_the_smallest_magnitude_is_on_the_grid(self):
        codes, word = encoded(-8, 1)
        assert word >> 16 == 0x4100  # 8.0
        step = float(np.uint16(word & 0xFFFF).view(BF16))
        assert 3 / 510 <= step < 3 / 510 * (1 + 2**-7)
        assert codes == [SIGN | 511, 511 - round(3 / step)]
        assert codes[1] in range(1, 6)

    def test_one_magnitude_is_exact(self):
        codes, word = encoded(-3, 3, 0)
        assert (codes, word) == ([SIGN | 511, 511, 0], 0x4040_0000)
        assert reference.decode_logfmt(reference.encode_logfmt(group(-3, 3)), 128)[0, :3].tolist() == [-3, 3, 0]

    def test_zeros(self):
        assert encoded() == ([], 0)

    def test_nan_and_infinities(self):
        codes, word = encoded(np.nan, np.inf, -np.inf, 1, 0.5, -1e-30)
        assert word == 0xBF80_3D00
        assert codes == [SIGN, 511, SIGN | 511, 510, 510 - 32, 0]
        assert encoded(-np.inf, 0) == ([SIGN | 511, 0], 0x8000_0000)

    def test_the_layout_of_a_row(self):
        x = np.concatenate([group(1, 0.5, -0.25, 1e-30), group(0, -2), group(4), group(), group()], axis=1)
        for encode in (reference.encode_logfmt, numerics.encode_logfmt):
            row = encode(x)[0]
            assert row.shape == (5 * 160 + 32,)
            assert row[:4].tolist() == [0xFF, 479 & 0xFF, 447 & 0xFF, 0]
            assert row[128:160].tolist() == [0b00_11_01_01, *[0] * 31]
            assert row[160:162].tolist() == [0, 0xFF]
            assert row[288] == 0b00_00_11_00
            assert row[800:816].tobytes() == np.array([0x3F803D00, 0x40000000, 0x40800000, 0], "<u4").tobytes()
            assert not row[816:].any()

    @pytest.mark.parametrize(("hidden", "wanted"), [(128, 176), (512, 656), (640, 832), (7168, 9184)])
    def test_bytes_of_a_row(self, hidden, wanted):
        assert numerics.logfmt_row_bytes(hidden) == wanted
        for num_rows in (0, 2):
            x = np.ones((num_rows, hidden), BF16)
            for module in (reference, numerics):
                rows = module.encode_logfmt(x)
                assert (rows.shape, rows.dtype) == ((num_rows, wanted), np.uint8)
                assert module.decode_logfmt(rows, hidden).shape == x.shape

    def test_hidden_must_be_a_multiple_of_128(self):
        for function in (reference.encode_logfmt, reference.logfmt_bound):
            with pytest.raises(ShapeError, match="multiple of 128"):
                function(np.ones((1, 192), BF16))

    def test_leading_axes(self):
        x = ROWS["normal"][:6].reshape(2, 3, -1)
        rows = reference.encode_logfmt(x)
        assert rows.shape == (2, 3, 832)
        assert (rows.reshape(6, -1) == reference.encode_logfmt(x.reshape(6, -1))).all()
        assert reference.decode_logfmt(rows, 640).shape == reference.logfmt_bound(x).shape == x.shape


def nearest_code(magnitude: float, grid: list[float]) -> int:
    """By search; ``grid[0]`` is code 1."""
    if magnitude <= grid[0] / 2:
        return 0
    return 1 + min(range(len(grid)), key=lambda i: abs(math.log2(grid[i]) - math.log2(magnitude)))


@pytest.mark.parametrize("name", ["normal", "outliers", "few_octaves", "mostly_zeros", "nan_and_inf", "tiny"])
def test_the_oracle_against_a_search(name):
    x = ROWS[name][:2]
    rows = reference.encode_logfmt(x)
    codes = codes_of(rows, x.shape[1]).reshape(-1, 128)
    for values, got, word in zip(
        x.astype(float).reshape(-1, 128).tolist(), codes.tolist(), words_of(rows, x.shape[1]).reshape(-1), strict=True
    ):
        finite = [abs(value) for value in values if math.isfinite(value)]
        top = 511 if len(finite) == 128 else 510
        octaves = math.log2(max(finite)) - math.log2(min(value for value in finite if value))
        step = float(np.uint16(word & 0xFFFF).view(BF16))
        assert step == 1 / 32 or 1 <= step * (top - 1) / octaves <= 1 + 2**-7
        grid = [max(finite) * 2.0 ** ((code - top) * step) for code in range(1, top + 1)]
        for value, code in zip(values, got, strict=True):
            if math.isfinite(value):
                wanted = nearest_code(abs(value), grid)
                assert code == (wanted | SIGN if value < 0 and wanted else wanted)


@all_rows
def test_the_host_against_the_oracle(x):
    hidden = x.shape[1]
    want, got = reference.encode_logfmt(x), numerics.encode_logfmt(x)
    assert (words_of(got, hidden) == words_of(want, hidden)).mean() > 0.99
    same = np.repeat(words_of(got, hidden) == words_of(want, hidden), 128, axis=1)
    difference = (codes_of(got, hidden) - codes_of(want, hidden))[same]
    assert np.abs(difference).max() <= 1  # where a logarithm lies between two
    assert (difference == 0).mean() > 0.999
    assert not got[:, hidden // 128 * 164 :].any()
    for rows in (want, got):
        values = reference.decode_logfmt(rows, hidden)
        np.testing.assert_allclose(numerics.decode_logfmt(rows, hidden), values, rtol=2e-6, atol=1e-44)


@all_rows
@pytest.mark.parametrize("module", [reference, numerics], ids=["oracle", "host"])
def test_values_come_back_within_the_bound(x, module):
    assert_within_bound(module.decode_logfmt(module.encode_logfmt(x), x.shape[1]), x)


@all_rows
def test_the_bound_is_what_the_constants_say(x):
    with np.errstate(invalid="ignore"):
        magnitudes = np.where(np.isfinite(x), np.abs(x.astype(np.float64)), 0)
    largest = np.repeat(magnitudes.reshape(len(x), -1, 128).max(axis=-1), 128, axis=1)
    constants = np.maximum(magnitudes * reference.LOGFMT_RELATIVE_ERROR, largest * reference.LOGFMT_FLOOR)
    assert (reference.logfmt_bound(x) <= constants).all()


def test_the_bounds_are_reached():
    for name in ("normal", "uniform", "many_octaves"):
        x = ROWS[name]
        error = np.abs(numerics.decode_logfmt(numerics.encode_logfmt(x), x.shape[1]) - x.astype(np.float64))
        assert (error / reference.logfmt_bound(x)).max() > 0.98
    step = reference.LOGFMT_RELATIVE_ERROR - (2 ** (1 / 64) - 1)
    assert 0 < step < 2e-4


def test_calc_diff_of_normal_data():
    x = np.random.default_rng(3).standard_normal((256, 7168)).astype(BF16)
    diff = calc_diff(numerics.decode_logfmt(numerics.encode_logfmt(x), 7168), x.astype(np.float32))
    assert reference.LOGFMT_CALC_DIFF / 4 < diff < reference.LOGFMT_CALC_DIFF


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 0x7F7F), st.integers(1, 0x7F80))
def test_magnitudes_keep_their_order(seed, first, span):
    """Of values whose bits are between two numbers."""
    bits = np.random.default_rng(seed).integers(first, min(first + span, 0x7F80), (1, 128), dtype=np.uint16)
    x = np.sort(bits).view(BF16)
    got = numerics.decode_logfmt(numerics.encode_logfmt(x), 128)
    assert_within_bound(got, x)
    assert (np.diff(got) >= 0).all()
    assert got[0, -1] == x[0, -1]
