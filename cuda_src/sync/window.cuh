// window.cuh: rounds through the windows, for arrays that lie outside of the arena.
//
// A window has an area for each peer, in kWindowParts parts: an index, then slots, one for each token of a round. Round k
// uses part k % kWindowParts; whoever fills it waits until round k - kWindowParts was taken out. Both sides count rounds in
// words that carry the sequence of the call. Fillers and takers are different warps: a filler waits for takers only, of an
// earlier round, a taker for fillers only, of its round, so nobody waits in a circle.
#pragma once

#include "ptx/bulk.cuh"
#include "sync/call.cuh"

namespace epcomm {

// Where windows are, and how they are cut; the same on all ranks.
struct Window {
    uint64_t offset;      // of the window in a region
    uint64_t area_bytes;  // of one part of one peer's area
    uint32_t slot_bytes;  // one row and what travels beside it
    uint32_t num_slots;   // tokens of one round

    // The index of round `round` for `peer`, in the region of `owner`: int32 [num_slots].
    __device__ uint64_t index(const Comm& comm, int owner, int peer, uint32_t round) const {
        const uint64_t part = static_cast<uint64_t>(kWindowParts) * peer + round % kWindowParts;
        return comm.region[owner] + offset + part * area_bytes;
    }
    // The slots behind it.
    __device__ uint64_t slots(const Comm& comm, int owner, int peer, uint32_t round) const {
        return index(comm, owner, peer, round) + round_up(num_slots * 4, kUnit);
    }
    // The tokens of round `round` end here, of `num_tokens`.
    __device__ int round_end(uint32_t round, int num_tokens) const {
        return min(num_tokens, static_cast<int>((round + 1) * num_slots));
    }
    __device__ uint32_t rounds(uint32_t num_tokens) const { return (num_tokens + num_slots - 1) / num_slots; }
};
static_assert(sizeof(Window) == 24);

// A part of the warps of each block: threads [first, first + count), whole warps, with a barrier of its own.
struct Role {
    int first_warp, num_warps, barrier;
    __device__ bool has_this_warp() const { return warp() >= 0 && warp() < num_warps; }
    __device__ int warp() const { return warp_index() - first_warp; }
    __device__ bool leads() const { return warp() == 0; }
    __device__ void sync() const { ptx::bar_sync(barrier, num_warps * kWarp); }
};

// The leading warp waits for the words of `ranks` (a bit each) to reach `round`; the answer goes to the whole role
// through `shared`. The word is {sequence << 32 | rounds}, written by the rank it stands for.
__device__ inline bool await_round(const Comm& comm, const Call& call, const Role& role, Phase phase,
                                   const uint64_t* words, uint32_t ranks, uint32_t round, bool& shared) {
    if (role.leads()) {
        const bool good = wait_for_ranks(comm, call, phase, [&](int r) {
            if (!(ranks >> r & 1)) return true;
            // ACQUIRE words[r]. Pairs with the release of finish_round, there.
            const uint64_t word = ptx::ld_acquire_sys(&words[r]);
            return word >> 32 == call.sequence && static_cast<uint32_t>(word) >= round;
        });
        if (lane_index() == 0) shared = good;
    }
    role.sync();
    const bool good = shared;
#if __CUDA_ARCH__ >= 900
    ptx::fence_proxy_async_global();  // after the acquire, before bulk copies in and out of the windows
#endif
    role.sync();  // before the leader writes `shared` again
    return good;
}

// All warps of the role, after their last access of the round: when all blocks are through, tell `ranks`.
// `counters` count blocks by part of the window: no block gets as many rounds ahead of another as there are parts.
// `word(r)` is this rank's word at rank r.
template <typename Word>
__device__ inline void finish_round(const Comm& comm, const Call& call, const Role& role, uint32_t* counters,
                                    uint32_t ranks, uint32_t round, uint32_t& shared, Word word) {
    role.sync();
    if (role.leads()) {
        const int lane = lane_index();
        if (lane == 0) {
            ptx::fence_acq_rel_sys();
            shared = ptx::atom_add_acq_rel_gpu(&counters[round % kWindowParts], 1);
        }
        __syncwarp();
        if (shared == (round / kWindowParts + 1) * gridDim.x - 1 && (ranks >> lane & 1)) {
            ptx::fence_acq_rel_sys();
            // RELEASE word[me] at rank `lane`. Pairs with the ACQUIRE of await_round, there.
            ptx::st_release_sys(word(lane), tagged(call.sequence, round + 1));
        }
    }
    role.sync();
}

// One thread of the last block, when all rounds are over.
__device__ inline void reset_rounds(const Comm& comm, const Call& call) {
    State& state = comm.state();
    const int i = call.operation - kDispatch;
    for (int part = 0; part < kWindowParts; ++part) state.filled[i][part] = state.taken[i][part] = 0;
}

}  // namespace epcomm
