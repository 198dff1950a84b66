"""NVSHMEM of the emulator, with one PE: what arrives, and that it arrives as late as a network may deliver it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator.compiler import DEVICE
from helpers.emulated_nvshmem import State
from helpers.emulation import Emulated, needs_compiler

from epcomm.jit.source import cuda_src_dir

pytestmark = [needs_compiler, pytest.mark.slow]

WORDS = 256
ROUNDS = 200
MISTAKES = ("none", "source_used_again", "no_fence", "no_quiet", "outside", "no_such_pe")

PROGRAM = (
    f"enum Mistake {{ {', '.join(MISTAKES)} }};\nconstexpr int kWords = {WORDS};\n"
    + r"""
#include "ptx/memory.cuh"
#include "transport/nvshmem.cuh"
using namespace epcomm;

// One warp. The heap: {arrived, word, signal, quiet}, what arrives, what is sent.
extern "C" __global__ void rounds(uint64_t* heap, unsigned* num_wrong, int num_rounds, int mistake, int by_block) {
    const int lane = threadIdx.x;
    uint64_t *to = heap + 16, *from = to + kWords;
    const int pe = mistake == no_such_pe ? nvshmem::num_pes() : nvshmem::my_pe();
    for (uint64_t round = 1; round <= num_rounds; ++round) {
        for (int i = lane; i < kWords; i += kWarp) from[i] = round << 32 | i;
        const uint64_t num_bytes = mistake == outside ? 1ull << 32 : kWords * 8;
        if (by_block) nvshmem::put_signal_block(to, from, num_bytes, heap, round, pe);
        else nvshmem::put_signal(to, from, num_bytes, heap, round, pe);
        if (mistake == source_used_again) for (int i = lane; i < kWords; i += kWarp) from[i] = 0;
        if (lane == 0) while (ptx::ld_acquire_sys(heap) < round) {}
        __syncwarp();
        for (int i = lane; i < kWords; i += kWarp) if (to[i] != (round << 32 | i)) atomicAdd(num_wrong, 1u);
        if (lane == 0) {
            nvshmem::put_word(heap + 1, round, pe);
            if (mistake != no_fence) nvshmem::fence();
            nvshmem::set_signal(heap + 2, round, pe);
            while (ptx::ld_acquire_sys(heap + 2) < round) {}
            if (ptx::ld_acquire_sys(heap + 1) != round) atomicAdd(num_wrong, 1u);
            nvshmem::put_word(heap + 3, round, pe);
            if (mistake != no_quiet) nvshmem::quiet();
            if (ptx::ld_acquire_sys(heap + 3) != round) atomicAdd(num_wrong, 1u);
            nvshmem::quiet();
        }
        __syncwarp();
    }
}
"""
)


@pytest.fixture
def program():
    return Emulated(PROGRAM)


def register(program: Emulated, heap: np.ndarray) -> None:
    state = State.in_dll(program.library, "emulated_nvshmem")
    state.pe, state.num_pes, state.heap_bytes, state.heap[0] = 0, 1, heap.nbytes, heap.ctypes.data


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(16 + 2 * WORDS, np.uint64), np.zeros(1, np.uint32)


@pytest.mark.parametrize("by_block", [0, 1])
def test_what_is_put_arrives(program, by_block):
    heap, num_wrong = arrays()
    register(program, heap)
    program.run("rounds", 1, 32, heap, num_wrong, ROUNDS, 0, by_block)
    assert num_wrong[0] == 0
    assert heap[:4].tolist() == [ROUNDS] * 4


@pytest.mark.parametrize("mistake", ["source_used_again", "no_fence", "no_quiet"])
def test_what_does_not_wait_finds_it_late(program, mistake):
    heap, num_wrong = arrays()
    register(program, heap)
    program.run("rounds", 1, 32, heap, num_wrong, ROUNDS, MISTAKES.index(mistake), 0)
    assert num_wrong[0] > 0


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("none", "NVSHMEM: the module is not registered"),
        ("outside", "NVSHMEM: 0x[0-9a-f]+ is not in the symmetric heap"),
        ("no_such_pe", "NVSHMEM: PE 1 of 1"),
    ],
)
def test_mistakes_that_are_named(program, capfd, mistake, words):
    heap, num_wrong = arrays()
    register(program, heap)
    if mistake == "none":
        State.in_dll(program.library, "emulated_nvshmem").num_pes = 0
    assert program.launch("rounds", 1, 32, heap, num_wrong, 1, MISTAKES.index(mistake), 0) != 0
    assert re.search(words, capfd.readouterr().err)


def declared(text: str) -> set[tuple[str, str]]:
    """Functions of the namespace: name and parameters."""
    text = re.sub(r"//.*", "", text)
    text = text[text.index("namespace epcomm::nvshmem") :]
    found = re.findall(r"(?:__forceinline__|inline) [\w ]+?\b(\w+)\(([^()]*)\)\s*\{", text)
    return {(name, re.sub(r"\s+", " ", parameters)) for name, parameters in found}


def test_the_twin_declares_what_the_kernels_have():
    name = "transport/nvshmem.cuh"
    real = declared((cuda_src_dir() / name).read_text())
    assert len(real) == 9
    assert declared((DEVICE / name).read_text()) == real
