// ring.cuh: messages from rank to rank in rings of groups, between warps that wait for nothing but each other.
//
// A message is what one warp has of one unit of tokens for one receiver. Unit u goes through group u % num_groups of the
// ring that the receiver has for this sender. A word for each group says that a message is there, {sequence << 32 |
// (unit + 1) << 7 | kReadThere | rows}, and a word at the sender that it was taken, {sequence << 32 | unit + 1}. Both ends go
// through the units in ascending order, whoever of their warps is in charge of one, so that the lowest unit that is not taken
// can always be sent, and taken: nobody waits in a circle, with any number of groups. Each word has one writer at a time.
//
// Where a rank is behind the network, a message is written to a group of the sender's own and copied from there, or the
// receiver reads it there. What says that the receiver is done with it, or has answered it, says that this group is free, too:
// nobody waits for the network.
//
// The area of a rank: words [kNumWords][num_nodes][kMaxGroups], then the groups of all rings that end here, and behind each
// ring, where there is a network, those to send from, for each node or one for all of them; cut anew for each call. Nobody
// sends before it has heard that all ranks are in the call, and nobody leaves before what it has sent has arrived, or was
// read: groups and words are free between calls.
#pragma once

#include "ptx/bulk.cuh"
#include "sync/call.cuh"

namespace epcomm {

inline constexpr uint32_t kMaxGroups = 512;
// Ahead of a row, where it says where that goes; as in epcomm/kernels/rings.py.
inline constexpr uint64_t kPlacesBytes = round_up(kMaxRanks * sizeof(int32_t), kUnit);
inline constexpr uint32_t kMaxUnit = 32;  // tokens; as many rows are in a message at most
// In the word of a question: who asks reads the answer where it is written. It alone decides, as loads may reach one way only.
inline constexpr uint32_t kReadThere = 1u << 6;
inline constexpr int kUnitShift = 7;
static_assert(kMaxUnit < kReadThere && kReadThere < 1u << kUnitShift);

// The words of a group, by what they tell. Of the own node, from which no message comes, a combine has a counter there.
enum RingWord : int {
    kRowsSent = 0,
    kRowsTaken = 1,
    kBesideSent = 2,
    kBesideTaken = 3,
    kAsked = 4,
    kAnswered = 5,
    kNumRingWords = 6
};

// How ranks form nodes, and where every rank's area is. Rank (n, l) is local rank l of node n; the ranks with
// one l are a rail. Twin: epcomm/kernels/rings.py.
struct Nodes {
    uint64_t area;  // from Comm::control
    int32_t ranks_per_node, num_nodes;
    int32_t own, local;  // this rank's node, and its place there: a division takes long

    __device__ int node_of(int rank) const { return rank / ranks_per_node; }
    __device__ int first_of(int node) const { return node * ranks_per_node; }
    __device__ int first_local() const { return first_of(own); }
    // The rank of `node` on this rank's rail.
    __device__ int on_rail(int node) const { return first_of(node) + local; }
    // The ranks of the rail, a bit each.
    __device__ uint32_t rail() const {
        uint32_t ranks = 0;
        for (int node = 0; node < num_nodes; ++node) ranks |= 1u << on_rail(node);
        return ranks;
    }
    // All of a node, a bit each.
    __device__ uint32_t ranks_of(int node) const {
        return (ranks_per_node == kWarp ? ~0u : (1u << ranks_per_node) - 1) << first_of(node);
    }
    // At `rank`: a word for the rank of `node` on its rail.
    __device__ uint64_t* word(const Comm& comm, int rank, RingWord what, int node, uint32_t group) const {
        const uint64_t index = (static_cast<uint64_t>(what) * num_nodes + node) * kMaxGroups + group;
        return pointer<uint64_t>(comm.control[rank] + area) + index;
    }
};
static_assert(sizeof(Nodes) == 24);

// A ring for each node of the rail. A group has room for a row of each token of a unit.
struct Ring {
    uint64_t offset;  // from the area's begin
    uint32_t num_groups, group_bytes, row_bytes, unit_tokens;

