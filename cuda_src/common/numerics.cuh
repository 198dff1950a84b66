// numerics.cuh: the arithmetic that every backend must reproduce bit for bit.
//
// Device half of the contract that epcomm/reference.py states and epcomm/numerics.py implements for the host. Each
// operation is spelled with its rounding, because the compiler would otherwise contract a product and a sum into one
// rounding. Compile without --use_fast_math and with -ftz=false: subnormals are kept.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace epcomm {

inline constexpr int kFp8Block = 128;           // channels that share one scale
inline constexpr float kFp8Max = 448.0f;        // largest finite e4m3
inline constexpr float kFp8AmaxFloor = 1e-4f;   // smallest maximum that a scale is made of

// One term of a combine: start from +0, add the biases, then the ranks in ascending order.
__device__ __forceinline__ float accumulate(float acc, float x) { return __fadd_rn(acc, x); }

// One term of a low-latency combine: the product is rounded before it is added.
__device__ __forceinline__ float accumulate_weighted(float acc, float weight, float x) {
    return __fadd_rn(acc, __fmul_rn(weight, x));
}

// The one rounding at the end of a sum, to nearest even.
template <typename T> __device__ __forceinline__ T round_to(float acc);
template <> __device__ __forceinline__ float round_to<float>(float acc) { return acc; }
template <> __device__ __forceinline__ __half round_to<__half>(float acc) { return __float2half_rn(acc); }
template <> __device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float acc) {
    return __float2bfloat16_rn(acc);
}

// The elements of 16 bytes, and a sum of as many.
template <typename T> struct VectorSum {
    static constexpr int kElements = 16 / sizeof(T);
    float value[kElements] = {};  // +0

    __device__ __forceinline__ void add(uint4 v) {
        const unsigned int words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) add_word(i, words[i]);
    }
    __device__ __forceinline__ void add_weighted(float weight, uint4 v);  // for bfloat16
    __device__ __forceinline__ uint4 rounded() const { return {word(0), word(1), word(2), word(3)}; }

  private:
    __device__ __forceinline__ void add_word(int i, unsigned int bits);
    __device__ __forceinline__ unsigned int word(int i) const;
};

template <> __device__ __forceinline__ void VectorSum<float>::add_word(int i, unsigned int bits) {
    value[i] = accumulate(value[i], __uint_as_float(bits));
}
template <> __device__ __forceinline__ unsigned int VectorSum<float>::word(int i) const {
    return __float_as_uint(value[i]);
}
template <> __device__ __forceinline__ void VectorSum<__nv_bfloat16>::add_word(int i, unsigned int bits) {
    value[2 * i] = accumulate(value[2 * i], __uint_as_float(bits << 16));
    value[2 * i + 1] = accumulate(value[2 * i + 1], __uint_as_float(bits & 0xffff0000u));
}
template <> __device__ __forceinline__ void VectorSum<__nv_bfloat16>::add_weighted(float weight, uint4 v) {
    const unsigned int words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        value[2 * i] = accumulate_weighted(value[2 * i], weight, __uint_as_float(words[i] << 16));
        value[2 * i + 1] = accumulate_weighted(value[2 * i + 1], weight, __uint_as_float(words[i] & 0xffff0000u));
    }
}
template <> __device__ __forceinline__ unsigned int VectorSum<__nv_bfloat16>::word(int i) const {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
    return *reinterpret_cast<const unsigned int*>(&pair);
}
template <> __device__ __forceinline__ void VectorSum<__half>::add_word(int i, unsigned int bits) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    value[2 * i] = accumulate(value[2 * i], pair.x);
    value[2 * i + 1] = accumulate(value[2 * i + 1], pair.y);
}
template <> __device__ __forceinline__ unsigned int VectorSum<__half>::word(int i) const {
    const __half2 pair = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
    return *reinterpret_cast<const unsigned int*>(&pair);
}

// 8 bfloat16.
__device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
    const unsigned int words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// Of two pairs of bfloat16, the larger ones; NaN loses.
__device__ __forceinline__ unsigned int larger_pair(unsigned int a, unsigned int b) {
    const __nv_bfloat162 pair =
        __hmax2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned int*>(&pair);
}

// Of 8 bfloat16, the largest magnitudes of those at even and at odd places, as a pair; NaN loses.
__device__ __forceinline__ unsigned int largest_magnitudes(uint4 v) {
    constexpr unsigned int kMagnitude = 0x7fff7fffu;
    return larger_pair(larger_pair(v.x & kMagnitude, v.y & kMagnitude), larger_pair(v.z & kMagnitude, v.w & kMagnitude));
}

__device__ __forceinline__ float larger_of(unsigned int pair) {
    return fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// How a block of channels is cast: q = e4m3(x * factor), and x is about q * scale.
struct Fp8Scale {
    float factor;
    float scale;
    unsigned int exponent;  // UE8M0 byte of a power-of-two scale, else 0
};

// `amax` is the fmaxf of the magnitudes of a block, which passes over NaN.
__device__ __forceinline__ Fp8Scale fp8_scale(float amax) {
    const float m = fmaxf(amax, kFp8AmaxFloor);
    // Two divisions: a product with 1/448 differs in the last bit for half of all values.
    return {__fdiv_rn(kFp8Max, m), __fdiv_rn(m, kFp8Max), 0u};
}

// The smallest power of two that is not below amax / 448; an infinite amax gives 2^127 and a factor of 0.
__device__ __forceinline__ Fp8Scale fp8_scale_pow2(float amax) {
    const unsigned int bits = __float_as_uint(__fdiv_rn(fmaxf(amax, kFp8AmaxFloor), kFp8Max));
    const unsigned int exponent = min((bits >> 23) + ((bits & 0x7fffffu) != 0u), 254u);
    return {__uint_as_float((254u - exponent) << 23), __uint_as_float(exponent << 23), exponent};
}

// Saturating cast to e4m3, to nearest even; NaN stays NaN.
__device__ __forceinline__ unsigned char to_e4m3(float x, float factor) {
    return __nv_cvt_float_to_fp8(__fmul_rn(x, factor), __NV_SATFINITE, __NV_E4M3);
}

// Of a pair of bfloat16, in the order of their bytes.
__device__ __forceinline__ unsigned int pair_to_e4m3(unsigned int bits, float factor) {
    const float2 pair = {__fmul_rn(__uint_as_float(bits << 16), factor),
                         __fmul_rn(__uint_as_float(bits & 0xffff0000u), factor)};
    return __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
}

}  // namespace epcomm
