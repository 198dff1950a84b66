// bulk.cuh: twin of cuda_src/ptx/bulk.cuh.
//
// The fences between proxies do nothing: a copy takes place as a whole, at a moment that the emulator chooses, and sees
// all that was written before.
#pragma once

#include "emulator/copies.h"
#include "ptx/memory.cuh"

namespace epcomm::ptx {

#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasBulk = true;
#else
inline constexpr bool kHasBulk = false;
#endif

#if __CUDA_ARCH__ >= 900

using emulator::Where;

inline void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals, Where where = Where::here()) {
    emulator::init_mbarrier(barrier, num_arrivals, where);
}

inline void fence_mbarrier_init() { emulator::fence_mbarriers(); }

inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t num_bytes, Where where = Where::here()) {
    emulator::arrive_expecting(barrier, num_bytes, where);
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where = Where::here()) {
    emulator::wait_for_phase(barrier, parity, where);
}

inline void bulk_load(void* shared, const void* global, uint32_t num_bytes, uint64_t* barrier,
                      Where where = Where::here()) {
    emulator::begin_load(shared, global, num_bytes, barrier, where);
}

inline void bulk_store(void* global, const void* shared, uint32_t num_bytes, Where where = Where::here()) {
    emulator::begin_store(global, shared, num_bytes, where);
}

inline void bulk_commit() { emulator::commit_stores(); }

template <int kPending> inline void bulk_wait_read() { emulator::wait_for_reads(kPending); }

inline void bulk_wait_all() { emulator::wait_for_stores(); }

inline void fence_proxy_async_global() {}

inline void fence_proxy_async_shared() {}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace epcomm::ptx
