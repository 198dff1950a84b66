"""NVSHMEM of the emulator, with one PE: what arrives, and that it arrives as late as a network may deliver it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator.compiler import DEVICE
from helpers.emulated_nvshmem import State
from helpers.emulation import Emulated, needs_compiler

from epcomm.jit.source import cuda_src_dir
from epcomm.kernels import layout

pytestmark = [needs_compiler, pytest.mark.slow]

WORDS = 256
ROUNDS = 200
MISTAKES = ("none", "source_used_again", "no_fence", "no_quiet", "outside", "no_such_pe", "no_such_queue_pair")

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
        else nvshmem::put_signal(to, from, num_bytes, heap, round, pe, 2);
        if (mistake == source_used_again) for (int i = lane; i < kWords; i += kWarp) from[i] = 0;
        if (lane == 0) while (ptx::ld_acquire_sys(heap) < round) {}
        __syncwarp();
        for (int i = lane; i < kWords; i += kWarp) if (to[i] != (round << 32 | i)) atomicAdd(num_wrong, 1u);
        if (lane == 0) {
            nvshmem::put_word(heap + 1, round, pe, mistake == no_such_queue_pair ? 6 : 4);
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
    state.num_queue_pairs, state.queue_pair[:2] = 2, [2, 4]
    state.num_messages[:2] = state.num_words[:2] = [0, 0]
    state.num_by_default = 0


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(16 + 2 * WORDS, np.uint64), np.zeros(1, np.uint32)


@pytest.mark.parametrize("by_block", [0, 1])
def test_what_is_put_arrives(program, by_block):
    heap, num_wrong = arrays()
    register(program, heap)
    program.run("rounds", 1, 32, heap, num_wrong, ROUNDS, 0, by_block)
    assert num_wrong[0] == 0
    assert heap[:4].tolist() == [ROUNDS] * 4
    state = State.in_dll(program.library, "emulated_nvshmem")
    assert (state.num_messages[:2], state.num_words[:2]) == ([0 if by_block else ROUNDS, 0], [0, ROUNDS])
    assert state.num_by_default == (3 if by_block else 2) * ROUNDS


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
        ("no_such_queue_pair", "NVSHMEM: there is no queue pair 6"),
    ],
)
def test_mistakes_that_are_named(program, capfd, mistake, words):
    heap, num_wrong = arrays()
    register(program, heap)
    if mistake == "none":
        State.in_dll(program.library, "emulated_nvshmem").num_pes = 0
    assert program.launch("rounds", 1, 32, heap, num_wrong, 1, MISTAKES.index(mistake), 0) != 0
    assert re.search(words, capfd.readouterr().err)


WARPS = 8
CHOICE = r"""
#define KERNEL_NVSHMEM 1
#include "transport/peer.cuh"
using namespace epcomm;

// By block and warp: the queue pairs for messages, and for words.
extern "C" __global__ void choose(uint64_t* workspace, int* messages, int* words) {
    Comm comm{};
    comm.control[0] = reinterpret_cast<uint64_t>(workspace);
    const int warp = blockIdx.x * warps_per_block() + warp_index();
    if (lane_index() != 0) return;
    messages[warp] = queue_pair(comm, false);
    words[warp] = queue_pair(comm, true);
}
"""


def chosen(num_queue_pairs: int, blocks: int) -> list[np.ndarray]:
    """[block, warp]: numbers of the queue pairs for messages, and for words; -1 for NVSHMEM's own choice."""
    handles = [10 * (number + 1) for number in range(num_queue_pairs)]
    workspace = np.zeros(layout.WORKSPACE_BYTES, np.uint8)
    data = np.frombuffer(layout.queue_pairs_bytes(handles), np.uint8)
    workspace[layout.QUEUE_PAIRS_OFFSET :][: data.size] = data
    both = [np.full((blocks, WARPS), 7, np.int32) for _ in range(2)]
    Emulated(CHOICE).run("choose", blocks, 32 * WARPS, workspace, *both)
    number_of = {1: -1, **{handle: number for number, handle in enumerate(handles)}}
    return [np.vectorize(number_of.__getitem__)(handle) for handle in both]


@pytest.mark.parametrize("num_queue_pairs", [0, 1])
def test_without_a_choice_of_queue_pairs(num_queue_pairs):
    for numbers in chosen(num_queue_pairs, 4):
        assert (numbers == num_queue_pairs - 1).all()


@pytest.mark.parametrize("num_queue_pairs", [2, 3, 24, 25, 48, 127, 128])
@pytest.mark.parametrize("blocks", [1, 2, 5, 12, 24])
def test_every_block_has_queue_pairs_of_its_own_or_as_few_blocks_share_one_as_can(num_queue_pairs, blocks):
    num_queue_pairs_used = min(num_queue_pairs, layout.MAX_QUEUE_PAIRS)
    messages, words = chosen(num_queue_pairs, blocks)
    num_for_words = num_queue_pairs_used // 2
    for numbers, count in ((messages, num_queue_pairs_used - num_for_words), (words, num_for_words)):
        assert len({*numbers.flat}) == min(blocks * min(WARPS, max(1, count // blocks)), count)
        for number in {*numbers.flat}:
            assert (numbers == number).any(axis=1).sum() <= -(-blocks // count)
    assert not {*messages.flat} & {*words.flat}
    assert messages.max() < num_queue_pairs_used - num_for_words <= words.min()


def declared(text: str) -> set[tuple[str, str]]:
    """Functions of the namespace: name and parameters."""
    text = re.sub(r"//.*", "", text)
    text = text[text.index("namespace epcomm::nvshmem") :]
    found = re.findall(r"(?:__forceinline__|inline) [\w *]+?\b(\w+)\(([^()]*)\)\s*\{", text)
    return {(name, re.sub(r"\s+", " ", parameters)) for name, parameters in found}


def test_the_twin_declares_what_the_kernels_have():
    name = "transport/nvshmem.cuh"
    real = declared((cuda_src_dir() / name).read_text())
    assert len(real) == 9
    assert declared((DEVICE / name).read_text()) == real
