// low_latency_combine.cu: bring the experts' rows back to their tokens, and sum them with the tokens' weights.
//
// Grid: num_sms blocks, all resident. Rows that lie anywhere are pushed: their owner writes them to the slot of the
// source, each to the number that the row had in the source's dispatch. Rows in a combine buffer, which all ranks can
// address, are pulled: their owner only tells where the rows of a source begin, and the source loads them from there.
// Each owner decides for itself. Either way the source loads a piece of all rows of a token before it adds the first,
// in the order of the choices.
//
// A slot is [first row: int32 [num_experts] | rows], the former of the owners whose rows are pulled.
//
// Regions: writes slots of all ranks, reads the own one and combine buffers of all ranks. Words: slot_ready, slot_ack,
// which is also what protects a combine buffer; see sync/slot.cuh.
#include "common/numerics.cuh"
#include "sync/rows.cuh"
#include "sync/slot.cuh"

namespace epcomm {

inline constexpr int kThreads = 512;
using Sum = VectorSum<__nv_bfloat16>;

struct LowLatencyCombineArgs {
    Comm comm;
    SlotArgs slot;
    uint64_t buffer[kMaxRanks];  // by rank: address of its combine buffer of this slot, or 0
    uint64_t rows_offset;        // in a slot
    uint64_t x;                  // bfloat16 [L, max_rows, hidden], this rank's
    uint64_t topk_idx;           // int32 or int64 [num_tokens, num_topk]
    uint64_t topk_weights;       // float32 [num_tokens, num_topk]
    uint64_t send_pos;           // int32 [num_tokens, num_topk], of the dispatch
    uint64_t layout_range;       // int64 [L, num_ranks], of the dispatch: first row << 32 | rows
    uint64_t send_begin;         // int32 [L, num_ranks], of the dispatch
    uint64_t out;                // bfloat16 [num_tokens, hidden]
    uint64_t wait_stats;         // int64 [num_ranks] or 0
    uint32_t row_bytes;
    uint32_t push_bytes;  // of a row, that a warp copies at once
    uint32_t sum_bytes;   // and that it sums at once
    int32_t is_pulled;    // x is this rank's combine buffer
    int32_t num_tokens, num_topk, index_bytes, num_local_experts, max_rows, unused;
};
static_assert(sizeof(LowLatencyCombineArgs) == 288 + 80 + 256 + 9 * 8 + 10 * 4,
              "LowLatencyCombineArgs differs from epcomm/kernels/low_latency_combine.py");

struct Shared {
    int32_t first[kMaxLocalExperts];  // number of the first received row of an expert, of all
    int32_t num_rows;
    uint32_t reachable;
    Arrival arrival;
};

// The rows that local expert `expert` has of a source.
struct Range {
    int begin, count;
};

__device__ inline Range range_of(const LowLatencyCombineArgs& args, int expert, int source) {
    const int64_t range = pointer<const int64_t>(args.layout_range)[expert * args.comm.num_ranks + source];
    return {static_cast<int>(range >> 32), static_cast<int>(range)};
}

// -- send -------------------------------------------------------------------------------------------------------------

// All threads of one block: tell every source where its rows are.
__device__ inline void send_places(const LowLatencyCombineArgs& args, uint32_t reachable) {
    const Comm& comm = args.comm;
    const int num_local = args.num_local_experts;
    for (int i = threadIdx.x; i < num_local * comm.num_ranks; i += kThreads) {
        const int source = i / num_local, expert = i % num_local;
        if (!(reachable >> source & 1)) continue;
        const int number = pointer<const int32_t>(args.send_begin)[expert * comm.num_ranks + source];
        pointer<int32_t>(args.slot.at(comm, source))[comm.rank * num_local + expert] =
            range_of(args, expert, source).begin - number;
    }
    __syncthreads();
    // What earlier kernels of this stream wrote to the combine buffer; the release of the words is behind it.
    ptx::fence_acq_rel_sys();
}

// All threads of a block: number the received rows of all experts.
__device__ inline void number_rows(const LowLatencyCombineArgs& args, Shared& shared) {
    if (warp_index() == 0) {
        int num_before = 0;
        for (int first = 0; first < args.num_local_experts; first += kWarp) {
            const int expert = first + lane_index();
            Range last = {0, 0};
            if (expert < args.num_local_experts) last = range_of(args, expert, args.comm.num_ranks - 1);
            const int sum = sum_to_lane(last.begin + last.count);
            if (expert < args.num_local_experts) shared.first[expert] = num_before + sum - last.begin - last.count;
            num_before += __shfl_sync(~0u, sum, kWarp - 1);
        }
        if (lane_index() == 0) shared.num_rows = num_before;
    }
    __syncthreads();
}

// All lanes: of how many of [0, count) a value that never falls is at most `limit`, less one.
template <typename Value> __device__ inline int last_below(int count, int limit, Value value) {
    int number = 0;
    for (int first = 0; first < count; first += kWarp) {
        const int at = first + lane_index();
        const uint32_t votes = __ballot_sync(~0u, at < count && value(at) <= limit);
        number += __popc(votes);
        if (votes != ~0u) break;
    }
    return number - 1;
}

// All warps: received rows in pieces, to the slots of their sources.
__device__ inline void push_rows(const LowLatencyCombineArgs& args, const Shared& shared, uint32_t reachable) {
    const Comm& comm = args.comm;
    const uint32_t num_pieces = (args.row_bytes + args.push_bytes - 1) / args.push_bytes;
    const uint32_t num_units = shared.num_rows * num_pieces;
    const uint64_t most = (args.slot.num_bytes - args.rows_offset) / args.row_bytes;
    for (uint32_t unit = blockIdx.x + warp_index() * gridDim.x; unit < num_units;
         unit += gridDim.x * warps_per_block()) {
        const int number = unit / num_pieces;
        const uint32_t offset = unit % num_pieces * args.push_bytes;
        const int expert = last_below(args.num_local_experts, number, [&](int e) { return shared.first[e]; });
        const int row = number - shared.first[expert];
        const int source = last_below(comm.num_ranks, row, [&](int s) { return range_of(args, expert, s).begin; });
        if (!(reachable >> source & 1)) continue;
        const uint64_t there = pointer<const int32_t>(args.send_begin)[expert * comm.num_ranks + source] + row -
                               range_of(args, expert, source).begin;
        if (there >= most) continue;  // no handle of this dispatch: nothing is written outside of the slot
        const uint64_t from = (static_cast<uint64_t>(expert) * args.max_rows + row) * args.row_bytes + offset;
        const uint64_t to = args.slot.at(comm, source) + args.rows_offset + there * args.row_bytes + offset;
        copy_by_lanes(pointer<const uint8_t>(args.x + from), lane_index() == 0 ? to : 0,
                      min(args.push_bytes, args.row_bytes - offset));
    }
}

// -- receive ----------------------------------------------------------------------------------------------------------

// Lane k: where the row of choice k is, or 0.
__device__ inline uint64_t row_of_choice(const LowLatencyCombineArgs& args, const Arrival& arrival, int token) {
    const Comm& comm = args.comm;
    const int num_local = args.num_local_experts;
    const int64_t at = static_cast<int64_t>(token) * args.num_topk + lane_index();
    if (lane_index() >= args.num_topk) return 0;
    const int64_t expert = args.index_bytes == 8 ? pointer<const int64_t>(args.topk_idx)[at]
                                                 : pointer<const int32_t>(args.topk_idx)[at];
    const int number = pointer<const int32_t>(args.send_pos)[at];
    if (expert < 0 || expert >= static_cast<int64_t>(num_local) * comm.num_ranks || number < 0) return 0;
    const int owner = static_cast<int>(expert) / num_local;
    if (!(arrival.present >> owner & 1)) return 0;
    const uint64_t slot = args.slot.at(comm, comm.rank);
    if (!(arrival.pulling >> owner & 1))
        return slot + args.rows_offset + static_cast<uint64_t>(number) * args.row_bytes;
    const int64_t row = number + static_cast<int64_t>(pointer<const int32_t>(slot)[expert]);
    if (row < 0 || row >= args.max_rows) return 0;  // not the choices of the dispatch: nothing outside is read
    return args.buffer[owner] + (expert % num_local * args.max_rows + row) * args.row_bytes;
}

// All lanes: the weighted sum of a piece, `address` and `weight` of lane k those of choice k.
__device__ inline void sum_piece(uint64_t address, float weight, uint64_t out, uint32_t num_bytes) {
    constexpr int kBatch = 8;
    const uint32_t wanted = __ballot_sync(~0u, address != 0), num_vectors = num_bytes / sizeof(Vector);
    for (uint32_t first = 0; first < num_vectors; first += kWarp) {
        const uint32_t at = first + lane_index();
        Sum sum;
        uint32_t rest = wanted;
        while (rest != 0) {
            Vector values[kBatch];
            uint32_t batch = rest;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (rest == 0) continue;
                // Plain loads, and no `__restrict__`: what peers wrote must not come through the read-only cache.
                const Vector* from = pointer<const Vector>(__shfl_sync(~0u, address, __ffs(rest) - 1));
                rest &= rest - 1;
                if (at < num_vectors) values[i] = from[at];
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (batch == rest) continue;
                const float w = __shfl_sync(~0u, weight, __ffs(batch) - 1);
                batch &= batch - 1;
                if (at < num_vectors) sum.add_weighted(w, values[i]);
            }
        }
        if (at < num_vectors) pointer<Vector>(out)[at] = sum.rounded();
    }
}

