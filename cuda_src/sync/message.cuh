// message.cuh: what goes ahead of a token in a low-latency dispatch, and is kept for its combine: 32-bit values, that
// travel in cells.
#pragma once

#include "common/types.cuh"

namespace epcomm {

inline constexpr uint32_t kTokenBits = 17, kExpertBits = 10;
inline constexpr uint32_t kTokenMask = (1u << kTokenBits) - 1, kExpertMask = (1u << kExpertBits) - 1;
static_assert(1 << kExpertBits == kMaxLocalExperts && kTokenBits + kExpertBits + 5 == 32 && kMaxTopk == 32);

// The first value of a message.
struct Header {
    int num_choices;  // of experts of the receiver
    int token;        // at the source

    __device__ Header(int num_choices, int token) : num_choices(num_choices), token(token) {}
    __device__ explicit Header(uint32_t value) : num_choices(value >> kTokenBits), token(value & kTokenMask) {}
    __device__ uint32_t value() const { return static_cast<uint32_t>(num_choices) << kTokenBits | token; }
};

// Those that follow, one for each choice, in their order.
struct Choice {
    int k;       // which of the token's choices it is
    int expert;  // among those of the receiver
    int row;     // among the rows that the source has for the expert

    __device__ Choice(int k, int expert, int row) : k(k), expert(expert), row(row) {}
    __device__ explicit Choice(uint32_t value)
        : k(value >> (kTokenBits + kExpertBits)), expert(value >> kTokenBits & kExpertMask), row(value & kTokenMask) {}
    __device__ uint32_t value() const {
        return static_cast<uint32_t>(k) << (kTokenBits + kExpertBits) | expert << kTokenBits | row;
    }
};

}  // namespace epcomm
