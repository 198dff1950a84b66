// math.cuh: logarithm and power of two as the GPU has them, one instruction each. Subnormals are taken for 0.
#pragma once

namespace epcomm::ptx {

__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x) : "memory");
    return y;
}

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x) : "memory");
    return y;
}

}  // namespace epcomm::ptx
