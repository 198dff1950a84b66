// peer.cuh: words and messages for other ranks: by plain stores where their memory is mapped here, else through NVSHMEM.
//
// Programs that are compiled with KERNEL_NVSHMEM are linked with NVSHMEM; for them `Comm::control` is a part of the
// symmetric heap, and 0 for ranks that are behind the network. For all others every rank is near.
#pragma once

#include "common/layout.cuh"
#include "ptx/memory.cuh"

#if KERNEL_NVSHMEM
#include "transport/nvshmem.cuh"
#endif

namespace epcomm {

#if KERNEL_NVSHMEM
inline constexpr bool kHasNetwork = true;
#else
inline constexpr bool kHasNetwork = false;
#endif

// Whether plain loads and stores reach the memory of rank r.
__device__ inline bool is_near(const Comm& comm, int r) { return !kHasNetwork || comm.control[r] != 0; }

#if KERNEL_NVSHMEM
// Through which queue pair this warp sends words, or messages. Posting to one is a matter of turns: so those that there are
// belong to one block each, or to as few as their number allows. And they deliver in turn: so words, which peers wait for,
// have one half of them, and need not queue behind the rows of messages. DeepEP V1 halves them, too.
__device__ inline int queue_pair(const Comm& comm, bool is_for_words) {
    if (!nvshmem::kHasQueuePairs) return nvshmem::kDefaultQueuePair;
    const QueuePairs& all = comm.queue_pairs();
    if (all.count == 0) return nvshmem::kDefaultQueuePair;
    const uint32_t num_for_words = all.count / 2, num_for_messages = all.count - num_for_words;
    const bool has_own = is_for_words && num_for_words != 0;
    const uint32_t count = has_own ? num_for_words : num_for_messages, first = has_own ? num_for_messages : 0;
    const uint32_t per_block = max(count / gridDim.x, 1u);
    return all.handle[first + (blockIdx.x * per_block + warp_index() % per_block) % count];
}
#endif

// One thread: set a word at rank r, at the place that `own` points to at this one. As a relaxed store, also in that a
// fence of this thread before it makes it a release.
template <typename Word> __device__ inline void set_word(const Comm& comm, int r, Word* own, Word value) {
#if KERNEL_NVSHMEM
    if (!is_near(comm, r)) {
        nvshmem::put_word(own, value, comm.pe[r], queue_pair(comm, true));
        return;
    }
#endif
    const uint64_t offset = reinterpret_cast<uint64_t>(own) - comm.control[comm.rank];
    ptx::st_relaxed_sys(pointer<Word>(comm.control[r] + offset), value);
}

// All lanes of a warp: copy `num_bytes`, at least one, to a rank behind the network, and set its word `there` to `value`
// behind them; `to` and `there` are places as above. `from` is part of the symmetric heap, and in use until the rank
// lets this one know that it has seen the word.
__device__ inline void send_message(const Comm& comm, int r, uint64_t to, uint64_t from, uint64_t num_bytes,
                                    uint64_t* there, uint64_t value) {
#if KERNEL_NVSHMEM
    nvshmem::put_signal(pointer<void>(to), pointer<void>(from), num_bytes, there, value, comm.pe[r],
                        queue_pair(comm, false));
#endif
}

// Where loads reach the place at rank r, behind the network, that `own` is at this one; or 0, as where there is none.
__device__ inline uint64_t reached(const Comm& comm, int r, uint64_t own) {
#if KERNEL_NVSHMEM
    return reinterpret_cast<uint64_t>(nvshmem::reached(pointer<void>(own), comm.pe[r]));
#else
    return 0;
#endif
}

// One thread: wait until all that this rank has sent through the network has arrived. Unbounded.
__device__ inline void drain_network() {
#if KERNEL_NVSHMEM
    nvshmem::quiet();
#endif
}

}  // namespace epcomm
