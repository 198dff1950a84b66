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

// Units or messages of one warp of a role: blockIdx.x + warp * gridDim.x and so on, in ascending order.
struct Share {
    int warp, num_warps;  // of this block in the role
    uint32_t num_drawn = 0;

    __device__ uint32_t first() const { return blockIdx.x + warp * gridDim.x; }
    __device__ uint32_t step() const { return gridDim.x * num_warps; }
    __device__ uint32_t draw() { return first() + num_drawn++ * step(); }
};

// Those of the rank: a warp gets the next one that no other has, so that none is idle while there are some.
struct Drawn {
    uint32_t* num_drawn;  // of State

    // All lanes.
    __device__ uint32_t draw() {
        const uint32_t number = lane_index() == 0 ? ptx::atom_add_relaxed_gpu(num_drawn, 1) : 0;
        return __shfl_sync(~0u, number, 0);
    }
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

// The messages of other nodes that one warp gets, in the order of units and then of nodes.
template <typename Source> class Incoming {
  public:
    uint32_t unit = 0;  // of the next one
    int node = 0;       // from there

    __device__ Incoming(const Nodes& nodes, const Entry (&entries)[kMaxRanks], const Ring& ring, Source source)
        : nodes_(nodes), entries_(entries), ring_(ring), source_(source) {
        uint32_t most = 0;
        for (int other = 0; other < nodes.num_nodes; ++other)
            if (other != nodes.own) most = max(most, num_units(other));
        end_ = most * (nodes.num_nodes - 1);
        advance();
    }
    __device__ bool is_any() const { return item_ < end_; }
    // All lanes: to the next one. A node may have fewer units than others.
    __device__ void advance() {
        const uint32_t num_others = nodes_.num_nodes - 1;
        do {
            item_ = source_.draw();
            const int other = item_ % num_others;
            unit = item_ / num_others;
            node = other < nodes_.own ? other : other + 1;
        } while (is_any() && unit >= num_units(node));
    }

  private:
    __device__ uint32_t num_units(int from) const { return ring_.num_units(entries_[nodes_.on_rail(from)].num_tokens); }
    const Nodes& nodes_;
    const Entry (&entries_)[kMaxRanks];
    const Ring& ring_;
    Source source_;
    uint32_t item_, end_;
};

// One warp: `take(node, unit)` for each message of other nodes in its share. False: the call has failed.
template <typename Args, typename Take>
__device__ inline bool for_each_message(const Args& args, const Entry (&entries)[kMaxRanks], const Ring& ring,
                                        const Share& share, Take take) {
    for (Incoming<Share> next(args.nodes, entries, ring, share); next.is_any(); next.advance())
        if (!take(next.node, next.unit)) return false;
    return true;
}

}  // namespace epcomm
