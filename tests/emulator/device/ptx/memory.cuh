// memory.cuh: twin of cuda_src/ptx/memory.cuh.
//
// A load with an order is what threads wait with: before each of them, others may write.
#pragma once

#include "common/types.cuh"
#include "emulator/builtins.h"

namespace emulator {

template <int kOrder, typename T> T look(const T* address) {
    yield();
    const T value = __atomic_load_n(address, kOrder);
    note_poll(address, value);
    return value;
}

template <int kOrder, typename T> void put(T* address, T value) {
    __atomic_store_n(address, value, kOrder);
    note_progress();
}

}  // namespace emulator

namespace epcomm::ptx {

inline uint32_t ld_acquire_sys(const uint32_t* address) { return emulator::look<__ATOMIC_ACQUIRE>(address); }
inline uint64_t ld_acquire_sys(const uint64_t* address) { return emulator::look<__ATOMIC_ACQUIRE>(address); }
inline uint32_t ld_relaxed_sys(const uint32_t* address) { return emulator::look<__ATOMIC_RELAXED>(address); }
inline uint64_t ld_relaxed_sys(const uint64_t* address) { return emulator::look<__ATOMIC_RELAXED>(address); }
inline uint32_t ld_acquire_gpu(const uint32_t* address) { return emulator::look<__ATOMIC_ACQUIRE>(address); }

inline void st_release_sys(uint32_t* address, uint32_t value) { emulator::put<__ATOMIC_RELEASE>(address, value); }
inline void st_release_sys(uint64_t* address, uint64_t value) { emulator::put<__ATOMIC_RELEASE>(address, value); }
inline void st_relaxed_sys(uint32_t* address, uint32_t value) { emulator::put<__ATOMIC_RELAXED>(address, value); }
inline void st_relaxed_sys(uint64_t* address, uint64_t value) { emulator::put<__ATOMIC_RELAXED>(address, value); }

inline uint32_t atom_add_acq_rel_gpu(uint32_t* address, uint32_t value) {
    emulator::begin_atomic();
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

inline uint32_t atom_add_relaxed_gpu(uint32_t* address, uint32_t value) {
    emulator::begin_atomic();
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline uint64_t atom_add_relaxed_gpu(uint64_t* address, uint64_t value) {
    emulator::begin_atomic();
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline void red_add_relaxed_gpu(uint64_t* address, uint64_t value) { atom_add_relaxed_gpu(address, value); }

inline uint32_t ld_acquire_block(const uint32_t* shared) { return emulator::look<__ATOMIC_ACQUIRE>(shared); }
inline void st_release_block(uint32_t* shared, uint32_t value) { emulator::put<__ATOMIC_RELEASE>(shared, value); }

inline uint32_t atom_cas_relaxed_gpu(uint32_t* address, uint32_t expected, uint32_t value) {
    return emulator::compare_and_swap(address, expected, value);
}

inline uint4 ld_shared(uint32_t address) {
    return *static_cast<const uint4*>(emulator::at_offset(address, sizeof(uint4)));
}

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline uint64_t globaltimer_ns() { return emulator_globaltimer(); }

inline void bar_sync(int id, int num_threads, emulator::Where where = emulator::Where::here()) {
    if (num_threads <= 0) emulator::fail("bar_sync (%s:%d) of %d threads", where.file, where.line, num_threads);
    emulator::meet_block(id, num_threads, "bar_sync", false, where);
}

}  // namespace epcomm::ptx
