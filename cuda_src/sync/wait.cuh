// wait.cuh: bounded waits, and what happens when one of them ends badly.
//
// Nothing traps: a wait that fails writes one error record for the host, poisons all ranks, so that their waits end too,
// and returns false; the kernel then leaves by its ordinary way out. The CUDA context stays usable.
#pragma once

#include "common/layout.cuh"
#include "ptx/memory.cuh"

namespace epcomm {

// Which call a kernel is.
struct Call {
    Operation operation;
    uint32_t sequence;
    uint32_t parity;
};

// Write the error record unless an earlier error has it.
__device__ __noinline__ void record_error(const Comm& comm, const Call& call, ErrorKind kind, Phase phase,
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
    for (int r = 0; r < comm.num_ranks; ++r) ptx::st_relaxed_sys(&comm.of(r).poison, 1u + comm.rank);
}

// A rank has given up: say so on this one.
__device__ __noinline__ void record_poison(const Comm& comm, const Call& call, Phase phase, uint64_t elapsed_ns) {
    const uint32_t poison = ptx::ld_relaxed_sys(&comm.own().poison);
    record_error(comm, call, kPoisoned, phase, 1u << (poison - 1), elapsed_ns);
}

// How long one thread has been waiting.
struct Patience {
    uint64_t start_ns = 0;  // of the first look
    uint64_t elapsed_ns = 0;
    uint32_t num_looks = 0;
};

// Why waiting on is pointless, if it is; called by one thread now and then.
__device__ __noinline__ ErrorKind reason_to_stop(const Comm& comm, Patience& patience) {
    const uint64_t now_ns = ptx::globaltimer_ns();
    if (patience.num_looks++ == 0) patience.start_ns = now_ns;
    patience.elapsed_ns = now_ns - patience.start_ns;
    if (ptx::ld_relaxed_sys(&comm.own().poison) != 0) return kPoisoned;
    // The word lies in host memory: a look is slow, and disturbs the others.
    if (patience.num_looks % 64 == 0 && ptx::ld_relaxed_sys(&comm.page()->abort) != 0) return kAborted;
    return patience.elapsed_ns > comm.timeout_ns ? kTimeout : kNoError;
}

// The waiting thread leaves for that reason, and so must all others.
__device__ __noinline__ void give_up(const Comm& comm, const Call& call, ErrorKind reason, Phase phase,
                                     uint32_t awaited, uint64_t elapsed_ns) {
    if (reason == kPoisoned) {
        record_poison(comm, call, phase, elapsed_ns);
    } else {
        record_error(comm, call, reason, phase, awaited, elapsed_ns);
        poison_all(comm);
    }
}

inline constexpr uint32_t kPollsPerLook = 32;

// One warp waits until `ready(r)` for every rank r; lane r looks after rank r. False: the call has failed. With `late`
// it may go on without ranks: those that did not come in time, a bit each.
template <typename Ready>
__device__ inline bool wait_for_ranks(const Comm& comm, const Call& call, Phase phase, Ready ready,
                                      uint32_t* late = nullptr) {
    const int lane = lane_index();
    Patience patience;
    bool pending = lane < comm.num_ranks;
    for (uint32_t polls = 1;; ++polls) {
        if (pending) pending = !ready(lane);
        const uint32_t awaited = __ballot_sync(~0u, pending);
        if (awaited == 0) return true;
        if (polls % kPollsPerLook == 0) {
            ErrorKind reason = lane == 0 ? reason_to_stop(comm, patience) : kNoError;
            reason = static_cast<ErrorKind>(__shfl_sync(~0u, static_cast<uint32_t>(reason), 0));
            if (reason == kNoError) continue;
            if (reason == kTimeout && late != nullptr) {
                *late = awaited;
                return true;
            }
            if (lane == 0) give_up(comm, call, reason, phase, awaited, patience.elapsed_ns);
            return false;
        }
    }
}

// One thread waits for one rank. `awaited()`, called at the bad end: all ranks that others wait for just then.
template <typename Ready, typename Awaited>
__device__ inline bool wait_for_rank(const Comm& comm, const Call& call, Phase phase, Ready ready, Awaited awaited) {
    Patience patience;
    for (uint32_t polls = 1; !ready(); ++polls) {
        if (polls % kPollsPerLook != 0) continue;
        const ErrorKind reason = reason_to_stop(comm, patience);
        if (reason == kNoError) continue;
        give_up(comm, call, reason, phase, awaited(), patience.elapsed_ns);
        return false;
    }
    return true;
}

__device__ inline bool reached(uint32_t word, uint32_t sequence) { return static_cast<int32_t>(word - sequence) >= 0; }

}  // namespace epcomm