// All warps: tokens in pieces.
__device__ inline void sum_tokens(const LowLatencyCombineArgs& args, const Arrival& arrival) {
    const uint32_t num_pieces = (args.row_bytes + args.sum_bytes - 1) / args.sum_bytes;
    const uint32_t num_units = args.num_tokens * num_pieces;
    for (uint32_t unit = blockIdx.x + warp_index() * gridDim.x; unit < num_units;
         unit += gridDim.x * warps_per_block()) {
        const uint32_t token = unit / num_pieces, offset = unit % num_pieces * args.sum_bytes;
        const uint64_t row = row_of_choice(args, arrival, token);
        const int64_t at = static_cast<int64_t>(token) * args.num_topk + lane_index();
        const float weight = lane_index() < args.num_topk ? pointer<const float>(args.topk_weights)[at] : 0.0f;
        const uint64_t out = args.out + static_cast<uint64_t>(token) * args.row_bytes + offset;
        sum_piece(row != 0 ? row + offset : 0, weight, out, min(args.sum_bytes, args.row_bytes - offset));
    }
}

// All threads of all blocks. False: the call has failed.
__device__ inline bool send(const LowLatencyCombineArgs& args, const Call& call, Shared& shared) {
    const Comm& comm = args.comm;
    const uint32_t reachable = await_room(comm, call, args.slot, shared.reachable);
    if (reachable == 0) return false;
    if (args.slot.is_rejected) return true;
    if (!args.is_pulled) {
        number_rows(args, shared);
        push_rows(args, shared, reachable);
    } else if (blockIdx.x == 0) {
        send_places(args, reachable);
    }
    return true;
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    epcomm_low_latency_combine(const __grid_constant__ LowLatencyCombineArgs args) {
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, args.slot.operation, call)) return;
    bool good = true, is_last = false;
    uint32_t num_tickets = 0;
    if (args.slot.halves & kSend) {
        good = send(args, call, shared);
        is_last = is_last_to_tell(comm, call);
        if (is_last && warp_index() == 0) post_words(comm, call, args.slot, args.is_pulled);
        num_tickets = gridDim.x;
    }
    if (args.slot.halves & kReceive) {
        good = good && await_arrival(comm, call, args.slot, pointer<int64_t>(args.wait_stats), shared.arrival);
        if (good && shared.arrival.present != 0) sum_tokens(args, shared.arrival);
        is_last = is_last_to_tell(comm, call, num_tickets);
        if (is_last && warp_index() == 0) acknowledge(comm, call, args.slot);
    }
    if (is_last) end(comm, call, args.slot.halves & kReceive);
}

}  // namespace epcomm
