// internode_combine_gather.cuh: the receiving half of an internode combine: ask the other nodes for the sums of a token's
// rows there, sum the rows of the own node in the same way, and add all in the order of nodes.
#pragma once

#include "kernels/internode_combine_feed.cuh"

namespace epcomm {

// The word at this rank that says which unit of a group was used up; of the ring for the own node, which nobody asks.
__device__ inline uint64_t* used_word(const InternodeCombineArgs& args, uint32_t unit) {
    const int own = args.nodes.own;
    return args.nodes.word(args.comm, args.comm.rank, kAsked, own, unit % args.asked.num_groups);
}

// One warp: whether the groups of `unit` are free, or wait until they are. -1: the call has failed.
__device__ inline int find_room(const InternodeCombineArgs& args, const Call& call, const Destination& to,
                                uint32_t unit, bool waits) {
    if (unit < args.asked.num_groups) return 1;
    auto awaited = [&] {
        // ACQUIRE the group. Pairs with the release of note_used, in another warp of this rank. That one waits for answers.
        if (to.node < 0) return 0u;
        uint64_t word;
        const bool is_there = acquire_if(used_word(args, unit), word,
                                         [&](uint64_t seen) { return is_free(call, seen, args.asked, unit); });
        return is_there ? 0u : 1u << args.nodes.on_rail(to.node);
    };
    const int answer = !waits ? __all_sync(~0u, awaited() == 0)
                              : wait_in_lanes(args.comm, call, kPhaseAck, awaited) ? 1 : -1;
    __syncwarp();  // what a lane has acquired is there for all
    return answer;
}

__device__ inline void note_used(const InternodeCombineArgs& args, const Call& call, uint32_t unit) {
    __syncwarp();
    // RELEASE the group. Pairs with the ACQUIRE of find_room.
    if (lane_index() == 0) ptx::st_release_sys(used_word(args, unit), tagged(call.sequence, unit + 1));
}

struct Tokens {
    int first, count;

    __device__ Tokens(const InternodeCombineArgs& args, uint32_t unit)
        : first(unit * args.asked.unit_tokens),
          count(min(static_cast<int>(args.asked.unit_tokens), args.entry.num_tokens - first)) {}
};

// One warp: ask every other node for the tokens of `unit` that have rows there, whose groups are free.
__device__ inline void ask(const InternodeCombineArgs& args, const Call& call, const Shared& shared,
                           const Destination& to, uint32_t unit) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const int lane = lane_index(), own = nodes.own, node = nodes.node_of(min(lane, comm.num_ranks - 1));
    const bool is_far = lane < comm.num_ranks && node != own;
    const uint64_t question = is_far ? args.asked.outgoing(comm, nodes, node, unit) : 0;
    const Tokens tokens(args, unit);
    uint32_t num_rows = 0;  // of all tokens at the node that a lane stands for
    for (int i = 0; i < tokens.count; ++i) {
        const Wanted wanted(args, shared.extents, tokens.first + i);
        const uint32_t place = __shfl_sync(~0u, num_rows, is_far ? Destination::lane_of(args, node) : 0);
        if (is_far && wanted.has_node(args, node))
            pointer<int32_t>(question + place * args.asked.row_bytes)[lane - nodes.first_of(node)] = wanted.row;
        num_rows += wanted.has_node(args, to.node);
    }
    const uint64_t asked = to.node >= 0 ? args.asked.outgoing(comm, nodes, to.node, unit) : 0;
    send(comm, call, nodes, args.asked, kAsked, to.node, unit, num_rows, asked);
    if (to.node >= 0 && num_rows > 0) ptx::red_add_relaxed_gpu(&comm.state().rows_to_nodes[1], num_rows);
}

// One warp waits for all answers to `unit`, empty ones too: they say that the questions were read.
__device__ inline bool await_answers(const InternodeCombineArgs& args, const Call& call, const Destination& to,
                                     uint32_t unit) {
    const Comm& comm = args.comm;
    auto awaited = [&] {
        if (to.node < 0) return 0u;
        // ACQUIRE the answer. Pairs with the release of send, there.
        uint64_t word;
        const uint64_t* answered = args.nodes.word(comm, comm.rank, kAnswered, to.node, unit % args.answered.num_groups);
        const bool is_there = acquire_if(answered, word, [&](uint64_t seen) { return is_of_unit(call, seen, unit); });
        return is_there ? 0u : 1u << args.nodes.on_rail(to.node);
    };
    if (!wait_in_lanes(comm, call, kPhaseReady, awaited)) return false;
    __syncwarp();  // what a lane has acquired is there for all
#if __CUDA_ARCH__ >= 900
    ptx::fence_proxy_async_global();  // before bulk copies of the answers
#endif
    return true;
}

