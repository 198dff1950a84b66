// copies.h: the copy engine of sm_90, and the copies of single threads, as late as they may be.
//
// A bulk load moves its bytes when somebody waits for its mbarrier; a bulk store writes when its thread waits for all
// of its stores. What a copy is going to write holds a pattern until then, and what it reads must not change: whoever
// does not wait gets wrong bytes, or a message. With a seed, some copies are as early as they may be.
#pragma once

#include <vector>

#include "emulator/arena.h"

namespace emulator {

using Bytes = std::vector<uint8_t>;

inline void check_copy(const char* operation, const void* global, const void* shared, uint32_t num_bytes,
                       Where where) {
    const Thread& self = current();
    if (num_bytes == 0 || num_bytes % 16 != 0)
        fail("%s (%s:%d) of %u bytes: want a multiple of 16", operation, where.file, where.line, num_bytes);
    if (reinterpret_cast<uint64_t>(global) % 16 != 0 || reinterpret_cast<uint64_t>(shared) % 16 != 0)
        fail("%s (%s:%d) between global %p and shared %p: want multiples of 16", operation, where.file, where.line,
             global, shared);
    if (!is_shared(self, shared, num_bytes))
        fail("%s (%s:%d) of %u bytes at %p: not in shared memory", operation, where.file, where.line, num_bytes,
             shared);
    if (is_shared(self, global, 0))
        fail("%s (%s:%d): %p is no global memory", operation, where.file, where.line, global);
}

// -- loads --------------------------------------------------------------------------------------------------------

struct Load {
    uint8_t* shared;
    const uint8_t* global;
    uint32_t num_bytes;
    Bytes before;  // the source, when the load was issued
    Where where;
};

inline constexpr uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes either way

struct Mbarrier {
    uint64_t* word;
    const Thread* initialised_by;
    bool is_fenced;
    uint32_t expected, pending;
    int64_t num_bytes;  // announced less arrived
    uint32_t phase;     // complete phases
    std::vector<Load> loads;
    Queue waiting;
};

// The word of a barrier holds its number here.
struct Mbarriers {
    static constexpr uint64_t kMark = 0x4d62617272696572;
    std::vector<Mbarrier> all;

    static uint64_t word_of(uint64_t number) { return kMark ^ number << 8; }
    Mbarrier* find(const uint64_t* word) {
        const uint64_t number = (*word ^ kMark) >> 8;
        const bool is_known = number < all.size() && *word == word_of(number) && all[number].word == word;
        return is_known ? &all[number] : nullptr;
    }
};

inline Mbarriers& mbarriers_of(Block& block) {
    if (block.mbarriers == nullptr) block.mbarriers = new Mbarriers;
    return *block.mbarriers;
}

inline Mbarrier& mbarrier_at(uint64_t* word, const char* operation, Where where) {
    const Thread& self = current();
    if (!is_shared(self, word, sizeof *word) || reinterpret_cast<uint64_t>(word) % sizeof *word != 0)
        fail("%s (%s:%d): %p is no place for an mbarrier", operation, where.file, where.line, word);
    Mbarrier* barrier = mbarriers_of(*self.block).find(word);
    if (barrier == nullptr)
        fail("%s (%s:%d): the mbarrier at %p was never initialised, or was overwritten", operation, where.file,
             where.line, word);
    return *barrier;
}

inline void init_mbarrier(uint64_t* word, uint32_t num_arrivals, Where where) {
    Thread& self = current();
    if (!is_shared(self, word, sizeof *word) || reinterpret_cast<uint64_t>(word) % sizeof *word != 0)
        fail("mbarrier_init (%s:%d): %p is no place for an mbarrier", where.file, where.line, word);
    if (num_arrivals == 0 || num_arrivals > kMaxCount)
        fail("mbarrier_init (%s:%d) for %u arrivals", where.file, where.line, num_arrivals);
    Mbarriers& mbarriers = mbarriers_of(*self.block);
    if (mbarriers.find(word) != nullptr)
        fail("mbarrier_init (%s:%d): there is an mbarrier at %p already", where.file, where.line, word);
    *word = Mbarriers::word_of(mbarriers.all.size());
    mbarriers.all.push_back({word, &self, false, num_arrivals, num_arrivals, 0, 0, {}, {}});
}

inline void fence_mbarriers() {
    Thread& self = current();
    for (Mbarrier& barrier : mbarriers_of(*self.block).all)
        if (barrier.initialised_by == &self) barrier.is_fenced = true;
}

inline void check_phase(Block& block, Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.num_bytes != 0) return;
    barrier.pending = barrier.expected;
    ++barrier.phase;
    block.launch->has_progress = true;
    wake(block, barrier.waiting);
}

