// launch.h: a whole launch, from the outside.
#pragma once

#include <dlfcn.h>
#include <stdlib.h>
#include <utility>

#include "emulator/copies.h"
#include "emulator/faults.h"
#include "emulator/meet.h"

namespace emulator {

// What a fiber runs.
inline void run_thread() {
    Thread& self = current();
    self.launch->entry(self.launch->arguments);
    check_own_copies(self);
    retire(self);
    Block& block = *self.block;
    if (block.num_alive == 0) {
        check_loads(block);
        if (const char* where = damaged_margin(block)) fail("the block has written %s", where);
    }
    run_others(self);
    __builtin_unreachable();
}

inline void start_thread(Block& block, Thread* thread, uint32_t number, uint8_t* bottom) {
    Launch& launch = *block.launch;
    memset(thread, 0, sizeof *thread);
    thread->launch = &launch;
    thread->block = &block;
    thread->warp = &block.warps[number / kWarpLanes];
    thread->thread_index = {number, 0, 0};
    thread->block_index = {block.index, 0, 0};
    thread->lane = number % kWarpLanes;
    make_context(thread->context, reinterpret_cast<uint8_t*>(thread), bottom, run_thread);
    block.ready.push(thread);
}

inline uint32_t num_warps(const Launch& launch) { return (launch.block.x + kWarpLanes - 1) / kWarpLanes; }

// Memory of all blocks. False: there is not enough.
class Memory {
  public:
    explicit Memory(Launch& launch)
        : launch_(launch), blocks_(launch.grid.x), warps_(launch.grid.x * num_warps(launch)),
          stacks_(warps_.size(), nullptr) {
        launch.blocks = blocks_.data();
    }

    bool take() {
        for (uint8_t*& stack : stacks_)
            if ((stack = stack_pool.take()) == nullptr) return false;
        for (uint32_t index = 0; index < blocks_.size(); ++index) {
            Block& block = blocks_[index];
            block.launch = &launch_;
            block.index = index;
            block.num_alive = launch_.block.x;
            block.warps = &warps_[index * num_warps(launch_)];
            block.stacks = &stacks_[index * num_warps(launch_)];
            if ((block.arena = arena_pool.take()) == nullptr) return false;
        }
        return true;
    }

    ~Memory() {
        for (Block& block : blocks_) {
            if (block.arena == nullptr) continue;
            delete block.mbarriers;
            arena_pool.give(block.arena);
        }
        while (PendingCopies* copies = launch_.all_copies) {
            launch_.all_copies = copies->next;
            delete copies;
        }
        while (PendingStores* stores = launch_.all_stores) {
            launch_.all_stores = stores->next;
            delete stores;
        }
        for (uint8_t* stack : stacks_)
            if (stack != nullptr) stack_pool.give(stack);
    }