// All lanes: the weights of a token, likewise; lane i has where its part is, or 0.
__device__ inline void sum_weights(const InternodeCombineArgs& args, int token, uint64_t address) {
    const int lane = lane_index(), num_local = args.nodes.ranks_per_node, own = args.nodes.own;
    // The nodes before this one, its own ranks, and the nodes behind.
    const int first_behind = num_local + own;
    auto only = [&](bool is_one) { return is_one ? address : 0; };
    const float near = sum_floats(only(lane < num_local), args.num_topk);
    float sum = sum_floats(only(lane >= num_local && lane < first_behind), args.num_topk);
    sum = accumulate(sum, near);
    for (int node = own + 1; node < args.nodes.num_nodes; ++node)
        sum = accumulate(sum, sum_floats(only(lane == Destination::lane_of(args, node)), args.num_topk));
    if (lane < args.num_topk)
        pointer<float>(args.out_weights)[static_cast<int64_t>(token) * args.num_topk + lane] = sum;
}

// One warp: the sums of a unit, whose answers are there.
__device__ inline void gather_unit(const InternodeCombineArgs& args, const Shared& shared, PullPipe<kStages>& pipe,
                                   const Destination& to, const Fed& fed, uint32_t unit) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    const Tokens tokens(args, unit);
    const uint64_t answer = to.node >= 0 ? args.answered.head(comm, args.nodes, comm.rank, to.node, unit) : 0;
    // Of the next token `i`, of which `num_answers` are before it.
    auto places = [&](int i, uint32_t& num_answers, uint64_t& rows, uint64_t& weights) {
        const Wanted wanted(args, shared.extents, tokens.first + i);
        const int row = wanted.local_row(args, to);
        rows = weights = 0;
        if (to.local >= 0) {
            rows = local_row_at(args, shared, fed, lane, row);
            weights = local_weights_at(args, shared, fed, lane, row);
        } else if (wanted.has_node(args, to.node)) {
            rows = answer + static_cast<uint64_t>(num_answers++) * args.answered.row_bytes;
            weights = rows + args.answer_weights;
        }
    };
    uint32_t num_pulled = 0, num_weighed = 0;
    auto address = [&](int i) {
        uint64_t rows, weights;
        places(i, num_pulled, rows, weights);
        return rows;
    };
    pull_rows(pipe, args.row_bytes, tokens.count, address, [&](const PulledPiece& piece) {
        const int token = tokens.first + piece.row;
        const uint64_t offset = static_cast<uint64_t>(token) * args.row_bytes + piece.begin;
        auto bias = [&](int i) { return args.bias[i] != 0 ? args.bias[i] + offset : 0; };
        sum_pieces(pipe, Order(args, piece.lanes), piece.num_bytes, bias(0), bias(1), args.out + offset);
        if (piece.begin != 0 || args.num_topk == 0) return;
        uint64_t rows, weights;
        places(piece.row, num_weighed, rows, weights);
        sum_weights(args, token, weights);
    });
}

// The questions of a warp are this many of its units ahead of its sums, as long as there are groups for them.
inline constexpr uint32_t kUnitsAhead = 3;

__device__ inline bool gather(const InternodeCombineArgs& args, const Call& call, const Shared& shared,
                              PullPipe<kStages>& pipe, const Share& share) {
    const Destination to(args);
    const uint32_t num_units = args.asked.num_units(args.entry.num_tokens), step = share.step();
    uint32_t next = share.first();  // the first unit that was not asked for
    for (uint32_t unit = share.first(); unit < num_units; unit += step) {
        while (next < num_units && next <= unit + kUnitsAhead * step) {
            // What a warp has asked for it sums before it waits for others.
            const int has_room = find_room(args, call, to, next, next == unit);
            if (has_room < 0) return false;
            if (has_room == 0) break;
            ask(args, call, shared, to, next);
            next += step;
        }
        if (!await_answers(args, call, to, unit)) return false;
        Fed fed;
        if (shared.windowed != 0 && !await_fed(args, call, shared, args.comm.rank, unit, fed)) return false;
        gather_unit(args, shared, pipe, to, fed, unit);
        if (shared.windowed != 0) note_fed(call, fed, unit);
        note_used(args, call, unit);
    }
    return true;
}

}  // namespace epcomm