inline void arrive_expecting(uint64_t* word, uint32_t num_bytes, Where where) {
    Mbarrier& barrier = mbarrier_at(word, "mbarrier_arrive_expect_tx", where);
    if (barrier.num_bytes + num_bytes > kMaxCount)
        fail("mbarrier_arrive_expect_tx (%s:%d): %lld bytes under way", where.file, where.line,
             static_cast<long long>(barrier.num_bytes + num_bytes));
    if (barrier.pending == 0)
        fail("mbarrier_arrive_expect_tx (%s:%d): more arrivals in a phase than the mbarrier was initialised for",
             where.file, where.line);
    barrier.num_bytes += num_bytes;
    --barrier.pending;
    check_phase(*current().block, barrier);
}

// Move the bytes of a load. Those that changed at the source meanwhile may be the old or the new ones: neither.
inline void complete(Launch& launch, Load& load) {
    if (!is_poison(load.shared, load.num_bytes))
        fail("the shared memory at %p was written to while a load (%s:%d) was under way to it", load.shared,
             load.where.file, load.where.line);
    memcpy(load.shared, load.global, load.num_bytes);
    if (memcmp(load.shared, load.before.data(), load.num_bytes) == 0) return;
    for (uint32_t i = 0; i < load.num_bytes; ++i)
        if (load.shared[i] != load.before[i]) load.shared[i] = kPoison;
    warn(launch, "a load (%s:%d) has no good bytes: its source was written to while it was under way",
         load.where.file, load.where.line);
}

inline void complete_loads(Block& block, Mbarrier& barrier) {
    while (!barrier.loads.empty()) {
        Load load = std::move(barrier.loads.back());
        barrier.loads.pop_back();
        complete(*block.launch, load);
        barrier.num_bytes -= load.num_bytes;
        check_phase(block, barrier);
    }
}

inline void begin_load(void* shared, const void* global, uint32_t num_bytes, uint64_t* word, Where where) {
    check_copy("bulk_load", global, shared, num_bytes, where);
    Thread& self = current();
    Mbarrier& barrier = mbarrier_at(word, "bulk_load", where);
    if (!barrier.is_fenced)
        fail("bulk_load (%s:%d): no fence_mbarrier_init after the init of its mbarrier", where.file, where.line);
    if (barrier.num_bytes - num_bytes < -static_cast<int64_t>(kMaxCount))
        fail("bulk_load (%s:%d): too many bytes under way", where.file, where.line);
    auto* to = static_cast<uint8_t*>(shared);
    auto* from = static_cast<const uint8_t*>(global);
    barrier.loads.push_back({to, from, num_bytes, Bytes(from, from + num_bytes), where});
    memset(shared, kPoison, num_bytes);
    self.launch->has_progress = true;
    Random& random = self.launch->random;
    if (random.is_on() && random.below(2) == 0) complete_loads(*self.block, barrier);
}

// Wait until the phase of this parity is complete.
inline void wait_for_phase(uint64_t* word, uint32_t parity, Where where) {
    Thread& self = current();
    Mbarrier& barrier = mbarrier_at(word, "mbarrier_wait", where);
    if (parity > 1) fail("mbarrier_wait (%s:%d) for parity %u", where.file, where.line, parity);
    if ((barrier.phase & 1) != parity) return;
    const uint32_t phase = barrier.phase;
    for (;;) {
        Mbarrier& same = mbarrier_at(word, "mbarrier_wait", where);  // others may have added some meanwhile
        complete_loads(*self.block, same);
        if (same.phase != phase) return;
        wait_in(same.waiting, self, "mbarrier_wait", where);
    }
}

// When no thread of the block can go on: let those look again for whom loads were issued after they had begun to wait.
inline void wake_for_late_loads(Block& block) {
    if (block.mbarriers == nullptr) return;
    for (Mbarrier& barrier : block.mbarriers->all)
        if (!barrier.loads.empty()) wake(block, barrier.waiting);
}

// -- stores -------------------------------------------------------------------------------------------------------

struct Store {
    uint8_t* global;
    const uint8_t* shared;
    uint32_t num_bytes;
    uint64_t group;
    bool is_read;  // the shared memory may change again
    Bytes bytes;
    Where where;
};

// Of one thread. A group is what it issued between two commits.
struct PendingStores {
    PendingStores* next;  // of the launch
    std::vector<Store> stores;
};

// How many bytes that were read from shared memory a thread keeps back.
inline constexpr uint64_t kMaxKept = 64 << 10;

inline void begin_store(void* global, const void* shared, uint32_t num_bytes, Where where) {
    check_copy("bulk_store", global, shared, num_bytes, where);
    Thread& self = current();
    if (self.stores == nullptr) self.stores = self.launch->all_stores = new PendingStores{self.launch->all_stores, {}};
    auto* to = static_cast<uint8_t*>(global);
    auto* from = static_cast<const uint8_t*>(shared);
    self.stores->stores.push_back({to, from, num_bytes, self.num_store_groups, false, {from, from + num_bytes}, where});
    memset(global, kPoison, num_bytes);
    self.launch->has_progress = true;
}

