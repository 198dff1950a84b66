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
__device__ __noinline__ void record_error(const Comm& comm, const Call& call, ErrorKind kind, Phase phase, uint32_t awaited,
                                    uint32_t elapsed_us) {
    if (ptx::atom_cas_relaxed_gpu(&comm.state().failed, 0, 1) != 0) return;
    HostPage* page = comm.page();
    page->operation = call.operation;
    page->sequence = call.sequence;
    page->phase = phase;
    page->awaited = awaited;
    page->elapsed_us = elapsed_us;
    // RELEASE error_kind -> the host, which reads the record when it sees a kind.
    ptx::st_release_sys(&page->error_kind, kind);
}

// End the waits of all ranks; this Buffer is broken for good.
__device__ __noinline__ void poison_all(const Comm& comm) {
    for (int r = 0; r < comm.num_ranks; ++r) ptx::st_relaxed_sys(&comm.of(r).poison, 1u + comm.rank);
}

// Whether waiting on is pointless; called by one thread now and then. `start_ns` is 0 before the first call.
__device__ __noinline__ bool should_stop(const Comm& comm, const Call& call, Phase phase, uint32_t awaited,
                                         uint64_t& start_ns, uint32_t num_looks) {
    const uint64_t now_ns = ptx::globaltimer_ns();
    if (start_ns == 0) start_ns = now_ns;
    const uint64_t elapsed_ns = now_ns - start_ns;
    const uint32_t elapsed_us = static_cast<uint32_t>(min(elapsed_ns / 1000, 0xffffffffull));
    const uint32_t poison = ptx::ld_relaxed_sys(&comm.own().poison);
    if (poison != 0) {
        record_error(comm, call, kPoisoned, phase, 1u << (poison - 1), elapsed_us);
        return true;
    }
    // The word lies in host memory: a look is slow, and disturbs the others.
    if (num_looks % 64 == 63 && ptx::ld_relaxed_sys(&comm.page()->abort) != 0) {
        record_error(comm, call, kAborted, phase, awaited, elapsed_us);
        poison_all(comm);
        return true;
    }
    if (elapsed_ns > comm.timeout_ns) {
        record_error(comm, call, kTimeout, phase, awaited, elapsed_us);
        poison_all(comm);
        return true;
    }
    return false;
}

// One warp waits until `ready(r)` for every rank r; lane r looks after rank r. False: the call has failed.
template <typename Ready>
__device__ inline bool wait_for_ranks(const Comm& comm, const Call& call, Phase phase, Ready ready) {
    const int lane = lane_index();
    uint64_t start_ns = 0;
    bool pending = lane < comm.num_ranks;
    for (uint32_t polls = 1;; ++polls) {
        if (pending) pending = !ready(lane);
        const uint32_t awaited = __ballot_sync(~0u, pending);
        if (awaited == 0) return true;
        if (polls % 32 == 0) {
            bool stop = false;
            if (lane == 0) stop = should_stop(comm, call, phase, awaited, start_ns, polls / 32);
            if (__shfl_sync(~0u, stop, 0)) return false;
        }
    }
}

// One thread waits for one rank.
template <typename Ready>
__device__ inline bool wait_for_rank(const Comm& comm, const Call& call, Phase phase, int rank, Ready ready) {
    uint64_t start_ns = 0;
    for (uint32_t polls = 1; !ready(); ++polls) {
        if (polls % 32 == 0 && should_stop(comm, call, phase, 1u << rank, start_ns, polls / 32)) return false;
    }
    return true;
}

__device__ inline bool reached(uint32_t word, uint32_t sequence) { return static_cast<int32_t>(word - sequence) >= 0; }

}  // namespace epcomm