  private:
    Launch& launch_;
    std::vector<Block> blocks_;
    std::vector<Warp> warps_;
    std::vector<uint8_t*> stacks_;
};

inline void start_block(Block& block) {
    const uint32_t num_threads = block.launch->block.x;
    poison_arena(block);
    Random& random = block.launch->random;
    const uint32_t num_lazy = random.is_on() ? random.below(3) : 0;  // of 4 warps
    for (uint32_t warp = 0; warp < num_warps(*block.launch); ++warp) {
        const uint32_t num_lanes = num_threads - warp * kWarpLanes;
        block.warps[warp].alive = num_lanes >= kWarpLanes ? ~0u : (1u << num_lanes) - 1;
        block.warps[warp].is_lazy = num_lazy > 0 && random.below(4) < num_lazy;
    }
    for (uint32_t number = 0; number < num_threads; ++number)
        start_thread(block, thread_of(block, number), number, stack_of(block, number) + kPageBytes);
}

// Nobody can go on: who waits where.
inline void describe_deadlock(Launch& launch, Block& block) {
    char* end = launch.message + sizeof launch.message;
    char* at = launch.message;
    at += snprintf(at, end - at, "block %u waits for ever:", block.index);
    const uint32_t num_threads = launch.block.x;
    for (uint32_t first = 0; first < num_threads && at < end; ++first) {
        auto waits_alike = [&](uint32_t number) {
            const Thread *thread = thread_of(block, number), *other = thread_of(block, first);
            return thread->waits_for == other->waits_for && (thread->has_exited || thread->where == other->where) &&
                   thread->has_exited == other->has_exited;
        };
        uint32_t number = 0;
        while (!waits_alike(number)) ++number;
        if (number < first) continue;  // told already
        uint32_t count = 0;
        for (number = first; number < num_threads; ++number) count += waits_alike(number);
        const Thread* thread = thread_of(block, first);
        if (thread->has_exited) {
            at += snprintf(at, end - at, "\n  %u threads, the first one %u, have ended", count, first);
        } else {
            at += snprintf(at, end - at, "\n  %u threads, the first one %u, wait at %s (%s:%d)", count, first,
                           thread->waits_for, thread->where.file, thread->where.line);
        }
    }
    launch.has_failed = true;
}

// Everybody looks at what others have to write first: those need the cores.
inline void give_way(uint32_t num_idle_rounds) {
    constexpr uint32_t kNumPatient = 16;
    if (num_idle_rounds < kNumPatient) {
        sched_yield();
    } else {
        const timespec nap = {0, 50000};
        nanosleep(&nap, nullptr);
    }
}

// One turn of a block: its fibers, until all of them wait or poll.
inline void run_block(Launch& launch, Block& block) {
    block.ready.append(block.polling);
    if (launch.is_stuck) block.ready.append(block.lazy);
    if (block.ready.is_empty() && block.lazy.is_empty()) wake_for_late_loads(block);
    if (Thread* first = take_ready(block)) {
        switch_context(launch.scheduler, first->context);
    } else if (block.lazy.is_empty()) {
        describe_deadlock(launch, block);
    }
}

inline void run(Launch& launch) {
    const uint32_t num_blocks = launch.grid.x;
    uint32_t num_idle_rounds = 0;
    for (uint32_t num_running = num_blocks; num_running > 0;) {
        launch.has_progress = false;
        num_running = 0;
        const uint32_t first = launch.random.is_on() ? launch.random.below(num_blocks) : 0;
        for (uint32_t i = 0; i < num_blocks; ++i) {
            Block& block = launch.blocks[(first + i) % num_blocks];
            if (block.num_alive == 0) continue;
            run_block(launch, block);
            if (launch.has_failed) return;
            num_running += block.num_alive > 0;
        }
        num_idle_rounds = launch.has_progress ? 0 : num_idle_rounds + 1;
        launch.is_stuck = num_idle_rounds > 0;
        if (num_idle_rounds > 1 && num_running > 0) give_way(num_idle_rounds);
    }
}

inline uint64_t next_seed() {
    static uint64_t num_launches = 0;
    const char* text = getenv("EPCOMM_EMULATOR_SEED");
    const uint64_t seed = text != nullptr ? strtoull(text, nullptr, 10) : 0;
    if (seed == 0) return 0;
    return seed * 0x9e3779b97f4a7c15 ^ __atomic_add_fetch(&num_launches, 1, __ATOMIC_RELAXED);
}

// The message, if the launch has failed, is in `launch`.
inline void launch_grid(Launch& launch) {
    launch.random = Random(next_seed());
    Memory memory(launch);
    const uint64_t most = kArenaBytes - 3 * kMargin - kSharedAlignment - static_shared_bytes;
    launch.has_failed = true;
    if (launch.block.x == 0 || launch.block.x > 1024 || launch.grid.x == 0) {
        snprintf(launch.message, sizeof launch.message, "%u blocks of %u threads", launch.grid.x, launch.block.x);
    } else if (launch.dynamic_shared_bytes > most) {
        snprintf(launch.message, sizeof launch.message, "more than %llu bytes of dynamic shared memory",
                 static_cast<unsigned long long>(most));
    } else if (!memory.take()) {
        snprintf(launch.message, sizeof launch.message, "no memory for %u blocks of %u threads at once", launch.grid.x,
                 launch.block.x);
    } else {
        launch.has_failed = false;
        for (uint32_t index = 0; index < launch.grid.x; ++index) start_block(launch.blocks[index]);
        const CatchFaults faults;
        run(launch);
    }
}

// -- what the shared object exports -------------------------------------------------------------------------------

template <uint32_t kCount> struct Offsets {
    uint32_t value[kCount];
};

// The parameters of a kernel as they lie in memory: one behind the other, each aligned as its type wants.
template <typename Function> struct Parameters;
template <typename... T> struct Parameters<void(T...)> {
    static constexpr uint32_t kCount = sizeof...(T);
    // And the end of the last one.
    static constexpr Offsets<kCount + 1> kOffsets = [] {
        Offsets<kCount + 1> offsets = {};
        uint32_t number = 0;
        auto place = [&](uint32_t num_bytes, uint32_t alignment) {
            const uint32_t offset = (offsets.value[number] + alignment - 1) / alignment * alignment;
            offsets.value[number] = offset;
            offsets.value[++number] = offset + num_bytes;
        };
        (place(sizeof(T), alignof(T)), ...);
        return offsets;
    }();
    static constexpr size_t kNumBytes = kOffsets.value[kCount];

    static void call(void (*kernel)(T...), const void* arguments) {
        call_with(kernel, static_cast<const uint8_t*>(arguments), std::index_sequence_for<T...>());
    }

  private:
    template <size_t... kNumber>
    static void call_with(void (*kernel)(T...), const uint8_t* arguments, std::index_sequence<kNumber...>) {
        kernel(*reinterpret_cast<const std::remove_reference_t<T>*>(arguments + kOffsets.value[kNumber])...);
    }
};

// Of the arguments of __launch_bounds__.
constexpr uint32_t first_of(uint32_t max_threads, uint32_t = 0, uint32_t = 0) { return max_threads; }

}  // namespace emulator

// Run a whole grid; returns when it is done. Not 0: it has failed, and stderr says why.
extern "C" [[gnu::visibility("default"), gnu::used]] inline int emulator_launch(
    void (*entry)(const void*), uint32_t blocks, uint32_t threads, uint64_t dynamic_shared_bytes,
    const void* arguments) {
    std::vector<emulator::Launch> only(1);
    emulator::Launch& launch = only.front();
    launch.grid.x = blocks;
    launch.block.x = threads;
    launch.entry = entry;
    launch.arguments = arguments;
    launch.dynamic_shared_bytes = dynamic_shared_bytes;
    emulator::launch_grid(launch);
    if (!launch.has_failed) return 0;
    Dl_info symbol = {};
    dladdr(reinterpret_cast<const void*>(entry), &symbol);
    const char* name = symbol.dli_sname != nullptr ? symbol.dli_sname : "?";
    fprintf(stderr, "epcomm emulator: %s: %s\n", name, launch.message);
    return 1;
}

// Static shared memory of a block, of all kernels of the object together.
extern "C" [[gnu::visibility("default"), gnu::used]] inline uint32_t emulator_static_shared_bytes() {
    return emulator::static_shared_bytes;
}
