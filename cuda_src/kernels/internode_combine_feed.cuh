// internode_combine_feed.cuh: rows of an `x` that lies outside of its owner's arena, where the ranks that sum them cannot
// address it. Those of a source are summed by the rank of the own node on its rail; the owner feeds it, unit by unit, through
// a ring at that rank: rows in their order, with their weights. Ahead of the first one is its number.
//
// In the area of the rank that sums there is a ring for each flow, a local rank and a node; see sync/handover.cuh.
#pragma once

#include "kernels/internode_combine.cuh"
#include "sync/rows.cuh"

namespace epcomm {

// One warp of the rank that sums looks after what local ranks feed of a unit of `source`; lane k after local rank k.
struct Feeding {
    const InternodeCombineArgs& args;
    int owner, flow;
    bool is_used;
    uint32_t group;

    __device__ Feeding(const InternodeCombineArgs& args, const Shared& shared, int source, uint32_t unit)
        : args(args), group(unit % args.fed.num_groups) {
        const Nodes& nodes = args.nodes;
        const int lane = lane_index();
        owner = nodes.first_local() + min(lane, nodes.ranks_per_node - 1);
        is_used = lane < nodes.ranks_per_node && (shared.windowed >> owner & 1);
        flow = lane * nodes.num_nodes + nodes.node_of(source);
    }
    __device__ const uint64_t* sent() const { return args.handed.word(args.comm, args.comm.rank, kAnswered, flow, group); }
    // The owner that a lane waits for, as a bit.
    __device__ uint32_t awaited(const Call& call, uint32_t unit) const {
        uint64_t word;
        return is_used ? awaited_for(call, sent(), owner, unit, word) : 0;
    }
    // When nothing is awaited.
    __device__ Fed find(int source, uint32_t unit) const {
        Fed fed;
        if (!is_used) return fed;
        fed.group = args.fed.head(args.comm, args.handed, args.comm.rank, flow, unit);
        fed.first = *pointer<const volatile int32_t>(fed.group);
        fed.count = rows_of(args.fed, ptx::ld_relaxed_sys(sent()));
        fed.taken = args.handed.word(args.comm, owner, kAsked, source, group);
        return fed;
    }
};

// The same warp, after its last look at the unit, with no bulk copy of it under way.
__device__ inline void note_fed(const Call& call, const Fed& fed, uint32_t unit) {
    __syncwarp();
    // RELEASE the group. Pairs with the ACQUIRE in feed, there.
    if (fed.taken != nullptr) ptx::st_release_sys(fed.taken, tagged(call.sequence, unit + 1));
}

// One warp of the owner: the rows of a unit of `source`, whose group at `summing` is free.
__device__ inline void feed_unit(const InternodeCombineArgs& args, const Call& call, const Shared& shared, int source,
                                 int summing, uint32_t unit) {
    const Comm& comm = args.comm;
    const int lane = lane_index(), own = comm.rank, unit_tokens = args.fed.unit_tokens;
    const int32_t* tokens = pointer<const int32_t>(args.src_idx);
    const int begin = first_row(args, source, own);
    const int end = min(pointer<const int32_t>(args.rank_prefix)[source * comm.num_ranks + own], shared.extents.num_rows[own]);
    const int first = lower_bound(tokens, begin, max(begin, end), unit * unit_tokens);
    const int behind = lower_bound(tokens, first, max(begin, end), (unit + 1) * unit_tokens);
    const int flow = args.nodes.local * args.nodes.num_nodes + args.nodes.node_of(source);
    const uint64_t group = args.fed.head(comm, args.handed, summing, flow, unit);
    for (int row = first; row < behind; ++row) {
        const uint64_t to = group + static_cast<uint64_t>(row - first) * args.fed.row_bytes + kPlacesBytes;
        copy_by_lanes(pointer<const uint8_t>(args.x + static_cast<uint64_t>(row) * args.row_bytes), lane == 0 ? to : 0,
                      args.row_bytes);
        if (lane < args.num_topk)
            pointer<float>(to + args.answer_weights)[lane] =
                pointer<const float>(args.x_weights)[static_cast<int64_t>(row) * args.num_topk + lane];
    }
    if (lane == 0) *pointer<int32_t>(group) = first;
    __syncwarp();
    ptx::fence_acq_rel_sys();
    // RELEASE the message, which all lanes have written: the fence follows __syncwarp. Pairs with the ACQUIRE of awaited_for.
    if (lane == 0)
        ptx::st_relaxed_sys(args.handed.word(comm, summing, kAnswered, flow, unit % args.fed.num_groups),
                            sent_word(call, unit, behind - first));
}

__device__ inline bool feed(const InternodeCombineArgs& args, const Call& call, const Shared& shared, const Share& share) {
    const Comm& comm = args.comm;
    auto feed_one = [&](int source, int summing, uint32_t unit) {
        const uint64_t* taken = args.handed.word(comm, comm.rank, kAsked, source, unit % args.fed.num_groups);
        // ACQUIRE the group. Pairs with the release of note_fed, there.
        if (!await_groups(comm, call, args.fed, lane_index() == 0 ? taken : nullptr, summing, unit)) return false;
        feed_unit(args, call, shared, source, summing, unit);
        return true;
    };
    return for_each_handed(comm, args.nodes, shared.entries, args.fed, share.first(), share.step(), feed_one);
}

}  // namespace epcomm
