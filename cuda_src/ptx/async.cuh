// async.cuh: copies of 16 bytes from global to shared memory that a thread does not wait for (cp.async, since sm_80).
//
// Each thread reads back what it has copied itself, so no barrier is needed; its copies are complete in the order of
// their groups. They pass over the L1 cache.
#pragma once

#include "ptx/memory.cuh"

namespace epcomm::ptx {

// If not `is_there`, nothing is read, and zeros are written.
__device__ __forceinline__ void async_copy(uint32_t shared, const void* global, bool is_there) {
    const uint32_t num_bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kPending` groups of this thread are not complete.
template <int kPending> __device__ __forceinline__ void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace epcomm::ptx
