// nvshmem.cuh: puts, words and signals to any rank of any node; the only file that includes headers of NVSHMEM.
//
// Programs that include it are compiled relocatable and linked with NVSHMEM's device library (Program(nvshmem=True),
// see epcomm/jit/linker.py), and their module is registered with the host library before its first launch
// (epcomm/memory/nvshmem.py).
//
// Addresses are those of this rank's symmetric heap: `to` and `signal` name the place at the same offset in the heap of
// the processing element (PE) `pe`. `from` may lie in the heap, or in any memory of this GPU where the PE is reached by
// plain stores (NVLink, PCIe) alone. A warp writes to such a PE itself: NVSHMEM's own copy has 16 bytes a lane under way.
//
// Order. A put_signal delivers its signal after its own bytes, and says nothing of other puts: those of a warp or block
// are ordered by waiting for their signals alone. Of the words and signals that one thread sends to one PE, what comes
// before its fence() is delivered before what comes after it; quiet() returns when all that it has sent is delivered. All
// this holds whatever queue pairs they go through: fence() and quiet() are those of NVSHMEM for all of them.
// Whoever waits for a signal reads the word in its own memory with ptx::ld_acquire_sys, block by block, in a bounded
// wait: NVSHMEM's own waits, and quiet(), have no bound, nor has a put that finds the network card's queue full.
//
// Queue pairs. From NVSHMEM 3.5 on the sender of what goes through the network says through which of the queue pairs that
// the host library has made (epcomm/memory/nvshmem_start.py); a handle is good for every PE. Earlier ones choose by
// themselves, and so do all for kDefaultQueuePair and for PEs that are reached by plain stores.
#pragma once

#include <cuda/std/cstdint>

// What NVSHMEM's transfer functions need comes before the renaming below, which must touch their declarations alone.
#include <device_host/nvshmem_common.cuh>
#include <device_host_transport/nvshmem_constants.h>
#include <non_abi/device/threadgroup/nvshmemi_common_device_defines.cuh>
#if __has_include(<non_abi/nvshmemi_region_types.h>)  // since 3.8
#include <device/nvshmem_device_macros.h>
#include <non_abi/device/common/nvshmemi_region_state.cuh>
#include <non_abi/nvshmemi_region_types.h>
#endif

// The device library was built by nvcc, for which uint64_t is unsigned long; for NVRTC it is unsigned long long. That
// is part of the mangled name of a function: declared in NVRTC's way, put_signal would not be found in the library.
#define uint64_t unsigned long
#include <non_abi/device/pt-to-pt/nvshmemi_transfer_api.cuh>
#undef uint64_t

// Point to point alone. nvshmem.h would bring the collectives: seconds of compilation, and code that NVRTC of CUDA 12.4
// rejects.
#include <non_abi/nvshmem_build_options.h>

#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>

#include "common/types.cuh"
#include "ptx/memory.cuh"

static_assert(NVSHMEM_VENDOR_VERSION >= 30405, "NVSHMEM 3.4.5 or newer is needed: see epcomm/jit/nvshmem_wheel.py");

