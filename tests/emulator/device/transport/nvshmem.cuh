// nvshmem.cuh: twin of cuda_src/transport/nvshmem.cuh. The heaps of all PEs are mapped here; what is put arrives later.
//
// `emulated_nvshmem` is what registering a module fills, see tests/helpers/emulated_nvshmem.py.
#pragma once

#include "common/types.cuh"
#include "emulator/builtins.h"
#include "emulator/network.h"

namespace emulator {

inline constexpr int kMaxPes = 64;
inline constexpr int kMaxQueuePairs = 128;

struct Nvshmem {
    epcomm::int32_t pe, num_pes;
    epcomm::uint64_t heap_bytes;
    epcomm::uint64_t heap[kMaxPes];  // by PE: address of its heap in this process
    epcomm::int32_t num_queue_pairs, queue_pair[kMaxQueuePairs];  // handles
    epcomm::uint32_t num_messages[kMaxQueuePairs], num_words[kMaxQueuePairs];  // that went through each
    epcomm::uint32_t num_by_default;  // through none of them
};

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) emulator::Nvshmem emulated_nvshmem;
emulator::Nvshmem emulated_nvshmem{};

namespace emulator {

// The same place in the heap of `pe`.
template <typename T> T* in_heap_of(T* address, epcomm::uint64_t num_bytes, int pe) {
    const Nvshmem& state = emulated_nvshmem;
    if (state.num_pes == 0) fail("NVSHMEM: the module is not registered");
    if (pe < 0 || pe >= state.num_pes) fail("NVSHMEM: PE %d of %d", pe, state.num_pes);
    const epcomm::uint64_t offset = reinterpret_cast<epcomm::uint64_t>(address) - state.heap[state.pe];
    if (offset > state.heap_bytes || num_bytes > state.heap_bytes - offset) {
        fail("NVSHMEM: %p is not in the symmetric heap", static_cast<const volatile void*>(address));
    }
    return reinterpret_cast<T*>(state.heap[pe] + offset);
}

// Count what goes through a queue pair, which says nothing of its order.
inline void count(int queue_pair, int default_queue_pair, bool is_message) {
    Nvshmem& state = emulated_nvshmem;
    epcomm::uint32_t* counter = queue_pair == default_queue_pair ? &state.num_by_default : nullptr;
    for (int i = 0; i < state.num_queue_pairs; ++i) {
        if (state.queue_pair[i] == queue_pair) counter = is_message ? &state.num_messages[i] : &state.num_words[i];
    }
    if (counter == nullptr) fail("NVSHMEM: there is no queue pair %d", queue_pair);
    __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED);
}

}  // namespace emulator

namespace epcomm::nvshmem {

inline constexpr int kDefaultQueuePair = 1;
inline constexpr bool kHasQueuePairs = true;

inline int my_pe() { return emulated_nvshmem.pe; }

inline int num_pes() { return emulated_nvshmem.num_pes; }

// Loads reach PEs of higher numbers: so each pair of PEs has both cases.
inline void* reached(void* place, int pe) {
    char* there = emulator::in_heap_of(static_cast<char*>(place), 1, pe);
    return pe > my_pe() ? there : nullptr;
}

inline void set_signal(uint64_t* signal, uint64_t value, int pe, int queue_pair = kDefaultQueuePair) {
    emulator::yield();
    emulator::count(queue_pair, kDefaultQueuePair, false);
    emulator::Network::instance().send({nullptr, nullptr, 0, emulator::in_heap_of(signal, 8, pe), 8, value, pe, 0});
}

template <typename Word>
inline void put_word(Word* to, Word value, int pe, int queue_pair = kDefaultQueuePair) {
    emulator::yield();
    emulator::count(queue_pair, kDefaultQueuePair, false);
    const int size = sizeof(Word);
    emulator::Network::instance().send({nullptr, nullptr, 0, emulator::in_heap_of(to, size, pe), size, value, pe, 0});
}

inline void fence() { emulator::Network::instance().fence(); }

inline void quiet() {
    while (!emulator::Network::instance().is_quiet()) {
        emulator::yield();
        sched_yield();
    }
}

inline void put_signal(void* to, const void* from, uint64_t num_bytes, uint64_t* signal, uint64_t value, int pe,
                       int queue_pair = kDefaultQueuePair) {
    __syncwarp();
    if (lane_index() == 0) {
        emulator::count(queue_pair, kDefaultQueuePair, true);
        char* there = emulator::in_heap_of(static_cast<char*>(to), num_bytes, pe);
        uint64_t* word = emulator::in_heap_of(signal, 8, pe);
        emulator::Network::instance().send({there, static_cast<const char*>(from), num_bytes, word, 8, value, pe, 0});
    }
    __syncwarp();
}

inline void put_signal_block(void* to, const void* from, uint64_t num_bytes, uint64_t* signal, uint64_t value,
                             int pe, int queue_pair = kDefaultQueuePair) {
    __syncthreads();
    if (warp_index() == 0) put_signal(to, from, num_bytes, signal, value, pe, queue_pair);
    __syncthreads();
}

}  // namespace epcomm::nvshmem
