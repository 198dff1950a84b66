// arena.h: the shared memory of a block.
//
//     [ margin | dynamic | margin | static variables | margin ]
//
// All of it holds a pattern when the block starts, and the margins still do when it ends.
#pragma once

#include "emulator/scheduler.h"

namespace emulator {

inline constexpr uint8_t kPoison = 0xcd;
inline constexpr uint32_t kMargin = 1024;  // as much as the system keeps at the start of shared memory since sm_90
inline constexpr uint32_t kSharedAlignment = 128;

// Of all kernels of this object; grows while it is loaded.
inline uint32_t static_shared_bytes = 0;

// A variable gets the alignment that it asks for, and no more: whoever needs more must say so.
inline uint32_t reserve_shared(uint32_t num_bytes, uint32_t alignment) {
    uint32_t offset = (static_shared_bytes + alignment - 1) / alignment * alignment;
    if (offset % (2 * alignment) == 0) offset += alignment;
    static_shared_bytes = offset + num_bytes;
    return offset;
}

inline uint32_t dynamic_end(const Launch& launch) {
    return kMargin + (launch.dynamic_shared_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
}
inline uint32_t arena_end(const Launch& launch) { return dynamic_end(launch) + kMargin + static_shared_bytes; }

// A `__shared__` variable: `kTag` is the type of a lambda, another one for each declaration.
template <typename T, uint32_t kAlignment, auto kTag>
inline const uint32_t shared_offset = reserve_shared(sizeof(T), kAlignment > alignof(T) ? kAlignment : alignof(T));

template <typename T, uint32_t kAlignment, auto kTag> T& shared_variable() {
    const Thread& self = current();
    return *reinterpret_cast<T*>(self.block->arena + dynamic_end(*self.launch) + kMargin +
                                 shared_offset<T, kAlignment, kTag>);
}

template <typename T> T* dynamic_shared() { return reinterpret_cast<T*>(current().block->arena + kMargin); }

inline bool is_poison(const uint8_t* memory, uint64_t num_bytes) {
    return memory[0] == kPoison && memcmp(memory, memory + 1, num_bytes - 1) == 0;
}

inline void poison_arena(const Block& block) { memset(block.arena, kPoison, arena_end(*block.launch) + kMargin); }

// Which margin the block has written to, or nullptr.
inline const char* damaged_margin(const Block& block) {
    auto is_whole = [&](uint32_t begin, uint32_t end) { return is_poison(block.arena + begin, end - begin); };
    const Launch& launch = *block.launch;
    if (!is_whole(0, kMargin)) return "before its dynamic shared memory";
    if (!is_whole(kMargin + launch.dynamic_shared_bytes, dynamic_end(launch) + kMargin))
        return "behind its dynamic shared memory";
    return is_whole(arena_end(launch), arena_end(launch) + kMargin) ? nullptr : "behind its static shared memory";
}

inline bool is_shared(const Thread& self, const void* pointer, uint64_t num_bytes) {
    const uint64_t offset = static_cast<const uint8_t*>(pointer) - self.block->arena;
    return offset >= kMargin && offset <= arena_end(*self.launch) && num_bytes <= arena_end(*self.launch) - offset;
}

// The address of a 32-bit shared window: an offset in the arena.
inline uint32_t offset_of(const void* pointer) {
    const Thread& self = current();
    if (!is_shared(self, pointer, 0)) fail("%p is no address of shared memory", pointer);
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - self.block->arena);
}

inline const void* at_offset(uint32_t offset, uint32_t num_bytes) {
    const Thread& self = current();
    const void* pointer = self.block->arena + offset;
    if (!is_shared(self, pointer, num_bytes) || offset % num_bytes != 0)
        fail("%u bytes at %#x of shared memory: outside, or not aligned", num_bytes, offset);
    return pointer;
}

}  // namespace emulator
