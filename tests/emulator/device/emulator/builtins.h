// builtins.h: what CUDA C++ gives a kernel without an include.
//
// `__global__`, `__shared__`, `__grid_constant__` and `__launch_bounds__` stay in the text: compiler.py rewrites what
// they stand in.
#pragma once

#include <math.h>
#include <type_traits>

#include "emulator/arena.h"
#include "emulator/meet.h"

// Behind the headers of the host, which use some of these names.
#define __CUDACC__
#define __CUDACC_RTC__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

#define threadIdx (::emulator::current().thread_index)
#define blockIdx (::emulator::current().block_index)
#define blockDim (::emulator::current().launch->block)
#define gridDim (::emulator::current().launch->grid)

inline constexpr int warpSize = 32;

// -- threads of a block -------------------------------------------------------------------------------------------

inline void __syncthreads(emulator::Where where = emulator::Where::here()) {
    emulator::meet_block(0, 0, "__syncthreads", false, where);
}
inline int __syncthreads_count(int predicate, emulator::Where where = emulator::Where::here()) {
    return emulator::meet_block(0, 0, "__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, emulator::Where where = emulator::Where::here()) {
    return emulator::meet_block(0, 0, "__syncthreads_or", predicate != 0, where) > 0;
}
inline int __syncthreads_and(int predicate, emulator::Where where = emulator::Where::here()) {
    return emulator::meet_block(0, 0, "__syncthreads_and", predicate == 0, where) == 0;  // nobody says no
}

// -- lanes of a warp ----------------------------------------------------------------------------------------------

inline void __syncwarp(unsigned mask = ~0u, emulator::Where where = emulator::Where::here()) {
    emulator::meet_warp(mask, "__syncwarp", nullptr, false, where);
}

// Only this lane: as if all others were elsewhere, which they may be.
inline unsigned __activemask() { return 1u << emulator::current().lane; }

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::here()) {
    return emulator::vote(mask, "__ballot_sync", predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::here()) {
    return emulator::vote(mask, "__any_sync", predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::here()) {
    return emulator::vote(mask, "__all_sync", predicate == 0, where) == 0;
}

// `width`, a power of two, divides the warp into segments that know nothing of each other.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Where where = emulator::Where::here()) {
    const unsigned lane = emulator::current().lane, segment = lane & ~(width - 1u);
    return emulator::take_from(mask, "__shfl_sync", value, segment | (source & (width - 1u)), where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulator::Where where = emulator::Where::here()) {
    const unsigned lane = emulator::current().lane, place = lane & (width - 1u);
    return emulator::take_from(mask, "__shfl_up_sync", value, place >= delta ? lane - delta : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulator::Where where = emulator::Where::here()) {
    const unsigned lane = emulator::current().lane, place = lane & (width - 1u);
    const bool is_inside = delta < static_cast<unsigned>(width) - place;
    return emulator::take_from(mask, "__shfl_down_sync", value, is_inside ? lane + delta : lane, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  emulator::Where where = emulator::Where::here()) {
    const unsigned lane = emulator::current().lane, other = lane ^ bits;
    const bool is_inside = other < (lane & ~(width - 1u)) + width;  // earlier segments can be read
    return emulator::take_from(mask, "__shfl_xor_sync", value, is_inside ? other : lane, where);
}

namespace emulator {

// clang-format off
template <typename T> T add(T a, T b) { return a + b; }
template <typename T> T lesser(T a, T b) { return b < a ? b : a; }
template <typename T> T greater(T a, T b) { return a < b ? b : a; }
inline unsigned both(unsigned a, unsigned b) { return a & b; }
inline unsigned either(unsigned a, unsigned b) { return a | b; }
inline unsigned differ(unsigned a, unsigned b) { return a ^ b; }
// clang-format on

template <typename T, T (*step)(T, T)> T reduce(unsigned mask, const char* operation, T value, Where where) {
    return static_cast<T>(combine_values(mask, operation, give_reduced<T, step>, static_cast<uint64_t>(value), where));
}

}  // namespace emulator

#define EMULATOR_REDUCE(name, T, step)                                                                \
    inline T name(unsigned mask, T value, emulator::Where where = emulator::Where::here()) {          \
        return emulator::reduce<T, emulator::step>(mask, #name, value, where);                        \
    }
EMULATOR_REDUCE(__reduce_add_sync, int, add<int>)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, add<unsigned>)
EMULATOR_REDUCE(__reduce_min_sync, int, lesser<int>)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, lesser<unsigned>)
EMULATOR_REDUCE(__reduce_max_sync, int, greater<int>)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, greater<unsigned>)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, both)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, either)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, differ)
#undef EMULATOR_REDUCE

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Where where = emulator::Where::here()) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return emulator::combine_values(mask, "__match_any_sync", emulator::give_matches, bits, where);
}

