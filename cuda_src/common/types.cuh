// types.cuh: the integer types, and what every file may assume about a job.
#pragma once

#include <cuda/std/cstdint>

namespace epcomm {

using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uint8_t;

inline constexpr int kWarp = 32;
inline constexpr int kMaxRanks = 32;         // of a job: one lane of a warp for each
inline constexpr int kMaxTopk = 32;          // one lane for each choice
inline constexpr int kMaxLocalExperts = 1024;

using Vector = uint4;  // 16 bytes: the unit in which rows move

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int warps_per_block() { return blockDim.x / kWarp; }

// All lanes: the sum of `value` over the lanes up to this one.
__device__ __forceinline__ int sum_to_lane(int value) {
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(~0u, value, step);
        if (lane_index() >= step) value += other;
    }
    return value;
}

// Division of n < 2^31 by a number that only the host knows beforehand. Twin: epcomm/kernels/arguments.py.
struct Divisor {
    uint32_t multiplier, shift;
    __device__ __forceinline__ uint32_t divide(uint32_t n) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
    }
};

template <typename T> __device__ __forceinline__ T* pointer(uint64_t address) { return reinterpret_cast<T*>(address); }

__host__ __device__ constexpr uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

}  // namespace epcomm
