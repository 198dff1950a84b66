// logfmt.cuh: LogFMT, the 10-bit logarithmic format of a low-latency combine, for the lanes of a warp.
//
// Device half of what epcomm.reference.encode_logfmt defines and epcomm/numerics.py implements for the host. Operations
// are spelled with their rounding, so that host and device differ in log2 and exp2 only.
//
// 16 lanes have a group of 128 channels, 8 consecutive ones each: a warp has two groups. All 32 lanes call; those
// without a group bring zeros.
#pragma once

#include "common/types.cuh"
#include "ptx/math.cuh"

namespace epcomm {

inline constexpr int kLogfmtBlock = 128;       // channels of a group
inline constexpr int kLogfmtLane = 8;          // channels of a lane
inline constexpr int kLogfmtLanes = kLogfmtBlock / kLogfmtLane;
inline constexpr int kLogfmtBlockBytes = 160;  // 128 low bytes, then 128 times the two bits above
inline constexpr uint32_t kLogfmtTop = 511;    // the largest code
inline constexpr uint32_t kLogfmtSign = 512;
inline constexpr uint32_t kLogfmtMaxStep = 0x3d00;  // 1/32 octave, a bfloat16
inline constexpr uint32_t kInfinityBits = 0x7f800000;
inline constexpr uint32_t kIntegerBits = 0x4b000000;  // 2^23: the float of these bits plus n is 2^23 + n

// -- a row ------------------------------------------------------------------------------------------------------------

// Bytes of a row of `hidden` channels, a multiple of 16: codes, words, and zeros that nobody reads.
__host__ __device__ constexpr uint32_t logfmt_row_bytes(uint32_t hidden) {
    const uint32_t num_groups = hidden / kLogfmtBlock;
    return num_groups * kLogfmtBlockBytes + static_cast<uint32_t>(round_up(num_groups * 4, 16));
}

// Offset of the word of a group.
__host__ __device__ constexpr uint32_t logfmt_word_offset(uint32_t hidden, uint32_t group) {
    return hidden / kLogfmtBlock * kLogfmtBlockBytes + group * 4;
}

// The codes of 8 channels: 8 bits of each, lowest channel first, and two bits of each: the bit above, the sign.
struct LogfmtCodes {
    uint2 low;
    uint32_t high;  // 16 bits
};

// The codes of this lane, in a row that starts at a multiple of 8 bytes.
__device__ __forceinline__ LogfmtCodes load_logfmt(const uint8_t* row, uint32_t group) {
    const uint8_t* block = row + group * kLogfmtBlockBytes;
    const int lane = lane_index() % kLogfmtLanes;
    return {reinterpret_cast<const uint2*>(block)[lane],
            reinterpret_cast<const uint16_t*>(block + kLogfmtBlock)[lane]};
}

__device__ __forceinline__ void store_logfmt(uint8_t* row, uint32_t group, const LogfmtCodes& codes) {
    uint8_t* block = row + group * kLogfmtBlockBytes;
    const int lane = lane_index() % kLogfmtLanes;
    reinterpret_cast<uint2*>(block)[lane] = codes.low;
    reinterpret_cast<uint16_t*>(block + kLogfmtBlock)[lane] = static_cast<uint16_t>(codes.high);
}

// -- arithmetic -------------------------------------------------------------------------------------------------------

// A subnormal is so far below the grid that it may be taken for 0.
__device__ __forceinline__ float logfmt_log2(float x) { return ptx::lg2(x); }
// From -16 to 0, or a little above it.
__device__ __forceinline__ float logfmt_exp2(float x) { return ptx::ex2(x); }

// A power of two that brings a largest magnitude to [1, 4), a subnormal one below 1.
__device__ __forceinline__ float logfmt_scale(uint32_t largest) {
    return __uint_as_float((254u - min(max(largest >> 23, 1u), 253u)) << 23);
}

// What the word of a group says: the upper half the largest finite magnitude, its sign whether there is NaN or Inf, the
// lower half the step of the grid, in octaves. Both are bfloat16.
struct LogfmtGrid {
    float largest, step, top;
    bool is_marked;

