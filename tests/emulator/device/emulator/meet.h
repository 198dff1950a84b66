// meet.h: barriers of a block, and operations of the lanes of a warp.
#pragma once

#include "emulator/scheduler.h"

namespace emulator {

// -- a block ------------------------------------------------------------------------------------------------------

// bar.sync is aligned: the lanes of a warp come to it at the same place of the program.
inline void check_aligned(Warp& warp, Barrier& barrier, const char* operation, Where where) {
    const Barrier* last = warp.barrier;
    if (last != nullptr && last->arrived > 0 && last->round == warp.barrier_round) {
        const Where other = warp.barrier_where;
        if (last != &barrier || !(other == where))
            fail("%s (%s:%d), while a lane of the same warp waits at %s (%s:%d)", operation, where.file, where.line,
                 last->operation, other.file, other.line);
    }
    warp.barrier = &barrier;
    warp.barrier_round = barrier.round;
    warp.barrier_where = where;
}

inline bool is_complete(const Block& block, const Barrier& barrier) {
    return barrier.arrived > 0 && barrier.arrived == (barrier.expected != 0 ? barrier.expected : block.num_alive);
}

inline void complete(Block& block, Barrier& barrier) {
    barrier.result = barrier.num_true;
    barrier.num_true = barrier.arrived = 0;
    ++barrier.round;
    block.launch->has_progress = true;
    wake(block, barrier.waiting);
}

// Wait until `expected` threads have come to barrier `number`; 0: all that have not exited. How many of them brought a
// true `predicate`.
[[gnu::noinline]] inline uint32_t meet_block(uint32_t number, uint32_t expected, const char* operation, bool predicate,
                                             Where where) {
    Thread& self = current();
    Block& block = *self.block;
    if (number >= kNumBarriers) fail("%s (%s:%d): there is no barrier %u", operation, where.file, where.line, number);
    if (expected % kWarpLanes != 0)
        fail("%s (%s:%d): %u threads are no whole warps", operation, where.file, where.line, expected);
    Barrier& barrier = block.barriers[number];
    check_aligned(*self.warp, barrier, operation, where);
    if (barrier.arrived == 0) {
        barrier.operation = operation;
        barrier.expected = expected;
    } else if (barrier.operation != operation || barrier.expected != expected) {
        fail("%s of %u threads (%s:%d) meets %s of %u threads (0: all) at barrier %u", operation, expected, where.file,
             where.line, barrier.operation, barrier.expected, number);
    }
    ++barrier.arrived;
    barrier.num_true += predicate;
    if (is_complete(block, barrier)) {
        complete(block, barrier);
    } else {
        wait_in(barrier.waiting, self, operation, where);
    }
    return barrier.result;
}

// -- a warp -------------------------------------------------------------------------------------------------------

// What an operation leaves in `warp.result` of the lanes in `arrived`, from `warp.operand`.
using Combine = void (*)(Warp& warp, const Meeting& meeting);

template <typename Body> void for_each_lane(uint32_t lanes, Body body) {
    for (; lanes != 0; lanes &= lanes - 1) body(__builtin_ctz(lanes));
}

inline bool is_complete(const Warp& warp, const Meeting& meeting) {
    return meeting.arrived == (meeting.mask & warp.alive);
}

inline void complete(Block& block, Warp& warp, uint32_t number) {
    Meeting meeting = warp.meetings[number];
    warp.meetings[number] = warp.meetings[--warp.num_meetings];
    if (meeting.combine != nullptr) meeting.combine(warp, meeting);
    if (!warp.has_polled) block.launch->has_progress = true;
    warp.has_polled = false;
    wake(block, meeting.waiting);
}

// Wait for the lanes of `mask` that have not exited, and combine what they bring. The operand and the source of this
// lane are in `warp` already.
[[gnu::noinline]] inline uint64_t meet_warp(uint32_t mask, const char* operation, Combine combine, bool vote,
                                            Where where) {
    Thread& self = current();
    Warp& warp = *self.warp;
    const uint32_t bit = 1u << self.lane;
    if (!(mask & bit))
        fail("%s (%s:%d): lane %u is not in the mask %08x", operation, where.file, where.line, self.lane, mask);
    uint32_t number = 0;
    for (; number < warp.num_meetings; ++number) {
        const Meeting& other = warp.meetings[number];
        if (other.mask == mask && other.operation == operation) break;
        if ((other.mask & bit) && (other.arrived & mask))
            fail("%s of lanes %08x (%s:%d), while lanes %08x of the warp wait at %s of lanes %08x", operation, mask,
                 where.file, where.line, other.arrived, other.operation, other.mask);
    }
    Meeting& meeting = warp.meetings[number];
    if (number == warp.num_meetings) {
        ++warp.num_meetings;  // each of the others has a lane that waits in it
        meeting = {operation, combine, mask, 0, 0, {}};
    }
    meeting.arrived |= bit;
    if (vote) meeting.votes |= bit;
    if (is_complete(warp, meeting)) {
        complete(*self.block, warp, number);
    } else {
        wait_in(meeting.waiting, self, operation, where);
    }
    return warp.result[self.lane];
}

inline void give_votes(Warp& warp, const Meeting& meeting) {
    for_each_lane(meeting.arrived, [&](uint32_t lane) { warp.result[lane] = meeting.votes; });
}

inline uint32_t vote(uint32_t mask, const char* operation, bool predicate, Where where) {
    return static_cast<uint32_t>(meet_warp(mask, operation, give_votes, predicate, where));
}

inline void give_sources(Warp& warp, const Meeting& meeting) {
    for_each_lane(meeting.arrived, [&](uint32_t lane) {
        const uint32_t source = warp.source[lane];
        if (!(meeting.arrived >> source & 1))
            fail("%s: lane %u reads lane %u, which does not take part", meeting.operation, lane, source);
        warp.result[lane] = warp.operand[source];
    });
}

// The value of lane `source`.
template <typename T> T take_from(uint32_t mask, const char* operation, T value, uint32_t source, Where where) {
    static_assert(sizeof(T) <= 8);
    Thread& self = current();
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    self.warp->operand[self.lane] = bits;
    self.warp->source[self.lane] = source;
    bits = meet_warp(mask, operation, give_sources, false, where);
    memcpy(&value, &bits, sizeof value);
    return value;
}

// `step` takes the values together, in ascending order of the lanes.
template <typename T, T (*step)(T, T)> void give_reduced(Warp& warp, const Meeting& meeting) {
    const uint32_t first = __builtin_ctz(meeting.arrived);
    T value = static_cast<T>(warp.operand[first]);
    for_each_lane(meeting.arrived & (meeting.arrived - 1),
                  [&](uint32_t lane) { value = step(value, static_cast<T>(warp.operand[lane])); });
    for_each_lane(meeting.arrived, [&](uint32_t lane) { warp.result[lane] = static_cast<uint64_t>(value); });
}

// Which lanes brought the same value.
inline void give_matches(Warp& warp, const Meeting& meeting) {
    for_each_lane(meeting.arrived, [&](uint32_t lane) {
        uint32_t equal = 0;
        for_each_lane(meeting.arrived,
                      [&](uint32_t other) { equal |= (warp.operand[other] == warp.operand[lane]) << other; });
        warp.result[lane] = equal;
    });
}

inline uint64_t combine_values(uint32_t mask, const char* operation, Combine combine, uint64_t value, Where where) {
    Thread& self = current();
    self.warp->operand[self.lane] = value;
    return meet_warp(mask, operation, combine, false, where);
}

// -- exits --------------------------------------------------------------------------------------------------------

// This thread is counted out, wherever others wait for it.
inline void retire(Thread& self) {
    Block& block = *self.block;
    Warp& warp = *self.warp;
    self.has_exited = true;
    --block.num_alive;
    warp.alive &= ~(1u << self.lane);
    block.launch->has_progress = true;
    for (uint32_t number = warp.num_meetings; number-- > 0;)
        if (is_complete(warp, warp.meetings[number])) complete(block, warp, number);
    for (Barrier& barrier : block.barriers)
        if (barrier.expected == 0 && is_complete(block, barrier)) complete(block, barrier);
}

}  // namespace emulator