namespace epcomm {

// All lanes of a warp: copy `num_bytes`, a multiple of 16 as the addresses are, by loads and stores.
__device__ __forceinline__ void copy_by_warp(void* to, const void* from, uint64_t num_bytes) {
    constexpr int kUnroll = 4;
    const Vector* source = static_cast<const Vector*>(from);
    Vector* target = static_cast<Vector*>(to);
    const uint64_t num_vectors = num_bytes / sizeof(Vector);
    for (uint64_t first = lane_index(); first - lane_index() < num_vectors; first += kUnroll * kWarp) {
        Vector values[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (first + i * kWarp < num_vectors) values[i] = source[first + i * kWarp];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (first + i * kWarp < num_vectors) target[first + i * kWarp] = values[i];
    }
}

}  // namespace epcomm

namespace epcomm::nvshmem {

inline constexpr int kDefaultQueuePair = 1;

#if NVSHMEM_VENDOR_VERSION >= 30500
inline constexpr bool kHasQueuePairs = true;
static_assert(kDefaultQueuePair == NVSHMEMX_QP_DEFAULT, "the handle for NVSHMEM's own choice has another number");
#else
inline constexpr bool kHasQueuePairs = false;
#endif

__device__ __forceinline__ int my_pe() { return nvshmem_my_pe(); }

__device__ __forceinline__ int num_pes() { return nvshmem_n_pes(); }

// Where this PE reaches a place of another one by loads and stores, or null, whether the other one reaches this PE or not.
__device__ __forceinline__ void* reached(void* place, int pe) { return nvshmem_ptr(place, pe); }

// All lanes of a warp, with equal arguments: copy `num_bytes` to the PE, and set its word `signal` to `value` when they
// are there; addresses and size are multiples of 16. May return before; `from` is in use until then. Begins and ends with
// __syncwarp, so the lanes may have written `from` just before.
__device__ __forceinline__ void put_signal(void* to, const void* from, uint64_t num_bytes, uint64_t* signal,
                                           uint64_t value, int pe, int queue_pair = kDefaultQueuePair) {
    void* there = nvshmem_ptr(to, pe);
    if (there == nullptr) {
#if NVSHMEM_VENDOR_VERSION >= 30500
        nvshmemx_qp_char_put_signal_nbi_warp(static_cast<char*>(to), static_cast<const char*>(from), num_bytes, signal,
                                             value, NVSHMEM_SIGNAL_SET, pe, queue_pair);
#else
        nvshmemx_putmem_signal_nbi_warp(to, from, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, pe);
#endif
        return;
    }
    __syncwarp();
    copy_by_warp(there, from, num_bytes);
    __syncwarp();
    if (lane_index() == 0) {
        // What all lanes have written: the fence follows __syncwarp.
        ptx::fence_acq_rel_sys();
        ptx::st_relaxed_sys(static_cast<uint64_t*>(nvshmem_ptr(signal, pe)), value);
    }
    __syncwarp();
}

// All threads of a block, with equal arguments: as above, with __syncthreads.
__device__ __forceinline__ void put_signal_block(void* to, const void* from, uint64_t num_bytes, uint64_t* signal,
                                                 uint64_t value, int pe, int queue_pair = kDefaultQueuePair) {
#if NVSHMEM_VENDOR_VERSION >= 30500
    nvshmemx_qp_char_put_signal_nbi_block(static_cast<char*>(to), static_cast<const char*>(from), num_bytes, signal,
                                          value, NVSHMEM_SIGNAL_SET, pe, queue_pair);
#else
    nvshmemx_putmem_signal_nbi_block(to, from, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, pe);
#endif
}

// One thread: set the PE's word. Not ordered behind what this thread sends: fence() first. Nor behind its loads: a fence of
// the memory model, ptx::fence_acq_rel_sys, first.
__device__ __forceinline__ void set_signal(uint64_t* signal, uint64_t value, int pe,
                                           int queue_pair = kDefaultQueuePair) {
#if NVSHMEM_VENDOR_VERSION >= 30500
    nvshmemx_qp_signal_op(signal, value, NVSHMEM_SIGNAL_SET, pe, queue_pair);
#else
    nvshmemx_signal_op(signal, value, NVSHMEM_SIGNAL_SET, pe);
#endif
}

// One thread: write 8 or 4 aligned bytes, which arrive whole; in order as set_signal. Lanes of a warp may name different PEs:
// before 3.8, NVSHMEM sends what a full warp puts to the PE of its first lane.
template <typename Word>
__device__ __forceinline__ void put_word(Word* to, Word value, int pe, int queue_pair = kDefaultQueuePair) {
    static_assert(sizeof(Word) == 8 || sizeof(Word) == 4);
    const uint32_t lanes = __activemask();
    for (uint32_t rest = lanes; rest != 0;) {
        const bool is_next = __shfl_sync(lanes, pe, __ffs(rest) - 1) == pe;
        rest &= ~__ballot_sync(lanes, is_next);
        if (!is_next) continue;
#if NVSHMEM_VENDOR_VERSION >= 30500
        if constexpr (sizeof(Word) == 8) nvshmemx_qp_uint64_p(to, value, pe, queue_pair);
        if constexpr (sizeof(Word) == 4) nvshmemx_qp_uint32_p(to, value, pe, queue_pair);
#else
        if constexpr (sizeof(Word) == 8) nvshmem_uint64_p(to, value, pe);
        if constexpr (sizeof(Word) == 4) nvshmem_uint32_p(to, value, pe);
#endif
    }
}

// One thread: see Order above.
__device__ __forceinline__ void fence() { nvshmem_fence(); }

// One thread: see Order above. Unbounded.
__device__ __forceinline__ void quiet() { nvshmem_quiet(); }

}  // namespace epcomm::nvshmem
