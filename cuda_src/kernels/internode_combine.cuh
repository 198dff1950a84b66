// internode_combine.cuh: what the roles of internode_combine.cu share: arguments, places, sums.
#pragma once

#include "common/numerics.cuh"
#include "kernels/internode.cuh"
#include "sync/handover.cuh"
#include "sync/pull.cuh"

#ifndef KERNEL_STAGES
#define KERNEL_STAGES 2
#endif
#ifndef KERNEL_ELEMENT
#define KERNEL_ELEMENT __nv_bfloat16
#endif

namespace epcomm {

inline constexpr int kStages = KERNEL_STAGES;
using Sum = VectorSum<KERNEL_ELEMENT>;

struct InternodeCombineArgs {
    Comm comm;
    Nodes nodes;
    Ring asked;      // a row of a message: int32 [ranks_per_node], where the rows of a token are that has some there, or -1
    Ring answered;   // a row of a message: the sum of these rows, and that of their weights
    Nodes handed;    // rows of the own node's ranks whose `x` is outside of their arenas, see internode_combine_feed.cuh
    Ring fed;
    EntryArgs entry;  // its metadata: the weights
    uint64_t x;                // this rank's rows, [num_rows, row_bytes]
    uint64_t x_weights;        // float32 [num_rows, num_topk], or 0
    uint64_t src_idx;          // int32 [num_rows], the rows' tokens at their sources
    uint64_t send_pos;         // int32 [num_tokens, num_ranks]
    uint64_t rank_prefix;      // int32 [num_ranks, num_ranks]
    uint64_t bias[2];          // [num_tokens, row_bytes], or 0
    uint64_t out;              // [num_tokens, row_bytes]
    uint64_t out_weights;      // float32 [num_tokens, num_topk]
    uint32_t row_bytes;
    uint32_t stage_bytes;      // of shared memory
    uint32_t answer_weights;   // offset in a row of an answer
    int32_t num_topk, num_worst_tokens;
    int32_t num_feeding;       // warps of a block, the last ones: this rank's `x` is outside of its arena
};
static_assert(sizeof(InternodeCombineArgs) == sizeof(Comm) + 2 * 24 + 3 * 24 + 64 + 9 * 8 + 6 * 4,
              "InternodeCombineArgs differs from epcomm/kernels/internode_combine.py");

// Where the rows of a rank of the own node are.
struct Places {
    uint64_t rows, weights;  // addresses of row 0
    bool is_windowed;        // they are outside of its arena, and not this rank's own
};

struct Shared {
    Entry entries[kMaxRanks];
    Places places[kMaxRanks];
    uint32_t windowed;
    Extents extents;
};

// One thread per rank. False: the offsets point out of the region.
__device__ inline bool find_places(const InternodeCombineArgs& args, Shared& shared, int r) {
    const Comm& comm = args.comm;
    shared.extents.find(args, r);
    Places& places = shared.places[r];
    places.is_windowed = false;
    if (r == comm.rank) {
        places.rows = args.x;
        places.weights = args.x_weights;
        return true;
    }
    if (args.nodes.node_of(r) != args.nodes.own) return true;
    if (shared.entries[r].rows == kThroughWindow) {
        places.is_windowed = true;
        places.rows = places.weights = 0;
        return true;
    }
    // Of what the rank has received, which is no more than there is room for.
    const int32_t* received = pointer<const int32_t>(args.rank_prefix) + (comm.num_ranks - 1) * comm.num_ranks;
    const uint64_t num_rows = min(received[r], shared.extents.num_rows[r]);
    const uint64_t rows = shared.entries[r].rows * kUnit, weights = shared.entries[r].metadata * kUnit;
    places.rows = comm.region[r] + rows;
    places.weights = comm.region[r] + weights;
    return rows + num_rows * args.row_bytes <= comm.region_bytes &&
           (args.num_topk == 0 || weights + num_rows * args.num_topk * 4 <= comm.region_bytes);
}

// A bit for each of the first `count` lanes, which may be all.
__device__ inline uint32_t lanes_below(int count) { return static_cast<uint32_t>((1ull << count) - 1); }

// How the pieces of a token follow one another: those of local ranks, of the nodes before this one, and of those behind.
struct Order {
    int num_near, num_before, num_behind;

