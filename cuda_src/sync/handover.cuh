// handover.cuh: rows for ranks of the own node whose arrays lie outside of their arenas, on several nodes.
//
// Peers cannot address such arrays: their owner copies the rows itself, from rings in an area for these alone. There is one
// for each rank that rows come from: those of a source are handed over by the rank of the own node on the source's rail, the
// source itself if it is one of them. What goes to a ring of the owner comes from one flow of the rank that hands over: one
// for each local rank and node.
//
// Areas and words are those of sync/ring.cuh, as if every rank were a node of its own: what is a node there is a source at
// the owner, and a flow at the rank that hands over. All of them are near.
#pragma once

#include "sync/entry.cuh"
#include "sync/ring.cuh"

namespace epcomm {

// One warp, in which a lane stands for a local rank: what it hands over to that one, of the rows of one source.
struct Handing {
    bool is_used;
    int owner;
    uint64_t* sent;          // words of group 0: at the owner,
    const uint64_t* taken;   // and here

    __device__ Handing(const Comm& comm, const Nodes& nodes, const Nodes& handed, uint32_t owners, int local, int source,
                       RingWord what_sent, RingWord what_taken) {
        owner = nodes.first_local() + max(local, 0);
        is_used = local >= 0 && owner != comm.rank && (owners >> owner & 1);
        sent = is_used ? handed.word(comm, owner, what_sent, source, 0) : nullptr;
        const int flow = local * nodes.num_nodes + nodes.node_of(source);
        taken = is_used ? handed.word(comm, comm.rank, what_taken, flow, 0) : nullptr;
    }
    // Of a lane that hands over: the group of `unit` for rows of `source`; else 0.
    __device__ uint64_t group(const Comm& comm, const Nodes& handed, const Ring& ring, int source, uint32_t unit) const {
        return is_used ? ring.head(comm, handed, owner, source, unit) : 0;
    }
    // All lanes: wait until the groups of `unit` are free.
    __device__ bool await(const Comm& comm, const Call& call, const Ring& ring, uint32_t unit) const {
        return await_groups(comm, call, ring, is_used ? taken + unit % ring.num_groups : nullptr, owner, unit);
    }
    // All lanes, when their stores are complete.
    __device__ void send(const Call& call, const Ring& ring, uint32_t unit, uint32_t num_rows) const {
        __syncwarp();
        ptx::fence_acq_rel_sys();
        // RELEASE the message, which all lanes have written: the fence follows __syncwarp. Pairs with the ACQUIRE of
        // await_message_at, there.
        if (is_used) ptx::st_relaxed_sys(sent + unit % ring.num_groups, sent_word(call, unit, num_rows));
    }
};

// One warp of an owner: for each message that is handed over in its share, in the order of units and then of sources,
// `take(source, writer, unit)`. False: the call has failed.
template <typename Take>
__device__ inline bool for_each_handed(const Comm& comm, const Nodes& nodes, const Entry (&entries)[kMaxRanks],
                                       const Ring& ring, uint32_t first, uint32_t step, Take take) {
    // Those of its own rail it has itself. With warps enough, each looks after one source: who waits for one must not hold up
    // another.
    const uint32_t num_others = nodes.ranks_per_node - 1, num_sources = num_others * nodes.num_nodes;
    if (num_sources > 0 && step >= num_sources) {
        step -= step % num_sources;
        if (first >= step) return true;
    }
    uint32_t most = 0;
    for (int source = 0; source < comm.num_ranks; ++source) most = max(most, ring.num_units(entries[source].num_tokens));
    for (uint32_t item = first; item < most * num_sources; item += step) {
        const uint32_t unit = item / num_sources, index = item % num_sources;
        const int other = index % num_others, local = other < nodes.local ? other : other + 1;
        const int source = nodes.first_of(index / num_others) + local, writer = nodes.first_local() + local;
        if (unit < ring.num_units(entries[source].num_tokens) && !take(source, writer, unit)) return false;
    }
    return true;
}

// One warp of an owner, after its last look at a message, with no bulk copy of it under way.
__device__ inline void note_handed(const Comm& comm, const Call& call, const Nodes& nodes, const Nodes& handed,
                                   const Ring& ring, RingWord taken, int source, int writer, uint32_t unit) {
    __syncwarp();
    if (lane_index() != 0) return;
    const int flow = nodes.local * nodes.num_nodes + nodes.node_of(source);
    // RELEASE the group. Pairs with the ACQUIRE of Handing::await, there.
    ptx::st_release_sys(handed.word(comm, writer, taken, flow, unit % ring.num_groups), tagged(call.sequence, unit + 1));
}

}  // namespace epcomm
