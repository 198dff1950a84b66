// slot.cuh: how low-latency calls send and receive, in two halves that may be launches of their own.
//
// What a rank sends goes to the slot of the receiver's low-latency area: rows, and cells. A cell is {sequence << 32 |
// value}: the data is its flag, and since a cell is never anything else than a cell of its slot, nothing is ever
// cleaned. Counts and places travel in cells alone; rows have a cell each that is released behind them. So there is no
// barrier, neither among the ranks nor among the blocks of one: whoever needs something waits for just that.
//
// After a call in which nothing is received what was sent may still be on its way through the network when the
// slot is acknowledged: the next send waits for the network itself. So does a greeting where ranks may be left out.
//
// To ranks behind the network go whole rows, each from memory of the sender that is free when the slot is, and the cell of
// the first piece behind a row tells of all of it. All other words go there one by one.
//
// A rank acknowledges a slot at the start of its next low-latency kernel, whichever that is: then it has surely read
// everything. Only then do its peers write there again. A slot belongs to one call at a time; which one that is, the host
// says, the same on all ranks. Ranks that are masked get nothing but the word kLeftOut and acknowledgements, and nobody
// waits for them.
#pragma once

#include "ptx/launch.cuh"
#include "sync/entry.cuh"

namespace epcomm {

inline constexpr uint32_t kSend = 1, kReceive = 2;  // halves of a call

// What low-latency argument structs begin with, behind Comm.
struct SlotArgs {
    uint64_t rows;        // offset of the slot's rows, from Comm::control
    uint64_t cells;       // offset of its cells
    uint32_t operation;   // Operation, that of the slot
    uint32_t halves;
    uint32_t is_rejected;  // this rank's input is bad
    uint32_t leaves_late;  // ranks that do not come in time are masked, and the others go on
    uint32_t digest;       // of `agreed`; its first and its last bit are 0
    uint32_t far;          // bit r: rank r is behind the network
    uint32_t agreed[kNumEntryAgreed];  // what must be equal on all ranks

