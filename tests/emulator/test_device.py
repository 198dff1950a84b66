"""The emulator of `tests/emulator`: what a kernel that makes no mistake gets from it."""

from __future__ import annotations

import re
import threading

import ml_dtypes
import numpy as np
import pytest
from emulator.compiler import DEVICE, CompilationFailed, compile_text
from helpers.emulation import Emulated, needs_compiler

from epcomm.jit.source import cuda_src_dir
from epcomm.kernels import INTERNODE_PROGRAMS, PROGRAMS

pytestmark = [needs_compiler, pytest.mark.slow]


def ints(*shape: int) -> np.ndarray:
    return np.full(shape, -1, np.int32)


# -- the twins ----------------------------------------------------------------------------------------------------


def declared(text: str) -> set[tuple[str, tuple[str, ...]]]:
    """Functions of a header: name and types of the parameters."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r",\s*(emulator::)?Where where = [\w:]+\(\)", "", text)
    text = text[text.index("namespace epcomm::ptx") :]
    found = re.findall(r"(?:__forceinline__|inline) [\w ]+?\b(\w+)\(([^()]*)\)\s*\{", text)
    return {(name, tuple(re.findall(r"(.*?)\s*\b\w+(?:,\s*|$)", parameters))) for name, parameters in found}


@pytest.mark.parametrize("name", sorted(path.name for path in (cuda_src_dir() / "ptx").iterdir()))
def test_the_twins_declare_what_the_kernels_have(name):
    real = declared((cuda_src_dir() / "ptx" / name).read_text())
    assert real
    assert declared((DEVICE / "ptx" / name).read_text()) == real


@pytest.mark.slow  # tests/cuda compiles all of it for sm_90
@pytest.mark.parametrize("program", [*PROGRAMS, *INTERNODE_PROGRAMS], ids=str)
def test_programs_compile_without_a_copy_engine(program):
    options = ["-arch=sm_80", *(f"-D{name}={value}" for name, value in program.defines), f"-I{cuda_src_dir()}"]
    text = (cuda_src_dir() / program.source).read_text()
    assert compile_text(text, program.source, options).startswith(b"\x7fELF")


# -- the compiler -------------------------------------------------------------------------------------------------


def test_errors_have_file_and_line():
    with pytest.raises(CompilationFailed, match=r"(?m)^kernels/probe\.cu\(2\): error: .*nope"):
        compile_text("\n__global__ void probe() { nope(); }\n", "kernels/probe.cu", ["-arch=sm_90"])
    with pytest.raises(CompilationFailed, match=r"(?m)^probe\.cu\(1\): error: .*__CUDA_ARCH__ 800|N 8"):
        compile_text("#if __CUDA_ARCH__ == 800 && N == 8\n#error N 8\n#endif", "probe.cu", ["-arch=sm_80", "-DN=8"])
    with pytest.raises(CompilationFailed, match="invalid value for --gpu-architecture"):
        compile_text("", "probe.cu", ["-arch=sm_12345"])


def test_parameters_and_bounds():
    program = Emulated(
        "struct alignas(16) Big { long long a; int b; };\n"
        'extern "C" __global__ void __launch_bounds__(2 * (64), 1) f(char a, const __grid_constant__ Big b, int c) {}\n'
        'extern "C" __global__ void g() {}'
    )
    assert program.value("f_max_threads") == 128
    assert program.value("g_max_threads") == 1024
    assert program.value("f_parameter_bytes") == 36
    assert program.value("g_parameter_count") == 0
    assert program.library.emulator_static_shared_bytes() == 0


# -- threads ------------------------------------------------------------------------------------------------------

THREADS = r"""
extern "C" __global__ void reverse(int* out) {
    extern __shared__ int turned[];
    __shared__ int total;
    turned[blockDim.x - 1 - threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    atomicAdd(&total, 1);
    const int odd = __syncthreads_count(threadIdx.x & 1);
    const int all = __syncthreads_and(threadIdx.x < 1024), any = __syncthreads_or(threadIdx.x == 1024);
    out[blockIdx.x * blockDim.x + threadIdx.x] =
        turned[threadIdx.x] + 10000 * (total == (int)blockDim.x && odd == (int)blockDim.x / 2 && all && !any);
}
// Two roles of two warps each, with a barrier of their own, at different speeds; the second half of the first exits.
#include "ptx/memory.cuh"
extern "C" __global__ void roles(int* out) {
    __shared__ int steps[2];
    const int role = threadIdx.x / 64;
    if (threadIdx.x % 64 == 0) steps[role] = 0;
    for (int i = 0; i < 3 + 4 * role; ++i) {
        epcomm::ptx::bar_sync(1 + role, 64);
        if (threadIdx.x % 64 == 0) ++steps[role];
    }
    epcomm::ptx::bar_sync(1 + role, 64);
    if (threadIdx.x < 32) return;
    __syncthreads();
    out[threadIdx.x] = steps[0] + 100 * steps[1];
}
extern "C" __global__ void tickets(int* counter, int* out) {
    out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}
// Each block waits for the one after it.
extern "C" __global__ void chain(unsigned* flags, int wait_for_next) {
    using namespace epcomm;
    if (blockIdx.x + 1 < gridDim.x || wait_for_next)
        while (ptx::ld_acquire_gpu(flags + blockIdx.x + 1) == 0) {}
    ptx::st_release_sys(flags + blockIdx.x, 1u);
}
"""


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_barriers(seed, monkeypatch):
    monkeypatch.setenv("EPCOMM_EMULATOR_SEED", seed)
    program, out = Emulated(THREADS), ints(3, 100)
    program.run("reverse", 3, 100, out, shared_bytes=400)
    assert (out == 10000 + np.arange(100)[::-1]).all()
    out = ints(128)
    program.run("roles", 1, 128, out)
    assert (out == np.where(np.arange(128) < 32, -1, 703)).all()


def test_a_seed_shuffles_threads(monkeypatch):
    program, orders = Emulated(THREADS), []
    for seed in ("0", "0", "1"):
        monkeypatch.setenv("EPCOMM_EMULATOR_SEED", seed)
        orders.append(ints(4 * 64))
        program.run("tickets", 4, 64, np.zeros(1, np.int32), orders[-1])
        assert sorted(orders[-1]) == list(range(4 * 64))
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()


def test_blocks_and_launches_wait_for_each_other():
    program, flags = Emulated(THREADS), np.zeros(18, np.uint32)
    first = threading.Thread(target=program.run, args=("chain", 8, 32, flags, 1))
    first.start()
    program.run("chain", 9, 32, flags[8:], 0)
    first.join()
    assert flags.tolist() == [1] * 17 + [0]


# -- warps --------------------------------------------------------------------------------------------------------

WARPS = r"""
extern "C" __global__ void shuffles(int* out) {
    const int lane = threadIdx.x;
    int* to = out + 8 * lane;
    to[0] = __shfl_sync(~0u, lane * 2, lane + 5);
    to[1] = __shfl_up_sync(~0u, lane, 3);
    to[2] = __shfl_down_sync(~0u, lane, 3, 8);
    to[3] = __shfl_xor_sync(~0u, lane, 17);
    to[4] = (int)__shfl_sync(~0u, 1ull << 40 | lane, lane, 16) + (int)(__shfl_sync(~0u, 1ull << 40, 0) >> 40);
    to[5] = __reduce_add_sync(~0u, lane) + __reduce_max_sync(~0u, -lane);
    to[6] = __match_any_sync(~0u, lane % 3);
    to[7] = __popc(__ballot_sync(~0u, lane % 3 == 0));
    to[7] += 100 * __any_sync(~0u, lane == 9) + 200 * __all_sync(~0u, lane < 9);
}
// Halves that go their own ways, and lanes that have gone.
extern "C" __global__ void divided(int* out) {
    const int lane = threadIdx.x;
    if (lane >= 24) return;
    int sum = 0;
    if (lane < 8) {
        for (int i = 0; i < 5; ++i) sum += __shfl_sync(0xffu, lane, i);
    } else {
        sum = __ballot_sync(0xffffff00u, lane & 1);
    }
    __syncwarp();
    out[lane] = sum;
}
extern "C" __global__ void bits(int* out) {
    const unsigned mask = 0x80012010u;
    out[0] = __fns(mask, 0, 1), out[1] = __fns(mask, 0, 4), out[2] = __fns(mask, 0, 5), out[3] = __fns(mask, 31, -2);
    out[4] = __ffs(mask), out[5] = __clz(mask >> 4), out[6] = min(7u, 9ull), out[7] = max(-1, 3u) == ~0u;
}
"""


def test_warp_operations():
    program, out, lane = Emulated(WARPS), ints(32, 8), np.arange(32)
    program.run("shuffles", 1, 32, out)
    inside = lane % 8 < 5
    match = [sum(1 << other for other in range(32) if other % 3 == i % 3) for i in range(32)]
    assert (out[:, 0] == (lane + 5) % 32 * 2).all()
    assert (out[:, 1] == np.where(lane < 3, lane, lane - 3)).all()
    assert (out[:, 2] == np.where(inside, lane + 3, lane)).all()
    assert (out[:, 3] == (lane ^ 17)).all()
    assert (out[:, 4] == lane + 1).all()
    assert (out[:, 5] == lane.sum()).all()
    assert out[:, 6].view(np.uint32).tolist() == match
    assert (out[:, 7] == 11 + 100).all()
    out = ints(32)
    program.run("divided", 1, 32, out)
    assert out.tolist() == [10] * 8 + [0xAAAA00] * 16 + [-1] * 8
    out = ints(8)
    program.run("bits", 1, 1, out)
    assert out.tolist() == [4, 31, -1, 16, 5, 4, 7, 1]


# -- arithmetic ---------------------------------------------------------------------------------------------------

NUMBERS = r"""
#include <cuda_fp8.h>
extern "C" __global__ void narrow(const float* x, unsigned short* out, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        out[4 * i] = __half_as_ushort(__float2half_rn(x[i]));
        out[4 * i + 1] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
        out[4 * i + 2] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3);
        out[4 * i + 3] = __nv_cvt_float_to_fp8(x[i], __NV_NOSAT, __NV_E5M2);
    }
}
extern "C" __global__ void widen(float* out) {
    for (int i = threadIdx.x; i < 1 << 16; i += blockDim.x) {
        out[3 * i] = __half2float(__ushort_as_half(i));
        out[3 * i + 1] = __bfloat162float(__ushort_as_bfloat16(i));
        out[3 * i + 2] = __half2float(__half(__nv_cvt_fp8_to_halfraw(i & 0xff, __NV_E4M3)));
    }
}
extern "C" __global__ void operations(const float* x, float* out) {
    out[0] = __fadd_rn(__fmul_rn(x[0], x[1]), x[2]);
    out[1] = __fmaf_rn(x[0], x[1], x[2]);
    out[2] = __fadd_rn(x[3], -x[3]);
    out[3] = __fmul_rn(x[4], 0.5f);
    out[4] = __fdiv_rn(x[0], 448.0f);
    out[5] = fmaxf(__uint_as_float(0x7fffffffu), 2.0f);
}
"""


def assert_same_numbers(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, and NaN where a NaN is wanted."""
    is_nan = np.isnan(want)
    bits = f"u{got.dtype.itemsize}"
    assert (np.isnan(got) == is_nan).all()
    assert (got.view(bits) == want.view(bits))[~is_nan].all()


