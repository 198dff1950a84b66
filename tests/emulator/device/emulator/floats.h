// floats.h: arithmetic with the roundings and the NaN of a GPU.
//
// Compiled without contraction, so that every operation below is rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline unsigned long long __double_as_longlong(double x) { return __builtin_bit_cast(unsigned long long, x); }

namespace emulator {

// The one NaN that operations return.
inline float with_gpu_nan(float x) { return x == x ? x : __uint_as_float(0x7fffffffu); }

// NaN of either kind is passed over; the C library's functions return NaN for a signalling one.
inline float larger_number(float a, float b) { return a != a ? with_gpu_nan(b) : b != b ? a : std::fmax(a, b); }
inline float smaller_number(float a, float b) { return a != a ? with_gpu_nan(b) : b != b ? a : std::fmin(a, b); }

}  // namespace emulator

#define fmaxf(a, b) ::emulator::larger_number(a, b)
#define fminf(a, b) ::emulator::smaller_number(a, b)

inline float __fadd_rn(float a, float b) { return emulator::with_gpu_nan(a + b); }
inline float __fsub_rn(float a, float b) { return emulator::with_gpu_nan(a - b); }
inline float __fmul_rn(float a, float b) { return emulator::with_gpu_nan(a * b); }
inline float __fdiv_rn(float a, float b) { return emulator::with_gpu_nan(a / b); }
inline float __frcp_rn(float x) { return emulator::with_gpu_nan(1.0f / x); }
inline float __fmaf_rn(float a, float b, float c) { return emulator::with_gpu_nan(std::fma(a, b, c)); }
inline float __fsqrt_rn(float x) { return emulator::with_gpu_nan(std::sqrt(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

namespace emulator {

// Floating-point numbers of less than 32 bits: how many bits exponent and mantissa have, and the largest finite one.
template <int kExponentBits, int kMantissaBits, unsigned kLargest> struct SmallFloat {
    static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
    static constexpr unsigned kSign = 1u << (kExponentBits + kMantissaBits);

    // To nearest even. Beyond the largest number: `overflow`.
    static unsigned from_float(float x, unsigned overflow, unsigned nan) {
        const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
        const unsigned sign = bits >> 31 ? kSign : 0;
        if (magnitude > 0x7f800000u) return nan;
        const int exponent = static_cast<int>(magnitude >> 23) - 127;
        const int below = 1 - kBias - exponent;  // how far below the smallest normal number
        const int num_dropped = 23 - kMantissaBits + (below > 0 ? below : 0);
        unsigned value = 0;
        if (num_dropped < 25 && exponent > -127) {
            const unsigned significand = (magnitude & 0x7fffffu) | 0x800000u;
            const unsigned odd = significand >> num_dropped & 1;
            value = (significand + (1u << (num_dropped - 1)) - 1 + odd) >> num_dropped;
            // A mantissa that overflows makes the exponent one larger.
            if (below <= 0) value += static_cast<unsigned>(exponent + kBias - 1) << kMantissaBits;
        }
        return sign | (value > kLargest ? overflow : value);
    }

    // `bits` is finite.
    static float to_float(unsigned bits) {
        const unsigned mantissa = bits & ((1u << kMantissaBits) - 1);
        const int exponent = (bits & (kSign - 1)) >> kMantissaBits;
        const float magnitude = exponent == 0
                                    ? std::ldexp(static_cast<float>(mantissa), 1 - kBias - kMantissaBits)
                                    : std::ldexp(static_cast<float>(mantissa | 1u << kMantissaBits),
                                                 exponent - kBias - kMantissaBits);
        return bits & kSign ? -magnitude : magnitude;
    }
};

using Half = SmallFloat<5, 10, 0x7bff>;
using E4m3 = SmallFloat<4, 3, 0x7e>;
using E5m2 = SmallFloat<5, 2, 0x7b>;

inline unsigned short half_from_float(float x) { return Half::from_float(x, 0x7c00, 0x7fff); }
inline float half_to_float(unsigned short bits) {
    if ((bits & 0x7c00u) == 0x7c00u)
        return __uint_as_float((bits & 0x8000u) << 16 | 0x7f800000u | (bits & 0x3ffu) << 13);
    return Half::to_float(bits);
}

inline unsigned short bfloat16_from_float(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline float bfloat16_to_float(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

}  // namespace emulator
