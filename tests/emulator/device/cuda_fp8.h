// cuda_fp8.h: numbers of 8 bits, as far as kernels use them.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

using __nv_fp8_storage_t = unsigned char;
using __nv_fp8x2_storage_t = unsigned short;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturation, __nv_fp8_interpretation_t kind) {
    const bool saturates = saturation == __NV_SATFINITE;
    if (kind == __NV_E4M3) return emulator::E4m3::from_float(x, saturates ? 0x7e : 0x7f, 0x7f);
    return emulator::E5m2::from_float(x, saturates ? 0x7b : 0x7c, 0x7f);
}

inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 pair, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t kind) {
    return __nv_cvt_float_to_fp8(pair.x, saturation, kind) | __nv_cvt_float_to_fp8(pair.y, saturation, kind) << 8;
}

inline __nv_fp8_storage_t __nv_cvt_bfloat16raw_to_fp8(__nv_bfloat16_raw x, __nv_saturation_t saturation,
                                                      __nv_fp8_interpretation_t kind) {
    return __nv_cvt_float_to_fp8(emulator::bfloat16_to_float(x.x), saturation, kind);
}

inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t x, __nv_fp8_interpretation_t kind) {
    if (kind == __NV_E5M2) return {static_cast<unsigned short>(x << 8)};
    if ((x & 0x7f) == 0x7f) return {0x7fff};
    return {emulator::half_from_float(emulator::E4m3::to_float(x))};
}

struct __nv_fp8_e4m3 {
    __nv_fp8_storage_t __x;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float x) : __x(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)) {}
    explicit operator float() const { return __half2float(__half(__nv_cvt_fp8_to_halfraw(__x, __NV_E4M3))); }
};
