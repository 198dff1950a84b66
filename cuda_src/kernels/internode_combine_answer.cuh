// internode_combine_answer.cuh: the forwarding half of an internode combine: for a token of another node, sum the rows of
// the own node's ranks in ascending order, round once, and write the sum to the ring of the token's rank, or in front of the
// network, where that rank may read it.
#pragma once

#include "kernels/internode_combine_feed.cuh"

namespace epcomm {

// The ranks that a lane waits for with the question of `unit` from the rank of `node`, a bit each.
__device__ inline uint32_t awaited_question(const InternodeCombineArgs& args, const Call& call, int node, uint32_t unit) {
    if (lane_index() != 0) return 0;
    const uint64_t* asked = args.nodes.word(args.comm, args.comm.rank, kAsked, node, unit % args.asked.num_groups);
    uint64_t word;
    return awaited_for(call, asked, args.nodes.on_rail(node), unit, word);
}

// One warp: the question of `unit` from the rank of `node`, which is there.
__device__ inline void answer_unit(const InternodeCombineArgs& args, const Call& call, const Shared& shared,
                                   PullPipe<kStages>& pipe, const Fed& fed, int node, uint32_t unit) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const int lane = lane_index(), num_local = nodes.ranks_per_node;
    const uint64_t* asked = nodes.word(comm, comm.rank, kAsked, node, unit % args.asked.num_groups);
    const uint64_t word = ptx::ld_relaxed_sys(asked);
    const int num_rows = rows_of(args.asked, word);
    const uint64_t question = args.asked.head(comm, nodes, comm.rank, node, unit);
    const uint64_t answer = args.answered.outgoing(comm, nodes, node, unit);
    auto row_of = [&](int i) {
        if (lane >= num_local) return -1;
        const int row = pointer<const volatile int32_t>(question + i * args.asked.row_bytes)[lane];
        // A peer's memory may hold anything; this rank looks for no rows outside of what there is.
        return row < shared.extents.num_rows[args.nodes.first_local() + lane] ? row : -1;
    };
    auto address = [&](int i) { return local_row_at(args, shared, fed, lane, row_of(i)); };
    pull_rows(pipe, args.row_bytes, num_rows, address, [&](const PulledPiece& piece) {
        const uint64_t to = answer + static_cast<uint64_t>(piece.row) * args.answered.row_bytes;
        sum_pieces(pipe, {__popc(piece.lanes), 0, 0}, piece.num_bytes, 0, 0, to + piece.begin);
        if (piece.begin != 0 || args.num_topk == 0) return;
        const float weight = sum_floats(local_weights_at(args, shared, fed, lane, row_of(piece.row)), args.num_topk);
        if (lane < args.num_topk) pointer<float>(to + args.answer_weights)[lane] = weight;
    });
    // Who asks has room for the answer, so that none is ever waited for.
    send(comm, call, nodes, args.answered, kAnswered, lane == 0 ? node : -1, unit, num_rows,
         (word & kReadThere) != 0 ? 0 : answer);
}

}  // namespace epcomm
