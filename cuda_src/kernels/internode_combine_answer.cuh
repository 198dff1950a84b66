// internode_combine_answer.cuh: the forwarding half of an internode combine: for a token of another node, sum the rows of
// the own node's ranks in ascending order, round once, and write the sum to the ring of the token's rank.
#pragma once

#include "kernels/internode_combine_feed.cuh"

namespace epcomm {

// One warp: the question of `unit` from the rank of `node`, of `num_rows` of its tokens.
__device__ inline void answer_unit(const InternodeCombineArgs& args, const Shared& shared, PullPipe<kStages>& pipe,
                                   const Fed& fed, int node, uint32_t unit, int num_rows) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const int lane = lane_index(), num_local = nodes.ranks_per_node;
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
}

__device__ inline bool answer(const InternodeCombineArgs& args, const Call& call, const Shared& shared,
                              PullPipe<kStages>& pipe, const Share& share) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    return for_each_message(args, shared.entries, args.asked, share, [&](int node, uint32_t unit) {
        const int num_rows = await_message(comm, call, nodes, args.asked, kAsked, node, unit);
        if (num_rows < 0) return false;
        Fed fed;
        if (shared.windowed != 0 && !await_fed(args, call, shared, nodes.on_rail(node), unit, fed)) return false;
        answer_unit(args, shared, pipe, fed, node, unit, num_rows);
        if (shared.windowed != 0) note_fed(call, fed, unit);
        // Who asks has room for the answer, so that none is ever waited for.
        send(comm, call, nodes, args.answered, kAnswered, lane_index() == 0 ? node : -1, unit, num_rows,
             args.answered.outgoing(comm, nodes, node, unit));
        return true;
    });
}

}  // namespace epcomm
