// entry.cuh: how ranks enter a dispatch or a combine, and what they learn from each other there.
//
// A rank enters with where its rows are, and with a digest of the values that must be equal on all ranks. If one rank
// says that its input is bad, or if the digests differ, all ranks see it and leave in step, moving nothing; the Buffer
// stays usable, and the host finds the reason in its page.
#pragma once

#include "ptx/bulk.cuh"
#include "sync/call.cuh"

namespace epcomm {

// What a rank enters with; a part of the argument structs.
struct EntryArgs {
    uint32_t rows, metadata;  // offsets of this rank's blocks, or kThroughWindow, kRejected, kNoBlock
    int32_t num_tokens;
    uint32_t unused;
    uint32_t agreed[kNumEntryAgreed];
};
static_assert(sizeof(EntryArgs) == 64);

// What the other ranks have entered with.
struct Entry {
    uint32_t rows, metadata, num_tokens, digest;
};

__device__ inline uint32_t digest_of(const uint32_t (&values)[kNumEntryAgreed]) {
    uint32_t digest = 2166136261u;  // FNV-1a, a word at a time
    for (int i = 0; i < kNumEntryAgreed; ++i) digest = (digest ^ values[i]) * 16777619u;
    return digest;
}

__device__ inline EntryCells* entry_cells(Signals& signals, const Call& call) {
    return (call.operation == kDispatch ? signals.dispatch_entry : signals.combine_entry)[call.parity];
}

__device__ inline uint64_t (*agreed_cells(Signals& signals, const Call& call))[kNumEntryAgreed] {
    const bool has_slots = call.operation >= kLowLatencyDispatch;
    return signals.entry_agreed[has_slots ? call.operation : 2 * (call.operation - kDispatch) + call.parity];
}

// One warp: enter at every rank. Memory that the values speak of was finished by earlier kernels of this stream; the
// fence carries that to the peers.
__device__ inline void post_entry(const Comm& comm, const Call& call, const EntryArgs& entry) {
    const int lane = lane_index();
    if (lane >= comm.num_ranks) return;
    ptx::fence_acq_rel_sys();
    EntryCells& mine = entry_cells(comm.own(), call)[comm.rank];
    // RELEASE entry[me] at rank `lane`. Pairs with the ACQUIRE in await_entries, there.
    set_word(comm, lane, &mine.rows, tagged(call.sequence, entry.rows));
    set_word(comm, lane, &mine.metadata, tagged(call.sequence, entry.metadata));
    set_word(comm, lane, &mine.num_tokens, tagged(call.sequence, entry.num_tokens));
    set_word(comm, lane, &mine.digest, tagged(call.sequence, digest_of(entry.agreed)));
}

// One warp: wait for the entries of all ranks.
__device__ inline bool await_entries(const Comm& comm, const Call& call, Entry (&entries)[kMaxRanks]) {
    const EntryCells* arrived = entry_cells(comm.own(), call);
    return wait_for_ranks(comm, call, kPhaseEntry, [&](int r) {
        // ACQUIRE entry[r]. Pairs with post_entry.
        const uint64_t rows = ptx::ld_acquire_sys(&arrived[r].rows);
        const uint64_t metadata = ptx::ld_acquire_sys(&arrived[r].metadata);
        const uint64_t num_tokens = ptx::ld_acquire_sys(&arrived[r].num_tokens);
        const uint64_t digest = ptx::ld_acquire_sys(&arrived[r].digest);
        entries[r] = {static_cast<uint32_t>(rows), static_cast<uint32_t>(metadata), static_cast<uint32_t>(num_tokens),
                      static_cast<uint32_t>(digest)};
        return rows >> 32 == call.sequence && metadata >> 32 == call.sequence && num_tokens >> 32 == call.sequence &&
               digest >> 32 == call.sequence;
    });
}

// One warp of one block, when digests differ: tell all ranks the values, and the host those of all ranks. Ranks that are
// not `awaited`, a bit each, are said to have this rank's values, and so are those that do not come in time, if
// `leaves_late`.
__device__ __noinline__ void report_mismatch(const Comm& comm, Call call, const uint32_t (&agreed)[kNumEntryAgreed],
                                             uint32_t awaited = ~0u, bool leaves_late = false) {
    const int lane = lane_index();
    if (lane < comm.num_ranks) {
        uint64_t* mine = agreed_cells(comm.own(), call)[comm.rank];
        // Each cell carries its own flag: pairs with the loads below, at rank `lane`.
        for (int i = 0; i < kNumEntryAgreed; ++i) set_word(comm, lane, &mine[i], tagged(call.sequence, agreed[i]));
    }
    HostPage* page = comm.page();
    const uint32_t num_before = *const_cast<volatile uint32_t*>(&page->num_mismatches);
    const bool is_free = num_before == ptx::ld_relaxed_sys(&page->seen_mismatches);
    uint32_t late = 0;
    auto ready = [&](int r) {
        bool arrived = true;
        for (int i = 0; i < kNumEntryAgreed; ++i) {
            const uint64_t value = ptx::ld_relaxed_sys(&agreed_cells(comm.own(), call)[r][i]);
            const bool is_there = value >> 32 == call.sequence;
            arrived = arrived && is_there;
            if (is_free) page->mismatch[r * kNumEntryAgreed + i] = is_there ? static_cast<uint32_t>(value) : agreed[i];
        }
        return arrived || !(awaited >> r & 1);
    };
    const bool good = wait_for_ranks(comm, call, kPhaseEntry, ready, leaves_late ? &late : nullptr);
    ptx::fence_acq_rel_sys();
    __syncwarp();
    if (lane == 0 && good) {
        if (is_free) page->mismatch_operation = call.operation;
        // RELEASE the record -> the host, which reads it when the number has changed.
        ptx::st_release_sys(&page->num_mismatches, num_before + 1);
    }
}

// All threads of a block: enter, and learn what all ranks entered with. False: the call has failed, or nothing moves.
__device__ inline bool exchange_entries(const Comm& comm, const Call& call, const EntryArgs& entry,
                                        Entry (&entries)[kMaxRanks]) {
    bool good = true;
    if (warp_index() == 0) {
        if (blockIdx.x == 0) post_entry(comm, call, entry);
        good = await_entries(comm, call, entries);
        const int lane = lane_index();
        const bool is_there = good && lane < comm.num_ranks;
        const uint32_t rejecting = __ballot_sync(~0u, is_there && entries[lane].rows == kRejected);
        // The entries of all ranks are the same everywhere, so all ranks come to the same answer.
        const bool differs = __any_sync(~0u, is_there && entries[lane].digest != digest_of(entry.agreed));
        if (rejecting != 0) {
            if (blockIdx.x == 0 && (rejecting >> lane & 1))
                ++*const_cast<volatile uint32_t*>(&comm.page()->num_rejections[lane]);
            good = false;
        } else if (differs) {
            if (blockIdx.x == 0) report_mismatch(comm, call, entry.agreed);
            good = false;
        }
    }
    return __syncthreads_and(good);
}

// All threads of a block: enter, and find where the rows of all ranks are. `find_places(args, shared, r)` is the
// operation's own: one thread for rank r; false if the offsets point out of its region. False: as above.
template <typename Args, typename Shared>
__device__ inline bool enter(const Args& args, const Call& call, Shared& shared) {
    const Comm& comm = args.comm;
    if (!exchange_entries(comm, call, args.entry, shared.entries)) return false;
    bool good = true, is_windowed = false;
    const int r = threadIdx.x;
    if (r < comm.num_ranks) {
        good = find_places(args, shared, r);
        is_windowed = shared.places[r].is_windowed;
        if (!good) {
            record_error(comm, call, kBadOffset, kPhaseEntry, 1u << r, 0);
            poison_all(comm);
        }
    }
    if (warp_index() == 0) {
        const uint32_t windowed = __ballot_sync(~0u, is_windowed);
        if (lane_index() == 0) shared.windowed = windowed;
    }
#if __CUDA_ARCH__ >= 900
    ptx::fence_proxy_async_global();  // after the acquire of the entries, before bulk copies of what they speak of
#endif
    return __syncthreads_and(good);
}

}  // namespace epcomm
