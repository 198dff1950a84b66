// scheduler.h: every CUDA thread is a fiber; here is who runs next, who waits for what, and what ends a launch.
//
// A launch runs on one system thread, all its blocks in turn, and a fiber runs until it waits, or looks at memory that
// somebody else may be about to write. So what threads do between two such points is never interleaved, but any order
// of those pieces can happen: by turns, or drawn by lot (EPCOMM_EMULATOR_SEED). Then some warps are lazy, too: they run
// when nobody else can go on, so that whoever relies on their speed is caught.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <time.h>
#include <utility>

#include "emulator/stacks.h"
#include "emulator/types.h"

namespace emulator {

struct Block;
struct Launch;
struct Thread;
struct Warp;
struct PendingStores;
struct PendingCopies;
struct Mbarriers;

// The line of a call. As a default argument of an outer function it is the line that calls that one.
struct Where {
    const char* file = nullptr;
    int line = 0;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(const Where& other) const { return line == other.line && file == other.file; }
};

// First in, first out; a thread is in one queue at a time.
class Queue {
  public:
    bool is_empty() const { return head_ == nullptr; }
    void push(Thread* thread);
    Thread* pop();
    // Move all threads of `other` behind, or in front of, those that are here.
    void append(Queue& other);
    void prepend(Queue& other);

  private:
    Thread *head_ = nullptr, *tail_ = nullptr;
};

// Lies at the top of its stack.
struct alignas(64) Thread {
    Context context;
    Thread* next;  // in its queue
    Launch* launch;
    Block* block;
    Warp* warp;
    uint3 thread_index, block_index;
    uint32_t lane;
    bool has_exited;
    const char* waits_for;  // nullptr: for nothing
    Where where;            // it waits, or waited last
    PendingStores* stores;       // nullptr: it has begun none
    uint64_t num_store_groups;  // that it has committed
    PendingCopies* copies;      // likewise
};

inline void Queue::push(Thread* thread) {
    thread->next = nullptr;
    (tail_ != nullptr ? tail_->next : head_) = thread;
    tail_ = thread;
}
inline Thread* Queue::pop() {
    Thread* thread = head_;
    if (thread == nullptr) return nullptr;
    head_ = thread->next;
    if (head_ == nullptr) tail_ = nullptr;
    // Switches wait for memory most of the time: have the stack of the next one at hand, and the one behind it.
    if (head_ != nullptr) {
        prefetch_context(head_->context);
        __builtin_prefetch(head_->next);
    }
    return thread;
}
inline void Queue::append(Queue& other) {
    if (other.is_empty()) return;
    (tail_ != nullptr ? tail_->next : head_) = other.head_;
    tail_ = other.tail_;
    other.head_ = other.tail_ = nullptr;
}
inline void Queue::prepend(Queue& other) {
    other.append(*this);
    std::swap(*this, other);
}

// Threads of a warp that have arrived at an operation of the lanes in `mask`.
struct Meeting {
    const char* operation;
    void (*combine)(Warp& warp, const Meeting& meeting);  // when all are there
    uint32_t mask, arrived, votes;
    Queue waiting;
};

struct Barrier;

struct Warp {
    Barrier* barrier;       // that a lane has come to last, in which of its rounds, and where
    uint32_t barrier_round;
    Where barrier_where;
    uint32_t alive;         // lanes that have not exited
    bool is_lazy;
    bool has_polled;        // in vain, since the last operation of the warp
    uint32_t num_meetings;
    Meeting meetings[kWarpLanes];
    uint64_t operand[kWarpLanes], result[kWarpLanes];  // by lane
    uint32_t source[kWarpLanes];                       // lane to take the operand of
};

// bar.sync and its relatives.
struct Barrier {
    const char* operation;
    uint32_t arrived, expected;
    uint32_t round;  // how often it was complete
    uint32_t num_true, result;
    Queue waiting;
};

inline constexpr uint32_t kNumBarriers = 16;

struct Block {
    Launch* launch;
    uint32_t index, num_alive;
    uint8_t** stacks;  // those of a warp each
    Warp* warps;
    uint8_t* arena;
    Mbarriers* mbarriers;
    Queue ready;    // run before the next block gets its turn
    Queue polling;  // run in this block's next turn
    Queue lazy;     // run when nothing else can
    Barrier barriers[kNumBarriers];
};

// xorshift; 0: off.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    bool is_on() const { return state_ != 0; }
    uint32_t below(uint32_t end) {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return static_cast<uint32_t>(state_ >> 33) % end;
    }

  private:
    uint64_t state_;
};

// Values that polls have seen, by address: who sees one again has made no progress.
struct Poll {
    const void* address;
    uint64_t value;
};
inline constexpr uint32_t kNumPolls = 2048;
inline constexpr uint32_t kPollsPerSet = 8;  // addresses that share a place would take turns, and look like progress

