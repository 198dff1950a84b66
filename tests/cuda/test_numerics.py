"""The device arithmetic of cuda_src/common/numerics.cuh against the oracle, bit for bit, on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.nvrtc import compile_cubin, needs_nvrtc

from epcomm import reference
from epcomm.testing import assert_bitwise

cupy = pytest.importorskip("cupy", reason="optional package cupy is not installed (extra cuda12 or cuda13)")
pytestmark = [needs_nvrtc, pytest.mark.skipif(not cupy.cuda.is_available(), reason="no GPU")]

SOURCE = r"""
#include "common/numerics.cuh"
using namespace epcomm;

// One block casts one row's block of 128 channels.
extern "C" __global__ void cast(const __nv_bfloat16* x, unsigned char* q, float* scales, unsigned int* exponents,
                                int pow2) {
    __shared__ float magnitude[kFp8Block];
    const int i = blockIdx.x * kFp8Block + threadIdx.x;
    const float value = __bfloat162float(x[i]);
    magnitude[threadIdx.x] = fabsf(value);
    __syncthreads();
    float amax = 0.0f;
    for (int k = 0; k < kFp8Block; ++k) amax = fmaxf(amax, magnitude[k]);
    const Fp8Scale s = pow2 ? fp8_scale_pow2(amax) : fp8_scale(amax);
    q[i] = to_e4m3(value, s.factor);
    if (threadIdx.x == 0) { scales[blockIdx.x] = s.scale; exponents[blockIdx.x] = s.exponent; }
}

// rows is [terms, n]; with weights: the low-latency sum, without: the combine.
template <typename T> __device__ void sum(const T* rows, const float* weights, T* out, int terms, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float acc = 0.0f;
    for (int t = 0; t < terms; ++t) {
        const float x = static_cast<float>(rows[t * n + i]);
        acc = weights ? accumulate_weighted(acc, weights[t], x) : accumulate(acc, x);
    }
    out[i] = round_to<T>(acc);
}
extern "C" __global__ void sum_bf16(const __nv_bfloat16* r, const float* w, __nv_bfloat16* o, int t, int n) {
    sum(r, w, o, t, n);
}
extern "C" __global__ void sum_fp16(const __half* r, const float* w, __half* o, int t, int n) { sum(r, w, o, t, n); }
extern "C" __global__ void sum_fp32(const float* r, const float* w, float* o, int t, int n) { sum(r, w, o, t, n); }
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cubin: Path = tmp_path_factory.mktemp("cubin") / "probe.cubin"
    cubin.write_bytes(compile_cubin(SOURCE, cupy.cuda.Device().compute_capability))
    return cupy.RawModule(path=str(cubin))


def every_bfloat16() -> np.ndarray:
    """All 65536 bit patterns, each block of 128 one exponent and sign; then shuffled so that blocks mix."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    return np.concatenate([bits, np.random.default_rng(0).permutation(bits)]).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("round_scale", [False, True], ids=["scale", "power_of_two"])
def test_fp8_cast(kernels: Any, round_scale: bool) -> None:
    x = every_bfloat16().reshape(1, -1)
    want_q, want_scales = reference.cast_fp8(x, round_scale=round_scale)
    num_blocks = x.size // 128
    q, scales = cupy.empty(x.size, np.uint8), cupy.empty(num_blocks, np.float32)
    exponents = cupy.empty(num_blocks, np.uint32)
    bits = cupy.asarray(x.view(np.uint16))
    kernels.get_function("cast")((num_blocks,), (128,), (bits, q, scales, exponents, np.int32(round_scale)))
    assert_bitwise(q.get().view(ml_dtypes.float8_e4m3fn).reshape(x.shape), want_q)
    assert_bitwise(scales.get().reshape(want_scales.shape), want_scales)
    if round_scale:
        _, packed = reference.cast_fp8(x, round_scale=True, use_ue8m0=True)
        assert_bitwise(exponents.get().astype(np.uint8), packed.view(np.uint8).reshape(-1)[:num_blocks])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
def test_sums(kernels: Any, dtype: Any, weighted: bool) -> None:
    terms, n = 8, 4096
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << (8 * np.dtype(dtype).itemsize), (terms, n), dtype=np.uint64)
    rows = bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)  # every kind of value, subnormals and NaN included
    weights = rng.standard_normal(terms).astype(np.float32)
    acc = np.zeros(n, np.float32)
    with np.errstate(all="ignore"):
        for weight, row in zip(weights, rows.astype(np.float32), strict=True):
            acc = acc + (weight * row if weighted else row)
        want = acc.astype(dtype)
    name = {2: "bf16" if dtype is ml_dtypes.bfloat16 else "fp16", 4: "fp32"}[np.dtype(dtype).itemsize]
    out = cupy.empty(n, f"u{np.dtype(dtype).itemsize}")
    arguments = (cupy.asarray(rows.view(out.dtype)), cupy.asarray(weights) if weighted else np.uint64(0), out)
    kernels.get_function(f"sum_{name}")((n // 128,), (128,), (*arguments, np.int32(terms), np.int32(n)))
    assert_bitwise(out.get().view(dtype), want)