    // At `rank`: the group of a unit in the ring for the rank of `node` on its rail.
    __device__ uint64_t head(const Comm& comm, const Nodes& nodes, int rank, int node, uint32_t unit) const {
        const uint64_t group = static_cast<uint64_t>(node) * num_groups + unit % num_groups;
        return comm.control[rank] + nodes.area + offset + group * group_bytes;
    }
    // In front of the network: the group of this rank for a unit that goes to several nodes.
    __device__ uint64_t staged(const Comm& comm, const Nodes& nodes, uint32_t unit) const {
        return head(comm, nodes, comm.rank, nodes.num_nodes, unit);
    }
    // Where this rank writes a message for the rank of `node` on its rail: into the group there, or in front of the network.
    __device__ uint64_t outgoing(const Comm& comm, const Nodes& nodes, int node, uint32_t unit) const {
        return kHasNetwork ? head(comm, nodes, comm.rank, nodes.num_nodes + node, unit)
                           : head(comm, nodes, nodes.on_rail(node), nodes.own, unit);
    }
    // Where loads reach what the rank of `node` on its rail writes for this one in front of the network; or 0.
    __device__ uint64_t read_there(const Comm& comm, const Nodes& nodes, int node, uint32_t unit) const {
        const uint64_t written = head(comm, nodes, comm.rank, nodes.num_nodes + nodes.own, unit);  // at that rank
        return reached(comm, nodes.on_rail(node), written);
    }
    __device__ uint32_t num_units(uint32_t num_tokens) const { return (num_tokens + unit_tokens - 1) / unit_tokens; }
};
static_assert(sizeof(Ring) == 24);

__device__ inline uint64_t sent_word(const Call& call, uint32_t unit, uint32_t num_rows) {
    return tagged(call.sequence, (unit + 1) << kUnitShift | num_rows);
}

// Whether a word says that the message of `unit` is there.
__device__ inline bool is_of_unit(const Call& call, uint64_t word, uint32_t unit) {
    return word >> 32 == call.sequence && static_cast<uint32_t>(word) >> kUnitShift == unit + 1;
}

// Whether the group of `unit` is free by what was taken from it last.
__device__ inline bool is_free(const Call& call, uint64_t taken, const Ring& ring, uint32_t unit) {
    return unit < ring.num_groups ||
           (taken >> 32 == call.sequence && static_cast<uint32_t>(taken) >= unit + 1 - ring.num_groups);
}

// All lanes, when some of them have acquired messages or groups: those are there for all, and for bulk copies.
__device__ inline void share_acquired() {
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    ptx::fence_proxy_async_global();
#endif
}

// One warp; a lane with the `taken` word of a group, which `rank` writes (else null), waits until that is free for `unit`.
__device__ inline bool await_groups(const Comm& comm, const Call& call, const Ring& ring, const uint64_t* taken, int rank,
                                    uint32_t unit) {
    if (unit >= ring.num_groups) {
        auto awaited = [&] {
            if (taken == nullptr) return 0u;
            // ACQUIRE taken. Pairs with the release of note_taken, or of note_handed, there.
            return is_free(call, ptx::ld_acquire_sys(taken), ring, unit) ? 0u : 1u << rank;
        };
        if (!wait_in_lanes(comm, call, kPhaseAck, awaited)) return false;
    }
    share_acquired();
    return true;
}

// One warp; a lane with a `node` of the rail other than the own one (else -1) waits until the group of `unit` there is
// free.
__device__ inline bool await_group(const Comm& comm, const Call& call, const Nodes& nodes, const Ring& ring,
                                   RingWord taken, int node, uint32_t unit) {
    const uint64_t* word = node >= 0 ? nodes.word(comm, comm.rank, taken, node, unit % ring.num_groups) : nullptr;
    return await_groups(comm, call, ring, word, nodes.on_rail(max(node, 0)), unit);
}

// One warp, when its stores to the groups of `unit` are complete: send them; a lane with a `node` says that it gets
// `num_rows`, and where they begin in front of the network: 0 if they are read there. `mark`: kReadThere or 0.
__device__ inline void send(const Comm& comm, const Call& call, const Nodes& nodes, const Ring& ring, RingWord sent,
                            int node, uint32_t unit, uint32_t num_rows, uint64_t from, uint32_t mark = 0) {
    __syncwarp();
    uint64_t* word = nodes.word(comm, comm.rank, sent, nodes.own, unit % ring.num_groups);
    const uint64_t value = sent_word(call, unit, num_rows | mark);
    const bool is_put = kHasNetwork && node >= 0 && num_rows > 0 && from != 0, is_told = node >= 0 && !is_put;
    for (uint32_t rest = kHasNetwork ? __ballot_sync(~0u, is_put) : 0; rest != 0; rest &= rest - 1) {
        const int lane = __ffs(rest) - 1, to = __shfl_sync(~0u, node, lane);
        const uint32_t count = __shfl_sync(~0u, num_rows, lane);
        // RELEASE the message. Pairs with the ACQUIRE of awaited_for, there.
        send_message(comm, nodes.on_rail(to), ring.head(comm, nodes, comm.rank, nodes.own, unit),
                     __shfl_sync(~0u, from, lane), static_cast<uint64_t>(count) * ring.row_bytes, word,
                     __shfl_sync(~0u, value, lane));
    }
    if (!kHasNetwork || __any_sync(~0u, is_told)) ptx::fence_acq_rel_sys();
    // RELEASE the message, which all lanes have written: the fence follows __syncwarp. Pairs as above. One without rows says,
    // too, that the sender is done with what it had in the group before.
    if (is_told) set_word(comm, nodes.on_rail(node), word, value);
}

// A peer's memory may hold anything; this rank looks at no more rows than a group has.
__device__ inline int rows_of(const Ring& ring, uint64_t sent) {
    return min(static_cast<uint32_t>(sent) & (2 * kMaxUnit - 1), ring.unit_tokens);
}

// The rank that a lane waits for until the message of `unit` is there, as a bit; 0: it is, and `word` tells of it, which is at
// `address` and written by rank `source`.
__device__ inline uint32_t awaited_for(const Call& call, const uint64_t* address, int source, uint32_t unit, uint64_t& word) {
    // ACQUIRE the message. Pairs with the release of send, of Handing::send, or of feed_unit, there.
    word = ptx::ld_acquire_sys(address);
    return is_of_unit(call, word, unit) ? 0 : 1u << source;
}

// One warp waits for the message of `unit`, of which `address` tells, a word that rank `source` writes; -1: the call has
// failed. Else its rows.
__device__ inline int await_message_at(const Comm& comm, const Call& call, const Ring& ring, const uint64_t* address,
                                       int source, uint32_t unit) {
    uint64_t word = 0;
    auto awaited = [&] { return lane_index() == 0 ? awaited_for(call, address, source, unit, word) : 0u; };
    if (!wait_in_lanes(comm, call, kPhaseReady, awaited)) return -1;
    share_acquired();
    return rows_of(ring, __shfl_sync(~0u, word, 0));
}

// One warp waits for the message of `unit` from the rank of `node` on its rail; as above.
__device__ inline int await_message(const Comm& comm, const Call& call, const Nodes& nodes, const Ring& ring,
                                    RingWord sent, int node, uint32_t unit) {
    const uint64_t* address = nodes.word(comm, comm.rank, sent, node, unit % ring.num_groups);
    return await_message_at(comm, call, ring, address, nodes.on_rail(node), unit);
}

// One warp, after its last look at a message, with no bulk copy of it under way.
__device__ inline void note_taken(const Comm& comm, const Call& call, const Nodes& nodes, const Ring& ring,
                                  RingWord taken, int node, uint32_t unit) {
    __syncwarp();
    if (lane_index() != 0) return;
    ptx::fence_acq_rel_sys();
    // RELEASE the group. Pairs with the ACQUIRE of await_group, there.
    set_word(comm, nodes.on_rail(node), nodes.word(comm, comm.rank, taken, nodes.own, unit % ring.num_groups),
             tagged(call.sequence, unit + 1));
}

}  // namespace epcomm