    __device__ __forceinline__ explicit LogfmtGrid(uint32_t word)
        : largest(__uint_as_float(word & 0x7fff0000u)),
          step(__uint_as_float(word << 16)),
          top(word >> 31 ? 510.0f : 511.0f),
          is_marked(word >> 31) {}
};

// The bits of magnitudes in a group: the largest, and the smallest but 0.
struct LogfmtSpan {
    uint32_t largest, smallest;  // both 0: there are no others
};

// All lanes. NaN and Inf are larger than all else, or are passed over.
__device__ __forceinline__ LogfmtSpan logfmt_span(const float (&x)[kLogfmtLane], bool finite_only) {
    uint32_t largest = 0, smallest = ~0u;  // the latter less 1: then 0 is the largest number of all
#pragma unroll
    for (int i = 0; i < kLogfmtLane; ++i) {
        uint32_t magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
        if (finite_only && magnitude >= kInfinityBits) magnitude = 0;
        largest = max(largest, magnitude);
        smallest = min(smallest, magnitude - 1);
    }
#pragma unroll
    for (int step = kLogfmtLanes / 2; step > 0; step /= 2) {
        largest = max(largest, __shfl_xor_sync(~0u, largest, step));
        smallest = min(smallest, __shfl_xor_sync(~0u, smallest, step));
    }
    return {largest, smallest + 1};
}

// All lanes: the word of the group, from values that a bfloat16 holds exactly.
__device__ __forceinline__ uint32_t logfmt_word(const float (&x)[kLogfmtLane]) {
    LogfmtSpan span = logfmt_span(x, false);
    const bool is_marked = span.largest >= kInfinityBits;
    if (__any_sync(~0u, is_marked)) span = logfmt_span(x, true);
    const float scale = logfmt_scale(span.largest);
    // Of no magnitudes but 0 the difference is NaN, and the step 0.
    const float octaves = fmaxf(__fsub_rn(logfmt_log2(__fmul_rn(__uint_as_float(span.largest), scale)),
                                          logfmt_log2(__fmul_rn(__uint_as_float(span.smallest), scale))),
                                0.0f);
    const float step = __fmul_rn(octaves, is_marked ? 1.0f / (kLogfmtTop - 2) : 1.0f / (kLogfmtTop - 1));
    const uint32_t rounded_up = (__float_as_uint(step) + 0xffffu) >> 16;
    return span.largest | min(rounded_up, kLogfmtMaxStep) | static_cast<uint32_t>(is_marked) << 31;
}

// The codes of this lane, `word` that of its group. Lanes need not call together.
__device__ __forceinline__ LogfmtCodes encode_logfmt(const float (&x)[kLogfmtLane], uint32_t word) {
    const LogfmtGrid grid(word);
    const float scale = logfmt_scale(__float_as_uint(grid.largest));
    const float per_octave = grid.step > 0.0f ? __frcp_rn(grid.step) : 0.0f;
    const float offset = __fsub_rn(grid.top, __fmul_rn(logfmt_log2(__fmul_rn(grid.largest, scale)), per_octave));
    const float least = __fsub_rn(1.0f, per_octave);  // the place of half of the smallest magnitude on the grid
    uint32_t code[kLogfmtLane];
#pragma unroll
    for (int i = 0; i < kLogfmtLane; ++i) {
        const float place = __fmaf_rn(logfmt_log2(__fmul_rn(fabsf(x[i]), scale)), per_octave, offset);
        const uint32_t nearest = __float_as_uint(__fadd_rn(fmaxf(place, 1.0f), __uint_as_float(kIntegerBits)));
        const uint32_t sign = __float_as_uint(x[i]) >> 22 & kLogfmtSign;
        code[i] = place > least ? (nearest & kLogfmtTop) | sign : 0;  // not if it is NaN
    }
    if (__builtin_expect(grid.is_marked, false)) {
#pragma unroll
        for (int i = 0; i < kLogfmtLane; ++i) {
            const uint32_t magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
            if (magnitude == kInfinityBits) code[i] = kLogfmtTop | (__float_as_uint(x[i]) >> 22 & kLogfmtSign);
            if (magnitude > kInfinityBits) code[i] = kLogfmtSign;
        }
    }
    LogfmtCodes codes = {{}, 0};
    codes.low.x = __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
    codes.low.y = __byte_perm(__byte_perm(code[4], code[5], 0x0040), __byte_perm(code[6], code[7], 0x0040), 0x5410);
#pragma unroll
    for (int i = 0; i < kLogfmtLane; ++i) codes.high |= code[i] >> 8 << 2 * i;
    return codes;
}

// 2^23 + code of a channel, sign aside, as a float has it: no conversion.
__device__ __forceinline__ uint32_t logfmt_number(const LogfmtCodes& codes, int i) {
    const uint32_t bit = i < 4 ? codes.high << (8 - 2 * i) : codes.high >> (2 * i - 8);
    return __byte_perm(i < 4 ? codes.low.x : codes.low.y, kIntegerBits, 0x7440 | i % 4) | (bit & 0x100u);
}

__device__ __forceinline__ uint32_t logfmt_sign(const LogfmtCodes& codes, int i) {
    return codes.high << (30 - 2 * i) & 0x80000000u;
}

// The values of this lane, `word` that of its group. Lanes need not call together.
__device__ __forceinline__ void decode_logfmt(const LogfmtCodes& codes, uint32_t word, float (&x)[kLogfmtLane]) {
    const LogfmtGrid grid(word);
    const float top = __fadd_rn(__uint_as_float(kIntegerBits), grid.top);
#pragma unroll
    for (int i = 0; i < kLogfmtLane; ++i) {
        const uint32_t number = logfmt_number(codes, i);
        const float below = __fmul_rn(__fsub_rn(__uint_as_float(number), top), grid.step);
        float magnitude = __fmul_rn(logfmt_exp2(below), grid.largest);
        if (number == kIntegerBits) magnitude = 0.0f;
        x[i] = __uint_as_float(__float_as_uint(magnitude) | logfmt_sign(codes, i));
    }
    if (__builtin_expect(grid.is_marked, false)) {
#pragma unroll
        for (int i = 0; i < kLogfmtLane; ++i) {
            const uint32_t number = logfmt_number(codes, i), sign = logfmt_sign(codes, i);
            if (number == (kIntegerBits | kLogfmtTop)) x[i] = __uint_as_float(kInfinityBits | sign);
            if (number == kIntegerBits && sign != 0) x[i] = __uint_as_float(kInfinityBits | 0x400000u);
        }
    }
}

}  // namespace epcomm
