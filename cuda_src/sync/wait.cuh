// wait.cuh: bounded waits, and what happens when one of them ends badly.
//
// Nothing traps: a wait that fails writes one error record for the host, poisons all ranks, so that their waits end too,
// and returns false; the kernel then leaves by its ordinary way out. The CUDA context stays usable.
#pragma once

#include "transport/peer.cuh"

namespace epcomm {

// Which call a kernel is.
struct Call {
    Operation operation;
    uint32_t sequence;
    uint32_t parity;
};

__device__ inline uint32_t masked_ranks(const Comm& comm) {
    return *const_cast<volatile uint32_t*>(&comm.state().masked);
}

// Write the error record unless an earlier error has it.
__device__ __noinline__ void record_error(const Comm& comm, Call call, ErrorKind kind, Phase phase,
                                          uint32_t awaited, uint64_t elapsed_ns) {
    if (ptx::atom_cas_relaxed_gpu(&comm.state().failed, 0, 1) != 0) return;
    HostPage* page = comm.page();
    page->operation = call.operation;
    page->sequence = call.sequence;
    page->phase = phase;
    page->awaited = awaited;
    page->elapsed_us = static_cast<uint32_t>(min(elapsed_ns / 1000, 0xffffffffull));
    // RELEASE error_kind -> the host, which reads the record when it sees a kind.
    ptx::st_release_sys(&page->error_kind, kind);
}

// End the waits of all ranks; this Buffer is broken for good.
__device__ __noinline__ void poison_all(const Comm& comm) {
    for (int r = 0; r < comm.num_ranks; ++r) set_word(comm, r, &comm.own().poison, 1u + comm.rank);
}

// 1 + the rank that gave up, or 0; nobody here cares about one that is masked.
__device__ inline uint32_t poison_of(const Comm& comm) {
    const uint32_t poison = ptx::ld_relaxed_sys(&comm.own().poison);
    return poison != 0 && (masked_ranks(comm) >> (poison - 1) & 1) ? 0 : poison;
}

// A rank has given up: say so on this one.
__device__ __noinline__ void record_poison(const Comm& comm, Call call, Phase phase, uint64_t elapsed_ns) {
    const uint32_t poison = poison_of(comm);
    if (poison != 0) record_error(comm, call, kPoisoned, phase, 1u << (poison - 1), elapsed_ns);
}

// Why waiting on is pointless, if it is; called by one thread now and then.
__device__ __noinline__ ErrorKind reason_to_stop(const Comm& comm, uint64_t elapsed_ns, uint32_t num_looks) {
    if (poison_of(comm) != 0) return kPoisoned;
    // The word lies in host memory: a look is slow, and disturbs the others.
    if (num_looks % 64 == 63 && ptx::ld_relaxed_sys(&comm.page()->abort) != 0) return kAborted;
    return elapsed_ns > comm.timeout_ns ? kTimeout : kNoError;
}

// The waiting thread leaves for that reason, and so must all others.
__device__ __noinline__ void give_up(const Comm& comm, Call call, ErrorKind reason, Phase phase,
                                     uint32_t awaited, uint64_t elapsed_ns) {
    if (reason == kPoisoned) {
        record_poison(comm, call, phase, elapsed_ns);
    } else {
        record_error(comm, call, reason, phase, awaited, elapsed_ns);
        poison_all(comm);
    }
}

inline constexpr uint32_t kPollsPerLook = 32;

// What comes of a wait: it goes on, and this is when it began; or one of these.
inline constexpr uint64_t kStopped = 1, kLate = 2;

// All lanes of a warp that has waited for a while. `awaited`: the ranks that a lane still waits for, a bit each;
// `num_looks`: earlier calls in this wait. Out of line: code that is rarely run must not be in the way of the rest, since
// what low latency runs is fetched from memory each time.
__device__ __noinline__ uint64_t look_around(const Comm& comm, Call call, Phase phase, uint32_t awaited,
                                             uint64_t start_ns, uint32_t num_looks, bool leaves_late) {
    const uint64_t now_ns = ptx::globaltimer_ns();
    if (num_looks == 0) start_ns = now_ns;
    ErrorKind reason = lane_index() == 0 ? reason_to_stop(comm, now_ns - start_ns, num_looks) : kNoError;
    reason = static_cast<ErrorKind>(__shfl_sync(~0u, static_cast<uint32_t>(reason), 0));
    if (reason == kNoError) return start_ns;
    if (reason == kTimeout && leaves_late) return kLate;
    awaited = __reduce_or_sync(~0u, awaited);
    if (lane_index() == 0) give_up(comm, call, reason, phase, awaited, now_ns - start_ns);
    return kStopped;
}

// One warp waits until `awaited()` is 0 in every lane: the ranks that the lane still waits for, a bit each. False: the
// call has failed. With `late` it may go on without ranks: those that did not come in time.
template <typename Awaited>
__device__ inline bool wait_in_lanes(const Comm& comm, const Call& call, Phase phase, Awaited awaited,
                                     uint32_t* late = nullptr) {
    uint64_t start_ns = 0;
    uint32_t ranks = ~0u;
    for (uint32_t polls = 1;; ++polls) {
        if (ranks != 0) ranks = awaited();
        if (!__any_sync(~0u, ranks != 0)) return true;
        if (polls % kPollsPerLook != 0) continue;
        start_ns = look_around(comm, call, phase, ranks, start_ns, polls / kPollsPerLook - 1, late != nullptr);
        if (start_ns == kStopped) return false;
        if (start_ns == kLate) {
            *late = __reduce_or_sync(~0u, ranks);
            return true;
        }
    }
}

// One warp waits until it can go on in one of several ways, which `choose(awaited)` numbers from 1: the same in all lanes, or 0
// while there is none, and then `awaited` has the ranks that a lane waits for, a bit each. 0: the call has failed.
template <typename Choose>
__device__ inline uint32_t wait_for_choice(const Comm& comm, const Call& call, Phase phase, Choose choose) {
    uint64_t start_ns = 0;
    for (uint32_t polls = 1;; ++polls) {
        uint32_t awaited = 0;
        const uint32_t chosen = choose(awaited);
        if (chosen != 0) return chosen;
        if (polls % kPollsPerLook != 0) continue;
        start_ns = look_around(comm, call, phase, awaited, start_ns, polls / kPollsPerLook - 1, false);
        if (start_ns == kStopped) return 0;
    }
}

// One warp waits until `ready()` is true in some lane that waits for a `rank`; the answer is a bit for each of those, 0 if
// the call has failed. Lanes of which `rank` is negative wait for nobody; one lane at least waits.
template <typename Ready>
__device__ inline uint32_t wait_for_some(const Comm& comm, const Call& call, Phase phase, int rank, Ready ready) {
    const uint32_t of_lane = rank >= 0 ? 1u << rank : 0;
    return wait_for_choice(comm, call, phase, [&](uint32_t& awaited) {
        awaited = of_lane;
        return __ballot_sync(~0u, of_lane != 0 && ready());
    });
}

// One warp waits until `ready(r)` for every rank r; lane r looks after rank r. As above.
template <typename Ready>
__device__ inline bool wait_for_ranks(const Comm& comm, const Call& call, Phase phase, Ready ready,
                                      uint32_t* late = nullptr) {
    const int lane = lane_index();
    auto awaited = [&] { return lane < comm.num_ranks && !ready(lane) ? 1u << lane : 0u; };
    return wait_in_lanes(comm, call, phase, awaited, late);
}

// One thread waits for one rank. `awaited()`, called at the bad end: all ranks that others wait for just then.
template <typename Ready, typename Awaited>
__device__ inline bool wait_for_rank(const Comm& comm, const Call& call, Phase phase, Ready ready, Awaited awaited) {
    uint64_t start_ns = 0;
    for (uint32_t polls = 1; !ready(); ++polls) {
        if (polls % kPollsPerLook != 0) continue;
        const uint64_t now_ns = ptx::globaltimer_ns();
        if (start_ns == 0) start_ns = now_ns;
        const ErrorKind reason = reason_to_stop(comm, now_ns - start_ns, polls / kPollsPerLook - 1);
        if (reason == kNoError) continue;
        give_up(comm, call, reason, phase, awaited(), now_ns - start_ns);
        return false;
    }
    return true;
}

__device__ inline bool reached(uint32_t word, uint32_t sequence) { return static_cast<int32_t>(word - sequence) >= 0; }

}  // namespace epcomm
