"""What the emulator must notice: every kernel here works, and stops working when one thing in it is left out."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.emulation import Emulated, needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]

SEEDS = ("0", "1", "2", "3")
BYTES = 256  # of a row


def messages(capfd: pytest.CaptureFixture[str], program: Emulated, *launch: object, shared_bytes: int = 0) -> str:
    """What a launch that fails says on stderr."""
    assert program.launch(*launch, shared_bytes=shared_bytes) != 0
    return capfd.readouterr().err


# -- bulk copies --------------------------------------------------------------------------------------------------

# One warp moves rows through two stages, and negates them on the way: by loads, ordinary accesses and stores.
COPIES = r"""
#include "ptx/bulk.cuh"
using namespace epcomm;
constexpr int kBytes = 256, kStages = 2;
extern "C" __global__ void negate(const int* from, int* to, int num_rows, int mistake) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ uint64_t barriers[kStages];
    const int lane = threadIdx.x;
    auto is = [&](Mistake which) { return mistake == which; };
    auto load = [&](int i) {
        if (lane != 0 || i >= num_rows) return;
        const long shift = is(misaligned) ? 4 : is(outside_of_shared_memory) ? 1l << 20 : 0;
        const int less = is(fewer_bytes_than_announced) ? 16 : is(no_multiple) ? 4 : is(empty) ? kBytes : 0;
        ptx::mbarrier_arrive_expect_tx(&barriers[i % kStages], kBytes);
        if (is(an_arrival_too_many)) ptx::mbarrier_arrive_expect_tx(&barriers[i % kStages], 0);
        ptx::bulk_load(stages + i % kStages * kBytes + shift, from + i * kBytes / 4, kBytes - less,
                       &barriers[i % kStages]);
    };
    if (lane < kStages) ptx::mbarrier_init(&barriers[lane], 1);
    if (!is(no_fence_after_init)) ptx::fence_mbarrier_init();
    if (is(a_second_init) && lane == 0) ptx::mbarrier_init(&barriers[0], 1);
    __syncwarp();
    load(0);
    for (int i = 0; i < num_rows; ++i) {
        if (is(one_group_too_many)) ptx::bulk_wait_read<1>();
        else if (!is(no_wait_before_a_stage_is_loaded_again)) ptx::bulk_wait_read<0>();
        __syncwarp();
        load(i + 1);
        const int parity = i / kStages & 1;
        if (!is(no_wait_for_a_load)) ptx::mbarrier_wait(&barriers[i % kStages], is(wait_for_the_wrong_phase) != parity);
        int* row = reinterpret_cast<int*>(stages + i % kStages * kBytes);
        for (int k = lane; k < kBytes / 4; k += 32) row[k] = -row[k];
        ptx::fence_proxy_async_shared();
        if (!is(store_before_all_have_written)) __syncwarp();
        if (lane == 0) ptx::bulk_store(to + i * kBytes / 4, row, kBytes);
        if (!is(no_commit)) ptx::bulk_commit();
        if (is(a_write_behind_the_store)) row[lane] = 0;
    }
    if (!is(no_wait_at_the_end)) ptx::bulk_wait_all();
}
"""
# What the emulator says of it; None: it does not know, but the result is wrong.
MISTAKES = {
    "no_wait_for_a_load": "more arrivals in a phase",
    "wait_for_the_wrong_phase": "more arrivals in a phase",
    "no_wait_before_a_stage_is_loaded_again": "written to before the store had read it",
    "one_group_too_many": "written to before the store had read it",
    "store_before_all_have_written": None,
    "a_write_behind_the_store": "written to before the store had read it",
    "no_wait_at_the_end": "ends without a wait for its bulk store",
    "no_commit": "ends without a wait for its bulk store",
    "no_fence_after_init": "no fence_mbarrier_init",
    "a_second_init": "there is an mbarrier .* already",
    "an_arrival_too_many": "more arrivals in a phase",
    "misaligned": "want multiples of 16",
    "fewer_bytes_than_announced": r"waits for ever:\n.* wait at mbarrier_wait",
    "no_multiple": "of 252 bytes: want a multiple of 16",
    "empty": "of 0 bytes: want a multiple of 16",
    "outside_of_shared_memory": "not in shared memory",
}
NUM_ROWS = 9


def negate(num_rows: int, mistake: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(status, what it has written, what it should)."""
    rows = np.random.default_rng(0).integers(1, 1 << 30, (NUM_ROWS, BYTES // 4)).astype(np.int32)
    out, want = np.zeros_like(rows), -rows
    want[num_rows:] = 0
    program = Emulated(f"enum Mistake {{ none, {', '.join(MISTAKES)} }};\n{COPIES}")
    return program.launch("negate", 1, 32, rows, out, num_rows, mistake, shared_bytes=2 * BYTES), out, want


@pytest.mark.parametrize("seed", SEEDS)
def test_copies(seed, monkeypatch):
    monkeypatch.setenv("EPCOMM_EMULATOR_SEED", seed)
    for num_rows in range(1, NUM_ROWS + 1):
        status, out, want = negate(num_rows, 0)
        assert status == 0
        assert (out == want).all()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_with_copies(name, capfd):
    status, out, want = negate(NUM_ROWS, 1 + list(MISTAKES).index(name))
    if (message := MISTAKES[name]) is None:
        assert (out != want).any()
    else:
        said = capfd.readouterr().err
        assert status != 0
        assert re.search(f"^epcomm emulator: negate: block 0[ ,].*{message}", said, re.DOTALL), said


# -- copies of single threads -------------------------------------------------------------------------------------

# Each thread moves its 16 bytes of rows through a ring of two stages.
ASYNC_COPIES = r"""
#include "ptx/async.cuh"
using namespace epcomm;
extern "C" __global__ void forward(int4* from, int4* to, int num_rows, int mistake) {
    extern __shared__ __align__(16) int4 ring[];
    const int lane = threadIdx.x;
    auto is = [&](Mistake which) { return mistake == which; };
    auto load = [&](int i) {
        const long shift = is(misaligned) ? 4 : is(outside_of_shared_memory) ? 1l << 20 : 0;
        const int4* row = is(behind_the_end) && i == num_rows ? nullptr : from + i * 32 + lane;
        const bool is_there = i < num_rows || is(behind_the_end);
        ptx::async_copy(ptx::shared_address(ring + i % 2 * 32 + lane) + shift, row, is_there);
        if (!is(no_commit) || i == 0) ptx::async_commit();
    };
    load(0);
    for (int i = 0; i < num_rows; ++i) {
        load(i + 1);
        if (is(one_group_too_many)) ptx::async_wait<2>();
        else if (!is(no_wait)) ptx::async_wait<1>();
        if (is(a_write_to_the_stage)) ring[(i + 1) % 2 * 32 + lane].x = 1;
        if (is(a_write_to_the_source) && i + 1 < num_rows) from[(i + 1) * 32 + lane].x = 1;
        if (is(a_stage_of_another)) to[i * 32 + lane] = ring[(i + 1) % 2 * 32 + lane];
        else to[i * 32 + lane] = ring[i % 2 * 32 + lane];
    }
    if (!is(no_wait_at_the_end)) ptx::async_wait<0>();
}
"""
ASYNC_MISTAKES = {
    "no_wait": None,
    "one_group_too_many": None,
    "no_commit": None,
    "a_stage_of_another": None,
    "a_write_to_the_stage": "was written to while a load .* was under way to it",
    "a_write_to_the_source": None,
    "no_wait_at_the_end": "ends without a wait for its async_copy",
    "misaligned": "outside, or not aligned",
    "behind_the_end": "illegal address",
    "outside_of_shared_memory": "outside, or not aligned",
}


def forward(mistake: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(status, what it has written, what it should)."""
    rows = np.random.default_rng(0).integers(1, 1 << 30, (NUM_ROWS, 128)).astype(np.int32)
    out, want = np.zeros_like(rows), rows.copy()
    program = Emulated(f"enum Mistake {{ none, {', '.join(ASYNC_MISTAKES)} }};\n{ASYNC_COPIES}")
    return program.launch("forward", 1, 32, rows, out, NUM_ROWS, mistake, shared_bytes=1024), out, want


@pytest.mark.parametrize("seed", SEEDS)
def test_async_copies(seed, monkeypatch):
    monkeypatch.setenv("EPCOMM_EMULATOR_SEED", seed)
    status, out, want = forward(0)
    assert status == 0
    assert (out == want).all()


@pytest.mark.parametrize("name", ASYNC_MISTAKES)
def test_mistakes_with_async_copies(name, capfd):
    status, out, want = forward(1 + list(ASYNC_MISTAKES).index(name))
    if (message := ASYNC_MISTAKES[name]) is None:
        assert (out != want).any()
    else:
        said = capfd.readouterr().err
        assert status != 0
        assert re.search(f"^epcomm emulator: forward: block 0[ ,].*{message}", said, re.DOTALL), said


# -- threads that wait for ever, or where they must not be --------------------------------------------------------

WAITS = r"""
#include "ptx/memory.cuh"
extern "C" __global__ void half_sync(int* out) {
    if (threadIdx.x < 40) { epcomm::ptx::bar_sync(3, 64); } else if (threadIdx.x < 64) { __syncwarp(); }
    *out = 1;
}
extern "C" __global__ void skipped(int* out) {
    if (threadIdx.x < 32) { epcomm::ptx::bar_sync(1, 128); }
    __syncthreads();
    *out = 1;
}
extern "C" __global__ void divided(int* out) {
    if (threadIdx.x & 1) { __syncthreads(); }
    else                 { __syncthreads(); }
    *out = 1;
}
extern "C" __global__ void mixed(int* out) {
    if (threadIdx.x < 7) { __ballot_sync(~0u, 1); } else { __shfl_sync(~0u, 1, 0); }
    *out = 1;
}
extern "C" __global__ void stranger(int* out) { *out = __ballot_sync(0x7fffffffu, 1); }
extern "C" __global__ void absent(int* out) {
    if (threadIdx.x == 31) return;
    *out = __shfl_sync(~0u, 1, 31);
}
extern "C" __global__ void trap(int* out) {
    if (blockIdx.x == 1 && threadIdx.x == 5) __trap();
    __syncthreads();
    *out = 1;
}
"""
WAITING = {
    "half_sync": r"40 threads, the first one 0, wait at bar_sync \(probe.cu:4\)\n"
    r"  24 threads, the first one 40, wait at __syncwarp \(probe.cu:4\)\n  64 threads, the first one 64, have ended",
    "skipped": r"block 0 waits for ever:\n  32 threads, the first one 0, wait at bar_sync \(probe.cu:8\)"
    r"\n  96 threads, the first one 32, wait at __syncthreads \(probe.cu:9\)",
    "divided": r"__syncthreads \(probe.cu:13\), while a lane .* waits at __syncthreads \(probe.cu:14\)",
    "mixed": r"__shfl_sync of lanes ffffffff \(probe.cu:18\), while lanes 0000007f .* __ballot_sync of lanes ffffffff",
    "stranger": r"thread 31: __ballot_sync \(probe.cu:21\): lane 31 is not in the mask 7fffffff",
    "absent": r"__shfl_sync: lane 0 reads lane 31, which does not take part",
    "trap": r"block 1, thread 5: __trap",
}


@pytest.mark.parametrize("entry", WAITING)
def test_mistakes_with_barriers(entry, capfd):
    message = messages(capfd, Emulated(WAITS), entry, 2, 128, np.zeros(1, np.int32))
    assert re.search(WAITING[entry], message, re.DOTALL), message


# -- memory -------------------------------------------------------------------------------------------------------

MEMORY = r"""
#include "ptx/memory.cuh"
extern "C" __global__ void uninitialised(int* out) {
    extern __shared__ int dynamic[];
    __shared__ int variable;
    out[0] = dynamic[threadIdx.x];
    out[1] = variable;
}
extern "C" __global__ void outside(int* out, int at) {
    extern __shared__ int dynamic[];
    __shared__ volatile int variable[3];
    if (threadIdx.x == 0) dynamic[at] = 1, variable[2 - at] = 1;
}
extern "C" __global__ void strange_address(int* out) { *out = epcomm::ptx::shared_address(out); }
extern "C" __global__ void unaligned(int* out) {
    extern __shared__ int dynamic[];
    *out = epcomm::ptx::ld_shared(epcomm::ptx::shared_address(dynamic + 1)).x;
}
extern "C" __global__ void illegal(int* out) {
    __syncthreads();
    if (threadIdx.x == 3) *reinterpret_cast<int*>(64) = 1;
}
__device__ __noinline__ int deep(int n) {
    volatile int here[256];
    here[n % 256] = n;
    return n == 0 ? 0 : deep(n - 1) + here[n % 256];
}
extern "C" __global__ void recursive(int* out, int n) { *out = deep(n); }
"""


def test_shared_memory_starts_with_a_pattern():
    out = np.zeros(2, np.uint32)
    for _ in range(2):
        Emulated(MEMORY).run("uninitialised", 1, 32, out, shared_bytes=128)
        assert out.tolist() == [0xCDCDCDCD] * 2


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        ("outside", [32], "the block has written behind its dynamic shared memory"),
        ("outside", [-1], "the block has written before its dynamic shared memory|behind its static"),
        ("strange_address", [], "is no address of shared memory"),
        ("unaligned", [], "16 bytes at 0x404 of shared memory: outside, or not aligned"),
        ("illegal", [], "block 0, thread 3: illegal address 0x40"),
        ("recursive", [1000], "block 0, thread 0: the stack is full"),
    ],
)
def test_mistakes_with_memory(entry, arguments, message, capfd):
    program, out = Emulated(MEMORY), np.zeros(2, np.int32)
    got = messages(capfd, program, entry, 1, 32, out, *arguments, shared_bytes=128)
    assert re.search(message, got), got
    program.run("recursive", 4, 256, out, 10)  # the process goes on
    assert out[0] == 55


def test_launches_that_are_refused(capfd):
    program, out = Emulated(MEMORY), np.zeros(2, np.int32)
    assert "1 blocks of 1025 threads" in messages(capfd, program, "uninitialised", 1, 1025, out)
    assert "bytes of dynamic shared memory" in messages(
        capfd, program, "uninitialised", 1, 32, out, shared_bytes=1 << 20
    )
