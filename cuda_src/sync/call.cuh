// call.cuh: how a kernel of several blocks enters and leaves a collective operation.
//
// The sequence of an operation lives on the device, so that a replayed graph counts on. Every block reads it at entry;
// the last block to leave advances it, on every way out.
#pragma once

#include "sync/wait.cuh"

namespace epcomm {

// One thread of every block, at entry: whether the Buffer works. The kernels of a Buffer follow each other: block 0 finds
// that an earlier one has not ended if there are two at a time.
__device__ inline bool admit(const Comm& comm, const Call& call) {
    State& state = comm.state();
    // All are on their way before one is looked at.
    const uint32_t poison = poison_of(comm);
    uint64_t entries = 0, exits = 0;
    if (blockIdx.x == 0) {
        exits = ptx::ld_relaxed_sys(&state.exits);
        entries = ptx::atom_add_relaxed_gpu(&state.entries, kCallUnits);
    }
    if (poison != 0) {
        record_poison(comm, call, kPhaseEntry, 0);
        return false;
    }
    // Other blocks of this kernel may have ended before this one looks: they have added less than a call.
    if (entries / kCallUnits == exits / kCallUnits) return true;
    // A replayed graph beside an eager call.
    record_error(comm, call, kConcurrent, kPhaseEntry, 1u << comm.rank, 0);
    poison_all(comm);
    return false;
}

// All threads. False: the Buffer is broken, and the block returns without touching anything.
__device__ inline bool begin(const Comm& comm, uint32_t operation, Call& call) {
    call.operation = static_cast<Operation>(operation);
    call.sequence = *const_cast<volatile uint32_t*>(&comm.state().sequence[operation]) + 1;
    call.parity = call.sequence & 1;
    const bool good = threadIdx.x != 0 || admit(comm, call);
    return __syncthreads_and(good);
}

// All threads of all blocks, after their last access to shared memory of peers. True in the block that came last: the
// acquire of its ticket orders what all blocks did before what it does next. A call may have several such points: all
// blocks have drawn `num_before` tickets at earlier ones.
__device__ inline bool is_last_block(const Comm& comm, const Call& call, uint32_t num_before = 0) {
    __syncthreads();
    bool is_last = false;
    if (threadIdx.x == 0) {
        // The block's accesses, ordered by the barrier above, become visible before its ticket.
        ptx::fence_acq_rel_sys();
        is_last = ptx::atom_add_acq_rel_gpu(&comm.state().ticket[call.operation], 1) == num_before + gridDim.x - 1;
    }
    return __syncthreads_or(is_last);
}

// The last block: count the call, if it was one that all ranks make.
__device__ inline void end(const Comm& comm, const Call& call, bool is_counted = true) {
    __syncthreads();
    if (threadIdx.x == 0) {
        State& state = comm.state();
        state.ticket[call.operation] = 0;
        if (is_counted) state.sequence[call.operation] = call.sequence;
        ptx::red_add_relaxed_gpu(&state.exits, kCallUnits);
    }
}

// One warp of the last block: tell `ranks`, a bit each, that this one is done with `call`, and wait for them.
// `word(signals)` is the array of done words of the operation.
template <typename Word>
__device__ inline bool meet(const Comm& comm, const Call& call, Word word, uint32_t ranks = ~0u) {
    const int lane = lane_index();
    // A block that gave up has poisoned this rank, too: the peers must not hear that its work is done.
    if (__any_sync(~0u, poison_of(comm) != 0)) {
        if (lane == 0) record_poison(comm, call, kPhaseDone, 0);
        return false;
    }
    ptx::fence_acq_rel_sys();
    // RELEASE done[me] at rank `lane`. Pairs with the ACQUIRE below, there.
    if (lane < comm.num_ranks && (ranks >> lane & 1))
        set_word(comm, lane, &word(comm.own())[comm.rank], call.sequence);
    return wait_for_ranks(comm, call, kPhaseDone, [&](int r) {
        return !(ranks >> r & 1) || reached(ptx::ld_acquire_sys(&word(comm.own())[r]), call.sequence);
    });
}

}  // namespace epcomm