inline void commit_stores() { ++current().num_store_groups; }

inline void finish(Store& store) { memcpy(store.global, store.bytes.data(), store.num_bytes); }

// All groups but the last `num_pending` have read shared memory.
inline void wait_for_reads(uint64_t num_pending) {
    Thread& self = current();
    if (self.stores == nullptr) return;
    PendingStores& pending = *self.stores;
    uint64_t num_kept = 0;
    for (Store& store : pending.stores) {
        if (!store.is_read && store.group + num_pending < self.num_store_groups) {
            if (memcmp(store.shared, store.bytes.data(), store.num_bytes) != 0)
                fail("the shared memory of a bulk store (%s:%d) was written to before the store had read it",
                     store.where.file, store.where.line);
            store.is_read = true;
        }
        if (store.is_read) num_kept += store.num_bytes;
    }
    Random& random = self.launch->random;
    auto store = pending.stores.begin();
    for (; store != pending.stores.end() && store->is_read; num_kept -= store->num_bytes, ++store) {
        if (num_kept <= kMaxKept && !(random.is_on() && random.below(2) == 0)) break;
        finish(*store);
    }
    pending.stores.erase(pending.stores.begin(), store);
}

inline void wait_for_stores() {
    Thread& self = current();
    if (self.stores == nullptr) return;
    wait_for_reads(0);
    std::vector<Store>& stores = self.stores->stores;
    auto store = stores.begin();
    for (; store != stores.end() && store->is_read; ++store) finish(*store);
    stores.erase(stores.begin(), store);
}

// -- copies of 16 bytes, cp.async ---------------------------------------------------------------------------------

struct AsyncCopy {
    uint8_t* shared;
    const uint8_t* global;  // nullptr: there is nothing to read
    uint64_t group;
    Bytes before;  // the source, when the copy was issued
    Where where;
};

// Of one thread, like PendingStores.
struct PendingCopies {
    PendingCopies* next;  // of the launch
    uint64_t num_groups;
    std::vector<AsyncCopy> copies;
};

inline PendingCopies& copies_of(Thread& self) {
    if (self.copies == nullptr)
        self.copies = self.launch->all_copies = new PendingCopies{self.launch->all_copies, 0, {}};
    return *self.copies;
}

inline void finish(Launch& launch, AsyncCopy& copy) {
    Load load{copy.shared, copy.global, 16, std::move(copy.before), copy.where};
    if (copy.global == nullptr) load.global = load.before.data();
    complete(launch, load);
}

inline void begin_copy(uint32_t offset, const void* global, bool is_there, Where where) {
    Thread& self = current();
    auto* to = const_cast<uint8_t*>(static_cast<const uint8_t*>(at_offset(offset, 16)));
    if (is_there) check_copy("async_copy", global, to, 16, where);
    auto* from = static_cast<const uint8_t*>(global);
    PendingCopies& pending = copies_of(self);
    pending.copies.push_back({to, is_there ? from : nullptr, pending.num_groups,
                              is_there ? Bytes(from, from + 16) : Bytes(16, 0), where});
    memset(to, kPoison, 16);
    self.launch->has_progress = true;
}

inline void commit_copies() { ++copies_of(current()).num_groups; }

// All groups but the last `num_pending` are complete.
inline void wait_for_copies(uint64_t num_pending) {
    Thread& self = current();
    PendingCopies& pending = copies_of(self);
    Random& random = self.launch->random;
    auto copy = pending.copies.begin();
    for (; copy != pending.copies.end(); ++copy) {
        if (copy->group + num_pending >= pending.num_groups && !(random.is_on() && random.below(4) == 0)) break;
        finish(*self.launch, *copy);
    }
    pending.copies.erase(pending.copies.begin(), copy);
}

// -- exits --------------------------------------------------------------------------------------------------------

inline void check_own_copies(Thread& self) {
    if (self.stores != nullptr && !self.stores->stores.empty()) {
        const Where where = self.stores->stores.front().where;
        fail("the thread ends without a wait for its bulk store (%s:%d)", where.file, where.line);
    }
    if (self.copies != nullptr && !self.copies->copies.empty()) {
        const Where where = self.copies->copies.front().where;
        fail("the thread ends without a wait for its async_copy (%s:%d)", where.file, where.line);
    }
}

inline void check_loads(Block& block) {
    if (block.mbarriers == nullptr) return;
    for (const Mbarrier& barrier : block.mbarriers->all)
        for (const Load& load : barrier.loads)
            fail("the block ends without a wait for its bulk load (%s:%d)", load.where.file, load.where.line);
}

}  // namespace emulator