// -- memory -------------------------------------------------------------------------------------------------------

inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T> T __ldg(const T* address) { return *address; }
template <typename T> T __ldcg(const T* address) { return *address; }
template <typename T> T __ldcs(const T* address) { return *address; }
template <typename T> void __stcg(T* address, std::type_identity_t<T> value) { *address = value; }
template <typename T> void __stcs(T* address, std::type_identity_t<T> value) { *address = value; }

inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::offset_of(pointer); }

namespace emulator {

// Before an atomic operation others may have theirs.
inline void begin_atomic() {
    yield();
    note_progress();
}

// An atomic operation that is made of compare and swap: `next(old)` is the new value.
template <typename T, typename Next> T update(T* address, Next next) {
    begin_atomic();
    T old = *const_cast<volatile T*>(address);
    for (;;) {
        T value = next(old);
        if (__atomic_compare_exchange(address, &old, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
    }
}

template <typename T> T compare_and_swap(T* address, T expected, T value) {
    yield();
    if (__atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        note_progress();
    } else {
        note_poll(address, static_cast<uint64_t>(expected));
    }
    return expected;
}

}  // namespace emulator

template <typename T> T atomicAdd(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T> T atomicSub(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return static_cast<T>(old - value); });
}
template <typename T> T atomicMin(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return value < old ? value : old; });
}
template <typename T> T atomicMax(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return old < value ? value : old; });
}
template <typename T> T atomicAnd(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return old & value; });
}
template <typename T> T atomicOr(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return old | value; });
}
template <typename T> T atomicXor(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T old) { return old ^ value; });
}
template <typename T> T atomicExch(T* address, std::type_identity_t<T> value) {
    return emulator::update(address, [&](T) { return value; });
}
template <typename T> T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return emulator::compare_and_swap(address, expected, value);
}

// -- time, and the end --------------------------------------------------------------------------------------------

inline uint64_t emulator_globaltimer() {
    emulator::pass_time();
    return emulator::now_ns();
}
inline long long clock64() { return static_cast<long long>(2 * emulator_globaltimer()); }  // of a GPU with 2 GHz
inline void __nanosleep(unsigned) { emulator::pass_time(); }

[[noreturn]] inline void __trap() { emulator::fail("__trap"); }
#define assert(condition) \
    ((condition) ? void() : ::emulator::fail("assertion failed (%s:%d): %s", __FILE__, __LINE__, #condition))

// -- integers -----------------------------------------------------------------------------------------------------

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(bits); }
inline unsigned __brev(unsigned bits) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

// Position of the bit number |offset|, counted from `base` upwards or downwards, `base` included; ~0: there is none.
inline unsigned __fns(unsigned mask, unsigned base, int offset) {
    if (offset == 0) return mask >> base & 1 ? base : ~0u;
    const int step = offset > 0 ? 1 : -1;
    int rest = offset * step;
    for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step)
        if (mask >> at & 1 && --rest == 0) return at;
    return ~0u;
}

template <typename A, typename B>
requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
