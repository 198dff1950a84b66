// internode.cuh: what dispatch and combine over several nodes share: who gets a token's row, and whose turn it is. `Args` has
// comm, nodes, send_pos, rank_prefix and num_worst_tokens.
#pragma once

#include "sync/entry.cuh"
#include "sync/ring.cuh"

namespace epcomm {

// Where the rows of `source` begin among those that `rank` receives.
template <typename Args> __device__ inline int first_row(const Args& args, int source, int rank) {
    return source > 0 ? pointer<const int32_t>(args.rank_prefix)[(source - 1) * args.comm.num_ranks + rank] : 0;
}

// By rank, in shared memory.
struct Extents {
    int32_t first_row[kMaxRanks];  // of this rank's rows there
    int32_t num_rows[kMaxRanks];   // that there is room for there

    // One thread for each rank.
    template <typename Args> __device__ void find(const Args& args, int r) {
        const int num_ranks = args.comm.num_ranks;
        const int32_t* received = pointer<const int32_t>(args.rank_prefix) + (num_ranks - 1) * num_ranks;
        first_row[r] = epcomm::first_row(args, args.comm.rank, r);
        num_rows[r] = args.num_worst_tokens > 0 ? args.num_worst_tokens : received[r];
    }
};

// What a lane stands for: local rank `lane`, or one of the other nodes behind them.
struct Destination {
    int local;  // or -1
    int node;   // or -1

    template <typename Args> __device__ explicit Destination(const Args& args) {
        const Nodes& nodes = args.nodes;
        const int lane = lane_index(), other = lane - nodes.ranks_per_node, own = nodes.own;
        local = other < 0 ? lane : -1;
        node = other < 0 || other >= nodes.num_nodes - 1 ? -1 : other < own ? other : other + 1;
    }
    // The lane that stands for `node`, which is another one.
    template <typename Args> __device__ static int lane_of(const Args& args, int node) {
        return args.nodes.ranks_per_node + (node < args.nodes.own ? node : node - 1);
    }
};

// All lanes: where a token goes.
struct Wanted {
    int row;         // of lane r: its row at rank r, or -1
    uint32_t ranks;  // that get it, a bit each; dropped rows are not among them

    template <typename Args> __device__ Wanted(const Args& args, const Extents& extents, int token) {
        const int lane = lane_index(), num_ranks = args.comm.num_ranks;
        int pos = -1;
        if (lane < num_ranks)
            pos = pointer<const int32_t>(args.send_pos)[static_cast<int64_t>(token) * num_ranks + lane];
        row = pos < 0 ? -1 : extents.first_row[lane] + pos;
        if (pos >= 0 && row >= extents.num_rows[lane]) row = -1;  // does not fit into num_worst_tokens
        ranks = __ballot_sync(~0u, row >= 0);
    }
    // The row at the local rank that a lane stands for, or -1.
    template <typename Args> __device__ int local_row(const Args& args, const Destination& to) const {
        const int found = __shfl_sync(~0u, row, args.nodes.first_local() + max(to.local, 0));
        return to.local >= 0 ? found : -1;
    }
    template <typename Args> __device__ bool has_node(const Args& args, int node) const {
        return node >= 0 && (ranks & args.nodes.ranks_of(node)) != 0;
    }
};

// The units of one warp of a role: blockIdx.x + warp * gridDim.x and so on, in ascending order.
struct Share {
    int warp, num_warps;  // of this block in the role
    __device__ uint32_t first() const { return blockIdx.x + warp * gridDim.x; }
    __device__ uint32_t step() const { return gridDim.x * num_warps; }
};

// One warp, when it has sent all units of its share: wait until all of them are taken, the last ones of each group too.
__device__ inline bool await_taken(const Comm& comm, const Call& call, const Nodes& nodes, const Ring& ring,
                                   RingWord taken, int node, uint32_t num_units, const Share& share) {
    for (uint32_t unit = share.first(); unit < num_units; unit += share.step()) {
        if (unit + ring.num_groups < num_units) continue;  // who used the group again has waited
        if (!await_group(comm, call, nodes, ring, taken, node, unit + ring.num_groups)) return false;
    }
    return true;
}

// One warp: for each message of other nodes in its share, in the order of units and then of nodes, `take(node, unit)`.
// False: the call has failed.
template <typename Args, typename Take>
__device__ inline bool for_each_message(const Args& args, const Entry (&entries)[kMaxRanks], const Ring& ring,
                                        const Share& share, Take take) {
    const Nodes& nodes = args.nodes;
    const int own = nodes.own;
    const uint32_t num_others = nodes.num_nodes - 1;
    auto num_units = [&](int node) { return ring.num_units(entries[nodes.on_rail(node)].num_tokens); };
    uint32_t most = 0;
    for (int node = 0; node < nodes.num_nodes; ++node)
        if (node != own) most = max(most, num_units(node));
    for (uint32_t item = share.first(); item < most * num_others; item += share.step()) {
        const uint32_t unit = item / num_others;
        const int other = item % num_others, node = other < own ? other : other + 1;
        if (unit < num_units(node) && !take(node, unit)) return false;
    }
    return true;
}

}  // namespace epcomm