    __device__ Order(int num_near, int num_before, int num_behind)
        : num_near(num_near), num_before(num_before), num_behind(num_behind) {}
    // `lanes`: those that have a piece; they stand for a `Destination` each.
    __device__ Order(const InternodeCombineArgs& args, uint32_t lanes) {
        const int num_local = args.nodes.ranks_per_node;
        num_near = __popc(lanes & lanes_below(num_local));
        num_before = __popc(lanes & lanes_below(num_local + args.nodes.own)) - num_near;
        num_behind = __popc(lanes) - num_near - num_before;
    }
};

// All lanes: add the pieces that the pipe has, those of the own node for themselves and rounded; biases come first, from two
// addresses that may be 0. Nothing is unrolled more than it takes: warps of two roles share the instruction cache of an SM,
// and with loops unrolled by four a call took up to 37 % longer.
__device__ __forceinline__ void sum_pieces(const PullPipe<kStages>& pipe, const Order& order, uint32_t num_bytes, uint64_t bias,
                                        uint64_t second_bias, uint64_t out) {
    for (uint32_t at = lane_index() * sizeof(Vector); at < num_bytes; at += kPullUnit) {
        Sum near, sum;
#pragma unroll 2
        for (int k = 0; k < order.num_near; ++k) near.add(pipe.get(k, at));
        if (bias != 0) sum.add(*pointer<const Vector>(bias + at));
        if (second_bias != 0) sum.add(*pointer<const Vector>(second_bias + at));
        const int behind = order.num_near + order.num_before, end = behind + order.num_behind;
#pragma unroll 1
        for (int k = order.num_near; k < behind; ++k) sum.add(pipe.get(k, at));
        sum.add(near.rounded());  // +0 if there is none, which changes no bit
#pragma unroll 1
        for (int k = behind; k < end; ++k) sum.add(pipe.get(k, at));
        *pointer<Vector>(out + at) = sum.rounded();
    }
}

// All lanes: float32 [num_topk] from each address that is not 0, summed in the order of the lanes; lane k has element k.
__device__ __noinline__ float sum_floats(uint64_t address, int count) {
    constexpr int kBatch = 8;
    const int lane = lane_index();
    float sum = 0.0f;
    uint32_t rest = __ballot_sync(~0u, address != 0);
    while (rest != 0) {
        float values[kBatch];
        int num_values = 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (rest == 0) continue;
            const uint64_t from = __shfl_sync(~0u, address, __ffs(rest) - 1);
            rest &= rest - 1;
            num_values = i + 1;
            values[i] = lane < count ? pointer<const volatile float>(from)[lane] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (i < num_values) sum = accumulate(sum, values[i]);
    }
    return sum;
}

// Lane k: what local rank k has fed of a unit, if it does.
struct Fed {
    uint64_t group = 0;  // 0: its rows are in its arena
    int first = 0, count = 0;
    uint64_t* taken = nullptr;  // its word, to be released behind the unit

    // Address of a row there, 0 if it is not.
    __device__ uint64_t row_at(const InternodeCombineArgs& args, int row) const {
        const bool is_there = row >= first && row - first < count;
        return is_there ? group + static_cast<uint64_t>(row - first) * args.fed.row_bytes + kPlacesBytes : 0;
    }
};

// Lane k: where the row of local rank k is, and its weights; 0 if `row` is negative.
__device__ inline uint64_t local_row_at(const InternodeCombineArgs& args, const Shared& shared, const Fed& fed, int lane,
                                        int row) {
    if (row < 0) return 0;
    if (fed.group != 0) return fed.row_at(args, row);
    return shared.places[args.nodes.first_local() + lane].rows + static_cast<uint64_t>(row) * args.row_bytes;
}
__device__ inline uint64_t local_weights_at(const InternodeCombineArgs& args, const Shared& shared, const Fed& fed,
                                            int lane, int row) {
    if (row < 0) return 0;
    if (fed.group != 0) {
        const uint64_t at = fed.row_at(args, row);
        return at != 0 ? at + args.answer_weights : 0;
    }
    return shared.places[args.nodes.first_local() + lane].weights + static_cast<uint64_t>(row) * args.num_topk * sizeof(float);
}

}  // namespace epcomm
