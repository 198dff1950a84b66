// slot.cuh: how low-latency calls send and receive, in two halves that may be launches of their own.
//
// Each rank stages what it sends in the slot of the receiver's low-latency area, and then releases one word there; who
// has read everything acknowledges with another word, and only then is the slot used again. Words carry the sequence of
// the slot, so nothing is ever cleaned. A slot belongs to one call at a time; which one that is, the host says, the same
// on all ranks. Ranks that are masked get nothing but the word kLeftOut, and nobody waits for them.
#pragma once

#include "sync/entry.cuh"

namespace epcomm {

inline constexpr uint32_t kSend = 1, kReceive = 2;  // halves of a call

// What low-latency argument structs begin with, behind Comm.
struct SlotArgs {
    uint64_t offset;     // of the slot in a region
    uint64_t num_bytes;  // of it
    uint32_t operation;  // Operation, that of the slot
    uint32_t halves;
    uint32_t is_rejected;  // this rank's input is bad
    uint32_t leaves_late;  // ranks that do not come in time are masked, and the others go on
    uint32_t agreed[kNumEntryAgreed];

    __device__ uint64_t at(const Comm& comm, int rank) const { return comm.region[rank] + offset; }
    __device__ int index() const { return operation - kLowLatencyDispatch; }
};
static_assert(sizeof(SlotArgs) == 80);

// What a receiving block knows of the ranks; in shared memory.
struct Arrival {
    uint32_t present;  // bit r: rank r has sent; none at all: nothing was sent to anybody
    uint32_t pulling;  // bit r: its rows are to be pulled from where they are
};

// One warp of any block: leave out `late` ranks from now on. False: this rank itself is among them.
__device__ inline bool mask_late(const Comm& comm, const Call& call, Phase phase, uint32_t late) {
    if (late == 0) return true;
    if (late >> comm.rank & 1) {
        if (lane_index() == 0) give_up(comm, call, kTimeout, phase, late, comm.timeout_ns);
        return false;
    }
    if (lane_index() == 0) atomicOr(&comm.state().masked, late);
    return true;
}

__device__ inline uint32_t masked_ranks(const Comm& comm) {
    return *const_cast<volatile uint32_t*>(&comm.state().masked);
}

// All threads of a block, before they write to slots of peers: wait until everybody is through with what the slot held
// before. The answer is the ranks that get something, a bit each; 0: the call has failed.
__device__ inline uint32_t await_room(const Comm& comm, const Call& call, const SlotArgs& slot, uint32_t& shared) {
    if (warp_index() == 0) {
        const uint32_t masked = masked_ranks(comm);
        uint32_t late = 0;
        bool good = wait_for_ranks(
            comm, call, kPhaseAck,
            [&](int r) {
                // ACQUIRE slot_ack[r]. Pairs with the release of acknowledge, there.
                return (masked >> r & 1) ||
                       reached(ptx::ld_acquire_sys(&comm.own().slot_ack[slot.index()][r]), call.sequence - 1);
            },
            slot.leaves_late ? &late : nullptr);
        good = good && mask_late(comm, call, kPhaseAck, late);
        if (lane_index() == 0) shared = good ? ~(masked | late) : 0;
    }
    __syncthreads();
    return shared;
}

// What this rank comes with: the digest of its values, with the last bit for how its rows travel.
__device__ inline uint32_t greeting(const SlotArgs& slot, bool is_pulled) {
    const uint32_t digest = digest_of(slot.agreed) & ~1u;
    return (digest == kRejected ? 0 : digest) | is_pulled;
}

// Warp 0 of the last block: lane r's word goes to `at(r)`, at rank r. Thread 0, which drew the last ticket, stores all of
// them behind one fence: it acquires the tickets of the other blocks, see is_last_to_tell, and releases what they did to
// the peers. A fence in one thread and a store in another would be no release.
template <typename Word, typename At> __device__ inline void tell_ranks(const Comm& comm, Word word, At at) {
    if (lane_index() == 0) ptx::fence_acq_rel_sys();
    for (int r = 0; r < comm.num_ranks; ++r) {
        const Word value = __shfl_sync(~0u, word, r);
        // RELEASE, by the fence above.
        if (lane_index() == 0) ptx::st_relaxed_sys(at(r), value);
    }
}

// Warp 0 of the last block, when all blocks have sent: say so. Masked ranks hear that there is nothing for them.
__device__ inline void post_words(const Comm& comm, const Call& call, const SlotArgs& slot, bool is_pulled = false) {
    const int lane = lane_index();
    if (__any_sync(~0u, ptx::ld_relaxed_sys(&comm.own().poison) != 0)) return;  // a block has given up
    const bool is_masked = masked_ranks(comm) >> lane & 1;
    const uint32_t word = slot.is_rejected ? kRejected : is_masked ? kLeftOut : greeting(slot, is_pulled);
    // RELEASE slot_ready[me] at every rank. Pairs with the ACQUIRE in await_words, there.
    tell_ranks(comm, tagged(call.sequence, word),
               [&](int r) { return &comm.of(r).slot_ready[slot.index()][comm.rank]; });
}

// Warp 0 of the last block, when all blocks have read what was sent to this rank: the slot may be used again.
__device__ inline void acknowledge(const Comm& comm, const Call& call, const SlotArgs& slot) {
    if (__any_sync(~0u, ptx::ld_relaxed_sys(&comm.own().poison) != 0)) return;
    // RELEASE slot_ack[me] at every rank. Pairs with the ACQUIRE in await_room and in low_latency_service.cu, there.
    tell_ranks(comm, call.sequence, [&](int r) { return &comm.of(r).slot_ack[slot.index()][comm.rank]; });
}

// One warp: what the words say, lane r that of rank r, of which `awaited` says whether it counts. Block 0 tells the host.
__device__ inline Arrival judge(const Comm& comm, const Call& call, const SlotArgs& slot, bool awaited, uint64_t word) {
    const uint32_t what = static_cast<uint32_t>(word), mine = greeting(slot, false);
    HostPage* page = comm.page();
    // A peer that has masked this rank went on without it, and its rows may be those of later calls.
    const bool is_behind = __any_sync(~0u, awaited && word >> 32 != call.sequence);
    const uint32_t rejecting = __ballot_sync(~0u, awaited && what == kRejected);
    const uint32_t present = __ballot_sync(~0u, awaited && what != kLeftOut);
    const bool differs = __any_sync(~0u, awaited && what != kLeftOut && (what ^ mine) > 1);
    const uint32_t pulling = __ballot_sync(~0u, awaited && what != kLeftOut && (what & 1));
    if (!is_behind && rejecting == 0 && !differs) return {present, pulling};
    if (blockIdx.x != 0) return {0, 0};
    if (is_behind) {
        if (lane_index() == 0) ++*const_cast<volatile uint32_t*>(&page->num_left_behind);
    } else if (rejecting != 0) {
        if (rejecting >> lane_index() & 1) ++*const_cast<volatile uint32_t*>(&page->num_rejections[lane_index()]);
    } else {
        report_mismatch(comm, call, slot.agreed);
    }
    return {0, 0};
}

// One warp: wait for the words of all ranks that are not masked. `wait_stats`: int64 [num_ranks] or null, the
// nanoseconds waited for each are added to it by block 0.
__device__ inline bool await_words(const Comm& comm, const Call& call, const SlotArgs& slot, int64_t* wait_stats,
                                   Arrival& arrival) {
    const int lane = lane_index();
    uint32_t masked = masked_ranks(comm), late = 0;
    uint64_t word = 0;
    const uint64_t start_ns = ptx::globaltimer_ns();
    uint64_t elapsed_ns = 0;
    bool good = wait_for_ranks(
        comm, call, kPhaseDone,
        [&](int r) {
            if (masked >> r & 1) return true;
            // ACQUIRE slot_ready[r]. Pairs with the release of post_words, there.
            word = ptx::ld_acquire_sys(&comm.own().slot_ready[slot.index()][r]);
            if (!reached(static_cast<uint32_t>(word >> 32), call.sequence)) return false;
            elapsed_ns = ptx::globaltimer_ns() - start_ns;
            return true;
        },
        slot.leaves_late ? &late : nullptr);
    if (!good || !mask_late(comm, call, kPhaseDone, late)) return false;
    if (wait_stats != nullptr && blockIdx.x == 0 && lane < comm.num_ranks)
        wait_stats[lane] += late >> lane & 1 ? comm.timeout_ns : elapsed_ns;
    masked |= late;
    arrival = judge(comm, call, slot, lane < comm.num_ranks && !(masked >> lane & 1), word);
    return true;
}

// One warp of another block than the first, where ranks that are late are left out: all blocks go by what block 0 saw.
__device__ inline bool await_first_block(const Comm& comm, const Call& call, const SlotArgs& slot, Arrival& arrival) {
    const uint64_t* cells = comm.state().seen[slot.index()];
    uint64_t present = 0, pulling = 0;
    auto seen = [&] {
        // Each cell carries its own flag. ACQUIRE: what block 0 has acquired from the peers.
        present = ptx::ld_acquire_sys(&cells[0]);
        pulling = ptx::ld_acquire_sys(&cells[1]);
        return present >> 32 == call.sequence && pulling >> 32 == call.sequence;
    };
    bool good = true;
    if (lane_index() == 0) {
        // Block 0 waits with a bound of its own, and poisons this rank if it fails.
        while (!seen() && good) good = ptx::ld_relaxed_sys(&comm.own().poison) == 0;
        arrival = {static_cast<uint32_t>(present), static_cast<uint32_t>(pulling)};
    }
    return __shfl_sync(~0u, good, 0);
}

// All threads of a block: wait for what was sent to this rank. False: the call has failed. `shared` is the answer.
__device__ inline bool await_arrival(const Comm& comm, const Call& call, const SlotArgs& slot, int64_t* wait_stats,
                                     Arrival& shared) {
    bool good = true;
    if (warp_index() == 0) {
        Arrival arrival = {0, 0};
        if (slot.leaves_late && blockIdx.x != 0) {
            good = await_first_block(comm, call, slot, arrival);
        } else {
            good = await_words(comm, call, slot, wait_stats, arrival);
            uint64_t* cells = comm.state().seen[slot.index()];
            if (good && slot.leaves_late && lane_index() == 0) {
                // RELEASE seen. Pairs with await_first_block.
                ptx::st_release_sys(&cells[0], tagged(call.sequence, arrival.present));
                ptx::st_release_sys(&cells[1], tagged(call.sequence, arrival.pulling));
            }
        }
        if (good && lane_index() == 0) shared = arrival;
    }
    return __syncthreads_and(good);
}

}  // namespace epcomm
