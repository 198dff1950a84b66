"""The device arithmetic of cuda_src/common/logfmt.cuh against that of the host, which differs in log2 and exp2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.logfmt import ROWS, assert_within_bound, codes_of, words_of
from helpers.nvrtc import compile_cubin, needs_nvrtc

from epcomm import numerics

cupy = pytest.importorskip("cupy", reason="optional package cupy is not installed (extra cuda12 or cuda13)")
pytestmark = [needs_nvrtc, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no GPU")]

SOURCE = r"""
#include <cuda_bf16.h>
#include "common/logfmt.cuh"
using namespace epcomm;

// A warp has a row, two groups at a time; the last time there may be one only.
extern "C" __global__ void encode(const __nv_bfloat16* x, uint8_t* rows, int hidden) {
    uint8_t* row = rows + blockIdx.x * static_cast<size_t>(logfmt_row_bytes(hidden));
    const int lane = threadIdx.x % kLogfmtLanes;
    for (int first = 0; first < hidden / kLogfmtBlock; first += 2) {
        const int group = first + threadIdx.x / kLogfmtLanes;
        const bool has_group = group < hidden / kLogfmtBlock;
        float values[kLogfmtLane] = {};
        for (int i = 0; has_group && i < kLogfmtLane; ++i)
            values[i] = __bfloat162float(x[blockIdx.x * hidden + group * kLogfmtBlock + lane * kLogfmtLane + i]);
        const uint32_t word = logfmt_word(values);
        if (!has_group) continue;
        store_logfmt(row, group, encode_logfmt(values, word));
        if (lane == 0) *reinterpret_cast<uint32_t*>(row + logfmt_word_offset(hidden, group)) = word;
    }
}

extern "C" __global__ void decode(const uint8_t* rows, float* out, int hidden) {
    const uint8_t* row = rows + blockIdx.x * static_cast<size_t>(logfmt_row_bytes(hidden));
    const int lane = threadIdx.x % kLogfmtLanes;
    for (int group = threadIdx.x / kLogfmtLanes; group < hidden / kLogfmtBlock; group += 2) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(row + logfmt_word_offset(hidden, group));
        float values[kLogfmtLane];
        decode_logfmt(load_logfmt(row, group), word, values);
        for (int i = 0; i < kLogfmtLane; ++i)
            out[blockIdx.x * hidden + group * kLogfmtBlock + lane * kLogfmtLane + i] = values[i];
    }
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cubin: Path = tmp_path_factory.mktemp("cubin") / "probe.cubin"
    cubin.write_bytes(compile_cubin(SOURCE, cupy.cuda.Device().compute_capability))
    return cupy.RawModule(path=str(cubin))


def device_encode(kernels: Any, x: np.ndarray) -> np.ndarray:
    num_rows, hidden = x.shape
    rows = cupy.zeros((num_rows, numerics.logfmt_row_bytes(hidden)), np.uint8)
    kernels.get_function("encode")((num_rows,), (32,), (cupy.asarray(x.view(np.uint16)), rows, np.int32(hidden)))
    return rows.get()


def device_decode(kernels: Any, rows: np.ndarray, hidden: int) -> np.ndarray:
    out = cupy.empty((len(rows), hidden), np.float32)
    kernels.get_function("decode")((len(rows),), (32,), (cupy.asarray(rows), out, np.int32(hidden)))
    return out.get()


@pytest.mark.parametrize("x", ROWS.values(), ids=ROWS)
def test_rows(kernels: Any, x: np.ndarray) -> None:
    hidden = x.shape[1]
    want, got = numerics.encode_logfmt(x), device_encode(kernels, x)
    same_word = words_of(got, hidden) == words_of(want, hidden)
    assert same_word.mean() > 0.99
    # The magnitude, the mark, and the step but for its last bit.
    assert np.abs(words_of(got, hidden).astype(np.int64) - words_of(want, hidden)).max() <= 1
    difference = (codes_of(got, hidden) - codes_of(want, hidden))[np.repeat(same_word, 128, axis=1)]
    assert np.abs(difference).max() <= 1
    assert (difference == 0).mean() > 0.99
    assert not got[:, hidden // 128 * 164 :].any()
    for rows in (want, got):
        values = device_decode(kernels, rows, hidden)
        np.testing.assert_allclose(values, numerics.decode_logfmt(rows, hidden), rtol=2e-6, atol=1e-44)
        assert_within_bound(values, x)


@pytest.mark.parametrize("hidden", [128, 256, 7168])
def test_sizes(kernels: Any, hidden: int) -> None:
    x = np.resize(ROWS["nan_and_inf"], (3, hidden))
    rows = device_encode(kernels, x)
    assert_within_bound(device_decode(kernels, rows, hidden), x)
    assert (words_of(rows, hidden) >> 16 == words_of(numerics.encode_logfmt(x), hidden) >> 16).all()


def test_magnitudes_keep_their_order(kernels: Any) -> None:
    bits = np.random.default_rng(4).integers(0, 0x7F80, (64, 128), dtype=np.uint16)
    bits[32:] = 0x3F80 + bits[32:] % 300  # within a factor of five
    x = np.sort(bits, axis=1).view(ROWS["normal"].dtype)
    got = device_decode(kernels, device_encode(kernels, x), 128)
    assert (np.diff(got, axis=1) >= 0).all()
    assert (got[:, -1] == x[:, -1]).all()
