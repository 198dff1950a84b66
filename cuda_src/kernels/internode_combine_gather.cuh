// internode_combine_gather.cuh: the receiving half of an internode combine: ask the other nodes for the sums of a token's
// rows there, sum the rows of the own node in the same way, and add all in the order of nodes.
#pragma once

#include "kernels/internode_combine_feed.cuh"

namespace epcomm {

// Warps gather units in parts, so that they come to their end together, and ask for them as a whole: a message takes a fence.
inline constexpr uint32_t kMaxParts = 8;

__device__ inline uint32_t parts_of(const Ring& asked) { return min(kMaxParts, asked.unit_tokens); }

// The tokens of a part of a unit, or of all of its parts.
struct Tokens {
    int first, count;

    __device__ Tokens(const InternodeCombineArgs& args, uint32_t unit, uint32_t first_part, uint32_t end_part) {
        const uint32_t unit_tokens = args.asked.unit_tokens, num_parts = parts_of(args.asked);
        const int num_tokens = args.entry.num_tokens;
        auto begin = [&](uint32_t part) {
            return min(static_cast<int>(unit * unit_tokens + part * unit_tokens / num_parts), num_tokens);
        };
        first = begin(first_part);
        count = begin(end_part) - first;
    }
};

// One warp: ask every other node for the tokens of `unit` that have rows there, whose groups are free.
__device__ __noinline__ void ask(const InternodeCombineArgs& args, Call call, const Shared& shared, Destination to,
                                 uint32_t unit) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const int lane = lane_index(), own = nodes.own, node = nodes.node_of(min(lane, comm.num_ranks - 1));
    const bool is_far = lane < comm.num_ranks && node != own;
    const uint64_t question = is_far ? args.asked.outgoing(comm, nodes, node, unit) : 0;
    const Tokens tokens(args, unit, 0, parts_of(args.asked));
    uint32_t num_rows = 0;  // of all tokens at the node that a lane stands for
    for (int i = 0; i < tokens.count; ++i) {
        const Wanted wanted(args, shared.extents, tokens.first + i);
        const uint32_t place = __shfl_sync(~0u, num_rows, is_far ? Destination::lane_of(args, node) : 0);
        if (is_far && wanted.has_node(args, node))
            pointer<int32_t>(question + place * args.asked.row_bytes)[lane - nodes.first_of(node)] = wanted.row;
        num_rows += wanted.has_node(args, to.node);
    }
    const uint64_t asked = to.node >= 0 ? args.asked.outgoing(comm, nodes, to.node, unit) : 0;
    const bool reads_there = to.node >= 0 && args.answered.read_there(comm, nodes, to.node, unit) != 0;
    send(comm, call, nodes, args.asked, kAsked, to.node, unit, num_rows, asked, reads_there ? kReadThere : 0);
    if (to.node >= 0 && num_rows > 0) ptx::red_add_relaxed_gpu(&comm.state().rows_to_nodes[1], num_rows);
}

// The ranks whose answers to `unit` a lane waits for, a bit each; empty ones too: they say that the questions were read.
__device__ inline uint32_t awaited_answers(const InternodeCombineArgs& args, const Call& call, const Destination& to,
                                         uint32_t unit) {
    if (to.node < 0) return 0;
    const uint64_t* answered =
        args.nodes.word(args.comm, args.comm.rank, kAnswered, to.node, unit % args.answered.num_groups);
    uint64_t word;
    return awaited_for(call, answered, args.nodes.on_rail(to.node), unit, word);
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

// One warp: the sums of a part of a unit, whose answers are there.
__device__ inline void gather_part(const InternodeCombineArgs& args, const Shared& shared, PullPipe<kStages>& pipe,
                                   const Destination& to, const Fed& fed, uint32_t unit, uint32_t part) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    const Tokens tokens(args, unit, part, part + 1), before(args, unit, 0, part);
    uint64_t answer = to.node >= 0 ? args.answered.read_there(comm, args.nodes, to.node, unit) : 0;
    if (to.node >= 0 && answer == 0) answer = args.answered.head(comm, args.nodes, comm.rank, to.node, unit);
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
    uint32_t num_pulled = 0;
    for (int token = before.first; token < tokens.first; ++token)
        num_pulled += Wanted(args, shared.extents, token).has_node(args, to.node);
    uint32_t num_weighed = num_pulled;
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

// One warp, when it has gathered a part of a unit: whether it was the last one of it. Counted in the word of the own node, from
// which no answers come; it is 0 again behind each unit.
__device__ inline bool ends_unit(const InternodeCombineArgs& args, uint32_t unit) {
    bool is_last = false;
    __syncwarp();
    if (lane_index() == 0) {
        const Nodes& nodes = args.nodes;
        uint64_t* word = nodes.word(args.comm, args.comm.rank, kAnswered, nodes.own, unit % args.answered.num_groups);
        uint32_t* num_gathered = reinterpret_cast<uint32_t*>(word);
        // RELEASE the group, and ACQUIRE what others have of it. Pairs with itself, in the other warps of this rank.
        is_last = ptx::atom_add_acq_rel_gpu(num_gathered, 1) == parts_of(args.asked) - 1;
        if (is_last) {
            ptx::st_relaxed_sys(num_gathered, 0);
            ptx::fence_acq_rel_sys();  // whoever counts next has been told of the group by what this warp sends now
        }
    }
    is_last = __shfl_sync(~0u, is_last, 0);
    __syncwarp();  // what lane 0 has acquired is there for all
    return is_last;
}

}  // namespace epcomm
