// stacks.h: memory for fibers and blocks, which launches use again, and the switch from one fiber to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sched.h>
#include <sys/mman.h>

namespace emulator {

// Slots of equal size in reserved address space; a slot gets memory when it is used for the first time, and keeps it.
// `prepare` makes a slot accessible. Shared by all launches of the process.
template <size_t kSlotBytes, uint32_t kNumSlots, bool (*prepare)(uint8_t* slot, uint32_t number)> class Pool {
  public:
    // nullptr: there are no more.
    uint8_t* take() {
        Locked locked(*this);
        if (base_ == nullptr && !reserve()) return nullptr;
        if (num_free_ > 0) return base_ + free_[--num_free_] * kSlotBytes;
        if (num_used_ == kNumSlots) return nullptr;
        uint8_t* slot = base_ + num_used_ * kSlotBytes;
        if (!prepare(slot, num_used_)) return nullptr;
        ++num_used_;
        return slot;
    }

    void give(uint8_t* slot) {
        Locked locked(*this);
        free_[num_free_++] = (slot - base_) / kSlotBytes;
    }

    bool holds(uint64_t address) const {
        return address - reinterpret_cast<uint64_t>(base_) < static_cast<uint64_t>(num_used_) * kSlotBytes;
    }

  private:
    struct Locked {
        Pool& pool;
        explicit Locked(Pool& pool) : pool(pool) {
            while (__atomic_test_and_set(&pool.is_locked_, __ATOMIC_ACQUIRE)) sched_yield();
        }
        ~Locked() { __atomic_clear(&pool.is_locked_, __ATOMIC_RELEASE); }
    };

    bool reserve() {
        const size_t num_bytes = (kNumSlots + 1ull) * kSlotBytes;
        void* memory = mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        madvise(memory, num_bytes, MADV_NOHUGEPAGE);  // a huge page under each stack would be all of the memory
        const uint64_t unaligned = reinterpret_cast<uint64_t>(memory);
        base_ = reinterpret_cast<uint8_t*>((unaligned + kSlotBytes - 1) / kSlotBytes * kSlotBytes);
        return true;
    }

    uint8_t* base_ = nullptr;
    uint32_t num_used_ = 0, num_free_ = 0;
    bool is_locked_ = false;
    uint32_t free_[kNumSlots] = {};
};

// A stack has a slot of this size, aligned to it, so that the stack pointer tells which fiber runs.
inline constexpr size_t kStackBytes = 64 << 10;
inline constexpr size_t kPageBytes = 4096;
inline constexpr uint32_t kWarpLanes = 32;
// Of all stacks: each guard page costs a mapping, of which a process has 65530. Behind these, guards are one a warp.
inline constexpr uint32_t kGuardedWarps = 768;

// The stacks of a warp. The lowest page of each stays inaccessible.
inline bool prepare_stacks(uint8_t* slot, uint32_t number) {
    const size_t all = kWarpLanes * kStackBytes;
    if (number >= kGuardedWarps) return mprotect(slot + kPageBytes, all - kPageBytes, PROT_READ | PROT_WRITE) == 0;
    for (uint8_t* stack = slot; stack < slot + all; stack += kStackBytes)
        if (mprotect(stack + kPageBytes, kStackBytes - kPageBytes, PROT_READ | PROT_WRITE) != 0) return false;
    return true;
}

// Shared memory of a block, what is static and the margins included. A GPU has 227 KiB.
inline constexpr size_t kArenaBytes = 256 << 10;

inline bool prepare_arena(uint8_t* slot, uint32_t) { return mprotect(slot, kArenaBytes, PROT_READ | PROT_WRITE) == 0; }

using StackPool = Pool<kWarpLanes * kStackBytes, 4096, prepare_stacks>;
using ArenaPool = Pool<kArenaBytes, 2048, prepare_arena>;

// One for all kernels of the process, although each is a shared object of its own: g++ makes an inline variable that is
// visible outside unique, even between objects that see nothing else of each other.
[[gnu::visibility("default")]] inline StackPool stack_pool;
[[gnu::visibility("default")]] inline ArenaPool arena_pool;

// The address of this function's frame, on the stack of the fiber that runs. Not volatile: the compiler may keep it.
[[gnu::always_inline]] inline uint64_t stack_pointer() {
#if defined(__x86_64__)
    uint64_t value;
    asm("mov %%rsp, %0" : "=r"(value));
    return value;
#else
    return reinterpret_cast<uint64_t>(__builtin_frame_address(0));
#endif
}

}  // namespace emulator

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

// Save the registers that a call preserves, and the stack pointer at `save`; go on where `load` was saved. The jump is
// predicted by where it comes from; a return would not be.
asm(R"(
    .text
    .p2align 4
    .type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
    .size emulator_switch, . - emulator_switch
)");
extern "C" [[gnu::visibility("hidden")]] void emulator_switch(void** save, void* load) noexcept;

namespace emulator {

using Context = void*;
inline void switch_context(Context& save, Context& load) { emulator_switch(&save, load); }

// What a fiber touches first when it goes on: what was saved, and the frames above.
inline void prefetch_context(const Context& context) {
    constexpr int kNumLines = 6;
    for (int line = 0; line < kNumLines; ++line) __builtin_prefetch(static_cast<const uint8_t*>(context) + 64 * line);
}

// A context that starts `function` with `top` as the end of its stack.
inline void make_context(Context& context, uint8_t* top, uint8_t*, void (*function)()) {
    constexpr int kNumSaved = 6;
    uint64_t* frame = reinterpret_cast<uint64_t*>(reinterpret_cast<uint64_t>(top) & ~uint64_t{15}) - 2;
    *frame = reinterpret_cast<uint64_t>(function);  // as if it had been called: 8 bytes off a multiple of 16
    context = frame - kNumSaved;
}

}  // namespace emulator

#else

#include <ucontext.h>

namespace emulator {

using Context = ucontext_t;  // on other machines; each switch is two system calls
inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }

inline void prefetch_context(const Context&) {}

inline void make_context(Context& context, uint8_t* top, uint8_t* bottom, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = top - bottom;
    makecontext(&context, function, 0);
}

}  // namespace emulator

#endif