struct Launch {
    dim3 grid, block;
    void (*entry)(const void*);
    const void* arguments;
    uint64_t dynamic_shared_bytes;
    Block* blocks;
    PendingStores* all_stores;
    PendingCopies* all_copies;
    Random random{0};
    Context scheduler;
    bool has_progress;
    bool is_stuck;  // but for lazy warps
    bool has_failed, has_warned, has_overflow;
    void *fault_address, *fault_place;
    char message[2048];
    Poll polls[kNumPolls];
};

// The thread on whose stack this is. Stacks begin at staggered places, or their tops would share few sets of a cache.
inline Thread* thread_at(uint64_t stack_pointer) {
    const uint64_t slot = stack_pointer & ~(kStackBytes - 1), stagger = slot / kStackBytes % 16 * alignof(Thread);
    return reinterpret_cast<Thread*>(slot + kStackBytes - stagger - sizeof(Thread));
}
// The fiber that runs.
[[gnu::always_inline]] inline Thread& current() { return *thread_at(stack_pointer()); }

inline uint8_t* stack_of(const Block& block, uint32_t number) {
    return block.stacks[number / kWarpLanes] + number % kWarpLanes * kStackBytes;
}
inline Thread* thread_of(const Block& block, uint32_t number) {
    return thread_at(reinterpret_cast<uint64_t>(stack_of(block, number)));
}

// End the launch with a message, from within a fiber.
[[noreturn, gnu::cold, gnu::noinline, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
    Thread& self = current();
    Launch& launch = *self.launch;
    const int length = snprintf(launch.message, sizeof launch.message, "block %u, thread %u: ", self.block_index.x,
                                self.thread_index.x);
    va_list values;
    va_start(values, format);
    vsnprintf(launch.message + length, sizeof launch.message - length, format, values);
    va_end(values);
    launch.has_failed = true;
    switch_context(self.context, launch.scheduler);
    __builtin_unreachable();
}

// Something that a GPU would not notice; once a launch.
[[gnu::cold, gnu::noinline, gnu::format(printf, 2, 3)]] inline void warn(Launch& launch, const char* format, ...) {
    if (std::exchange(launch.has_warned, true)) return;
    va_list values;
    va_start(values, format);
    fputs("epcomm emulator: warning: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
}

inline Thread* take_ready(Block& block) {
    Launch& launch = *block.launch;
    if (!launch.random.is_on()) return block.ready.pop();
    for (uint32_t n = launch.random.below(8); n > 0; --n)
        if (Thread* thread = block.ready.pop()) block.ready.push(thread);
    for (;;) {
        Thread* thread = block.ready.pop();
        if (thread == nullptr || !thread->warp->is_lazy || launch.is_stuck) return thread;
        block.lazy.push(thread);
    }
}

// Make the threads of `waiting` ready.
inline void wake(Block& block, Queue& waiting) {
    Random& random = block.launch->random;
    if (random.is_on() && random.below(2) == 0) {
        block.ready.prepend(waiting);
    } else {
        block.ready.append(waiting);
    }
}

// Run other fibers; this one, which is in some queue or has exited, when it is ready again.
[[gnu::noinline]] inline void run_others(Thread& self) {
    Thread* next = take_ready(*self.block);
    if (next == &self) return;
    switch_context(self.context, next != nullptr ? next->context : self.launch->scheduler);
}

// Let others run.
inline void yield() {
    Thread& self = current();
    self.block->polling.push(&self);
    run_others(self);
}

// Wait in `queue` until somebody wakes it.
inline void wait_in(Queue& queue, Thread& self, const char* waits_for, Where where) {
    self.waits_for = waits_for;
    self.where = where;
    queue.push(&self);
    run_others(self);
    self.waits_for = nullptr;
}

// Say what a look at memory, for which others may be waiting as well, has brought.
inline void note_poll(const void* address, uint64_t value) {
    Thread& self = current();
    const uint64_t hash = reinterpret_cast<uint64_t>(address) * 0x9e3779b97f4a7c15 >> 32;
    Poll* set = &self.launch->polls[hash % (kNumPolls / kPollsPerSet) * kPollsPerSet];
    for (uint32_t i = 0; i < kPollsPerSet; ++i) {
        if (set[i].address != address) continue;
        if (set[i].value == value) {
            self.warp->has_polled = true;
        } else {
            set[i].value = value;
            self.launch->has_progress = true;
        }
        return;
    }
    memmove(&set[1], &set[0], (kPollsPerSet - 1) * sizeof(Poll));
    set[0] = {address, value};
    self.launch->has_progress = true;
}

inline void note_progress() { current().launch->has_progress = true; }

// A thread without progress that looks at the clock, or sleeps.
inline void pass_time() {
    current().warp->has_polled = true;
    yield();
}

inline uint64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

}  // namespace emulator