def test_conversions():
    program, draw = Emulated(NUMBERS), np.random.default_rng(0)
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every_half = every_half[np.isfinite(every_half)]
    between = np.nextafter(every_half, np.float32(0)), (every_half[1:] + every_half[:-1]) / 2
    any_bits = draw.integers(0, 1 << 32, 100000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([448, 464, 465, np.inf, -np.inf], np.float32)
    x = np.concatenate([every_half, *between, every_half * np.float32(2.0**-9), any_bits, special])
    out = np.zeros((x.size, 4), np.uint16)
    program.run("narrow", 1, 32, x, out, x.size)
    with np.errstate(all="ignore"):
        assert_same_numbers(out[:, 0].copy().view(np.float16), x.astype(np.float16))
        assert_same_numbers(out[:, 1].copy().view(ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16))
        fp8 = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        assert_same_numbers(out[:, 2].astype(np.uint8).view(ml_dtypes.float8_e4m3fn), fp8)
        fp8 = x.astype(ml_dtypes.float8_e5m2)
        assert_same_numbers(out[:, 3].astype(np.uint8).view(ml_dtypes.float8_e5m2), fp8)
    assert set(out[np.isnan(x)].ravel()) == {0x7FFF, 0x7F}

    wide, every = np.zeros((1 << 16, 3), np.float32), np.arange(1 << 16, dtype=np.uint16)
    program.run("widen", 1, 32, wide)
    assert_same_numbers(wide[:, 0].copy(), every.view(np.float16).astype(np.float32))
    assert_same_numbers(wide[:, 1].copy(), every.view(ml_dtypes.bfloat16).astype(np.float32))
    fp8 = every.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert_same_numbers(wide[:, 2].copy(), fp8)


def test_roundings():
    x = np.array([1 + 2.0**-12, 1 + 2.0**-12, -1, np.inf, 2.0**-149 * 3], np.float32)
    out = np.zeros(6, np.float32)
    Emulated(NUMBERS).run("operations", 1, 1, x, out)
    assert out[0] == np.float32(x[0] * x[1]) - 1
    assert out[1] == np.float32(2.0**-11 + 2.0**-24)
    assert out[2:3].view(np.uint32)[0] == 0x7FFFFFFF
    assert out[3] == np.float32(2.0**-148)
    assert out[4] == x[0] / np.float32(448)
    assert out[5] == 2