    __device__ uint64_t rows_at(const Comm& comm, int rank) const { return comm.control[rank] + rows; }
    __device__ uint64_t* cells_at(const Comm& comm, int rank) const {
        return pointer<uint64_t>(comm.control[rank] + cells);
    }
    // Whether whole rows of rank r are sent by NVSHMEM, and not pieces of them by stores.
    __device__ bool is_far(int r) const { return kHasNetwork && (far >> r & 1); }
    // The number of a far rank among those.
    __device__ int far_index(int r) const { return __popc(far & ((1u << r) - 1)); }
    __device__ int index() const { return operation - kLowLatencyDispatch; }
    __device__ bool sends() const { return halves & kSend; }
    __device__ bool receives() const { return halves & kReceive; }
};
static_assert(sizeof(SlotArgs) == 88);

// What a receiving warp knows of the ranks.
struct Arrival {
    uint32_t present;  // bit r: rank r has sent; none at all: nothing was sent to anybody
    uint32_t pulling;  // bit r: its rows are to be pulled from where they are
};

// -- entry and exit ---------------------------------------------------------------------------------------------------

// Of a block, in shared memory.
struct Opening {
    uint32_t sequence;
    uint32_t is_admitted;
    uint32_t masked;     // bit r: rank r is left out
    uint32_t reachable;  // bit r: rank r gets something; none at all: the call has failed, or the peers went on
};

// One thread of every block, when the block has done its part: count the call. The sum of all blocks' parts is one unit.
__device__ inline void leave(const Comm& comm, const SlotArgs& slot) {
    const uint64_t part = blockIdx.x == 0 ? kCallUnits - (gridDim.x - 1) : 1;
    State& state = comm.state();
    if (slot.sends()) ptx::red_add_relaxed_gpu(&state.sends[slot.index()], part);
    ptx::red_add_relaxed_gpu(&state.exits, part);
}

// -- acknowledgements -------------------------------------------------------------------------------------------------

// Whether this block is the one that acknowledges.
__device__ inline bool acknowledges() { return blockIdx.x == gridDim.x - 1; }

// One warp of that block: tell the peers what earlier kernels have read.
__device__ __noinline__ void acknowledge(const Comm& comm) {
    constexpr int kNumWords = 2 * kNumSlots;
    const int lane = lane_index();
    State& state = comm.state();
    uint32_t received = 0, acknowledged = 0;
    if (lane < kNumWords) {
        received = *const_cast<volatile uint32_t*>(&state.received[lane]);
        acknowledged = *const_cast<volatile uint32_t*>(&state.acknowledged[lane]);
    }
    const uint32_t news = __ballot_sync(~0u, received != acknowledged);
    if (news != 0) ptx::fence_acq_rel_sys();
    for (uint32_t rest = news; rest != 0; rest &= rest - 1) {
        const int slot = __ffs(rest) - 1;
        const uint32_t last = __shfl_sync(~0u, received, slot);
        // RELEASE slot_ack[me] at every rank. Pairs with the ACQUIRE in look_for_room, there.
        if (lane < comm.num_ranks) set_word(comm, lane, &comm.own().slot_ack[slot][comm.rank], last);
    }
    if (lane < kNumWords) state.acknowledged[lane] = received;
}

// The same warp, afterwards: what this kernel reads, a later one acknowledges.
__device__ inline void note_receiving(const Comm& comm, const Call& call, const SlotArgs& slot) {
    __syncwarp();
    if (lane_index() != 0 || !slot.receives()) return;
    State& state = comm.state();
    state.received[slot.index()] = call.sequence;
    state.taken_units[slot.index()][(call.sequence + 1) & 1] = 0;
}

// One warp of any block: leave out `late` ranks from now on. False: this rank itself is among them.
__device__ __noinline__ bool leave_out(const Comm& comm, Call call, Phase phase, uint32_t late) {
    if (late >> comm.rank & 1) {
        if (lane_index() == 0) give_up(comm, call, kTimeout, phase, late, comm.timeout_ns);
        return false;
    }
    if (lane_index() == 0) atomicOr(&comm.state().masked, late);
    return true;
}

__device__ inline bool mask_late(const Comm& comm, const Call& call, Phase phase, uint32_t late) {
    return late == 0 || leave_out(comm, call, phase, late);
}

// Of lane r: what rank r has acknowledged.
__device__ inline uint32_t look_for_room(const Comm& comm, const SlotArgs& slot) {
    // ACQUIRE slot_ack[r]. Pairs with the release of acknowledge, there.
    return lane_index() < comm.num_ranks ? ptx::ld_acquire_sys(&comm.own().slot_ack[slot.index()][lane_index()]) : 0;
}

// Whether a rank is at a later call of the slot.
__device__ inline bool went_on(const Comm& comm, const Call& call, const SlotArgs& slot, int rank) {
    const uint64_t word = ptx::ld_relaxed_sys(&comm.own().slot_ready[slot.index()][rank]);
    return reached(static_cast<uint32_t>(word >> 32), call.sequence + 1);
}

// One warp, before anything is written to slots of peers: wait until everybody is through with what the slot held
// before. `acknowledged`: what an earlier look found. The answer is the ranks that get something, a bit each, or none
// where the call has failed, or where the peers went on without this rank.
__device__ inline uint32_t await_room(const Comm& comm, const Call& call, const SlotArgs& slot, uint32_t masked,
                                      uint32_t acknowledged) {
    uint32_t late = 0;
    auto ready = [&](int r) {
        if ((masked >> r & 1) || reached(acknowledged, call.sequence - 1)) return true;
        acknowledged = look_for_room(comm, slot);
        return reached(acknowledged, call.sequence - 1);
    };
    // Who waits for others must not keep them waiting.
    if (acknowledges() && !__all_sync(~0u, lane_index() >= comm.num_ranks || reached(acknowledged, call.sequence - 1)))
        acknowledge(comm);
    const bool good = wait_for_ranks(comm, call, kPhaseAck, ready, slot.leaves_late ? &late : nullptr);
    if (!good || !mask_late(comm, call, kPhaseAck, late)) return 0;
    if (!slot.leaves_late) return ~masked;
    // Those that went on without this rank have used the slot for later calls, and it must not disturb these. A rank that
    // stays between this look and its last store for longer than others wait for it still can.
    masked |= late;
    const bool is_awaited = lane_index() < comm.num_ranks && !(masked >> lane_index() & 1);
    return __any_sync(~0u, is_awaited && went_on(comm, call, slot, lane_index())) ? 0 : ~masked;
}

// The last call of a slot whose receive half has not waited for all that was sent to it; on all ranks that take part alike.
__device__ inline volatile uint32_t& incomplete_call(const Comm& comm, const SlotArgs& slot) {
    return *const_cast<volatile uint32_t*>(&comm.state().incomplete_call[slot.index()]);
}

// One warp of every block, before all others do anything that depends on it; a barrier follows.
__device__ inline void open(const Comm& comm, const SlotArgs& slot, Opening& opening) {
    State& state = comm.state();
    Call call = {static_cast<Operation>(slot.operation), 0, 0};
    // All is on its way before any of it is looked at.
    const uint64_t sends = ptx::ld_relaxed_sys(&state.sends[slot.index()]);
    const uint32_t masked = masked_ranks(comm);
    bool good = true;
    if (lane_index() == 0) good = admit(comm, call);
    const uint32_t acknowledged = slot.sends() ? look_for_room(comm, slot) : 0;
    good = __all_sync(~0u, good);
    call.sequence = static_cast<uint32_t>(sends / kCallUnits) + slot.sends();
    // The first call is behind none.
    if (kHasNetwork && good && slot.sends() && lane_index() == 0 && call.sequence > 1 &&
        incomplete_call(comm, slot) == call.sequence - 1)
        drain_network();
    const uint32_t reachable = good && slot.sends() ? await_room(comm, call, slot, masked, acknowledged) : 0;
    if (lane_index() == 0) opening = {call.sequence, good, masked, reachable};
}

// -- words ------------------------------------------------------------------------------------------------------------

// What a rank says of itself.
struct Greeting {
    bool is_rejected;  // its input is bad: it sends nothing
    bool is_pulled;    // its rows are to be pulled
};

// One warp of one block: tell all ranks that this one takes part, with the digest of its values, and with the last bit for
// how its rows travel. Masked ranks hear that there is nothing for them.
__device__ inline void greet(const Comm& comm, const Call& call, const SlotArgs& slot, uint32_t masked,
                             Greeting greeting) {
    const int lane = lane_index();
    const bool is_masked = masked >> lane & 1;
    const bool is_pulled = greeting.is_pulled && !slot.is_far(lane);
    const uint32_t word = greeting.is_rejected ? kRejected : is_masked ? kLeftOut : slot.digest | is_pulled;
    // Pairs with await_words, there. Carries its own flag; where ranks may be left out it is released by greet_at_last.
    if (lane < comm.num_ranks)
        set_word(comm, lane, &comm.own().slot_ready[slot.index()][comm.rank], tagged(call.sequence, word));
}

// One warp of every block, behind the barrier: what others wait for.
__device__ inline void introduce(const Comm& comm, const Call& call, const SlotArgs& slot, const Opening& opening,
                                 Greeting greeting) {
    if (blockIdx.x == 0 && opening.reachable != 0 && !slot.leaves_late)
        greet(comm, call, slot, opening.masked, greeting);
    if (!acknowledges()) return;
    acknowledge(comm);
    note_receiving(comm, call, slot);
}

// All threads of all blocks, where ranks that are late are left out: greet only when all blocks have sent everything, so
// that a rank is there with all of its rows, or not at all.
__device__ __noinline__ void greet_at_last(const Comm& comm, Call call, const SlotArgs& slot, Greeting greeting) {
    if (!is_last_block(comm, call)) return;
    if (threadIdx.x == 0) comm.state().ticket[call.operation] = 0;
    if (warp_index() != 0 || __any_sync(~0u, poison_of(comm) != 0)) return;
    ptx::fence_acq_rel_sys();
    if constexpr (kHasNetwork) {
        if (lane_index() == 0) drain_network();
        __syncwarp();
    }
    greet(comm, call, slot, masked_ranks(comm), greeting);
}

// One warp of one block: why nothing is received. `awaited`, `rejecting`: ranks, a bit each.
__device__ __noinline__ void report_nothing(const Comm& comm, Call call, const SlotArgs& slot, bool is_behind,
                                            uint32_t awaited, uint32_t rejecting) {
    HostPage* page = comm.page();
    if (is_behind) {
        if (lane_index() == 0) ++*const_cast<volatile uint32_t*>(&page->num_left_behind);
    } else if (rejecting != 0) {
        if (rejecting >> lane_index() & 1) ++*const_cast<volatile uint32_t*>(&page->num_rejections[lane_index()]);
    } else {
        report_mismatch(comm, call, slot.agreed, awaited, slot.leaves_late);
    }
}

// One warp: what the words say, lane r that of rank r, of which `is_awaited` says whether it counts. Block 0 tells the host
// why nothing is received, if so and if `reports`.
__device__ inline Arrival judge(const Comm& comm, const Call& call, const SlotArgs& slot, bool is_awaited,
                                uint64_t word, bool reports) {
    const uint32_t what = static_cast<uint32_t>(word);
    // A peer that has masked this rank went on without it, and its rows may be those of later calls.
    const bool is_behind = __any_sync(~0u, is_awaited && word >> 32 != call.sequence);
    const uint32_t rejecting = __ballot_sync(~0u, is_awaited && what == kRejected);
    const uint32_t present = __ballot_sync(~0u, is_awaited && what != kLeftOut);
    const bool differs = __any_sync(~0u, is_awaited && what != kLeftOut && (what ^ slot.digest) > 1);
    const uint32_t pulling = __ballot_sync(~0u, is_awaited && what != kLeftOut && (what & 1));
    if (!is_behind && rejecting == 0 && !differs) return {present, pulling};
    if (kHasNetwork && lane_index() == 0) incomplete_call(comm, slot) = call.sequence;
    if (blockIdx.x == 0 && reports) report_nothing(comm, call, slot, is_behind, present, rejecting);
    return {0, 0};
}

// One warp: wait for the words of all ranks that are not masked. `wait_stats`: int64 [num_ranks] or null, the
// nanoseconds waited for each are added to it by block 0. `reports`: the host hears why nothing is received.
__device__ inline bool await_words(const Comm& comm, const Call& call, const SlotArgs& slot, uint32_t masked,
                                   int64_t* wait_stats, bool reports, Arrival& arrival) {
    const int lane = lane_index();
    const bool is_timed = wait_stats != nullptr && blockIdx.x == 0;
    uint32_t late = 0;
    uint64_t word = 0, elapsed_ns = 0;
    const uint64_t start_ns = is_timed ? ptx::globaltimer_ns() : 0;
    auto ready = [&](int r) {
        if (masked >> r & 1) return true;
        // ACQUIRE slot_ready[r]. Pairs with greet, there.
        word = ptx::ld_acquire_sys(&comm.own().slot_ready[slot.index()][r]);
        if (!reached(static_cast<uint32_t>(word >> 32), call.sequence)) return false;
        if (is_timed) elapsed_ns = ptx::globaltimer_ns() - start_ns;
        return true;
    };
    const bool good = wait_for_ranks(comm, call, kPhaseDone, ready, slot.leaves_late ? &late : nullptr);
    if (!good || !mask_late(comm, call, kPhaseDone, late)) return false;
    if (is_timed && lane < comm.num_ranks) wait_stats[lane] += late >> lane & 1 ? comm.timeout_ns : elapsed_ns;
    masked |= late;
    arrival = judge(comm, call, slot, lane < comm.num_ranks && !(masked >> lane & 1), word, reports);
    return true;
}

// One warp of another block than the first, where ranks that are late are left out: all blocks go by what block 0 saw.
__device__ __noinline__ bool await_first_block(const Comm& comm, Call call, const SlotArgs& slot, Arrival& arrival) {
    const uint64_t* cells = comm.state().seen[slot.index()];
    uint64_t present, pulling;
    do {
        // Block 0 waits with a bound of its own, and poisons this rank if it fails.
        if (__any_sync(~0u, poison_of(comm) != 0)) return false;
        // Each cell carries its own flag. ACQUIRE: what block 0 has acquired from the peers.
        present = ptx::ld_acquire_sys(&cells[0]);
        pulling = ptx::ld_acquire_sys(&cells[1]);
    } while (__any_sync(~0u, present >> 32 != call.sequence || pulling >> 32 != call.sequence));
    arrival = {static_cast<uint32_t>(present), static_cast<uint32_t>(pulling)};
    return true;
}

// One warp of each block: who has sent something to this rank. False: the call has failed.
__device__ inline bool await_arrival(const Comm& comm, const Call& call, const SlotArgs& slot, uint32_t masked,
                                     uint64_t wait_stats, bool reports, Arrival& arrival) {
    if (slot.leaves_late && blockIdx.x != 0) return await_first_block(comm, call, slot, arrival);
    if (slot.leaves_late) masked = masked_ranks(comm);  // there may be more of them by now
    if (!await_words(comm, call, slot, masked, pointer<int64_t>(wait_stats), reports, arrival)) return false;
    if (slot.leaves_late && lane_index() == 0) {
        uint64_t* cells = comm.state().seen[slot.index()];
        // RELEASE seen. Pairs with await_first_block.
        ptx::st_release_sys(&cells[0], tagged(call.sequence, arrival.present));
        ptx::st_release_sys(&cells[1], tagged(call.sequence, arrival.pulling));
    }
    return true;
}

// -- one warp serves its block ----------------------------------------------------------------------------------------

// What the serving warp has found out, for all warps of its block; in shared memory, 0 to begin with.
enum Service : uint32_t { kUnderWay = 0, kServed = 1, kNothing = 2 };

__device__ inline void announce(uint32_t& service, bool is_served) {
    __syncwarp();
    // RELEASE what the warp has written to shared memory. Pairs with is_served, below.
    if (lane_index() == 0) ptx::st_release_block(&service, is_served ? kServed : kNothing);
    __syncwarp();
}

// One warp: wait for the serving one, whose waits are bounded. Whether there is something to receive.
__device__ inline bool is_served(const uint32_t& service) {
    uint32_t state;
    do {
        state = ptx::ld_acquire_block(&service);
    } while (state == kUnderWay);
    __syncwarp();
    return state == kServed;
}

// Units of work of the receive half, which warps of all blocks take as they come: some have more to do than others, and
// some SMs are slower. So that all end together, the last ones are small. Lane 0 asks ahead; the answer takes a round trip.
class Units {
  public:
    __device__ Units(const Comm& comm, const Call& call, const SlotArgs& slot)
        : counter_(&comm.state().taken_units[slot.index()][call.sequence & 1]) {
        ask();
    }
    // All lanes: the number of the next one.
    __device__ uint32_t take() {
        const uint32_t number = __shfl_sync(~0u, asked_, 0);
        ask();
        return number;
    }

    // How many large units of `size` items there are, of `num_items`: all but as many as `num_warps` have to do while some
    // of them are still at a large one.
    static __device__ uint32_t count_large(uint32_t num_items, uint32_t size, uint32_t num_warps) {
        return num_items > size * num_warps ? (num_items - size * num_warps) / size : 0;
    }

  private:
    __device__ void ask() {
        if (lane_index() == 0) asked_ = ptx::atom_add_relaxed_gpu(counter_, 1);
    }
    uint32_t* counter_;
    uint32_t asked_ = 0;
};

// -- cells ------------------------------------------------------------------------------------------------------------

__device__ inline bool is_filled(uint64_t cell, const Call& call) {
    return static_cast<uint32_t>(cell >> 32) == call.sequence;
}

}  // namespace epcomm
