// dispatch_fields.cuh: what travels with a token of a dispatch, and where it lies in a rank's outputs; for the kernels of
// one node and of several. `Args` has num_scales, scale_bytes, num_topk, index_bytes, has_weights, num_worst_tokens,
// pieces, out and comm.
#pragma once

#include "sync/call.cuh"
#include "sync/rows.cuh"

namespace epcomm {

inline constexpr int kBesideWarps = 4;  // of each role of a block; as in epcomm/kernels/dispatch.py

// The numbers are indices of what is given by field.
enum Field : int { kRow = 0, kScales = 1, kTopkIdx = 2, kTopkWeights = 3, kSource = 4, kNumFields = 5 };

template <typename Args> __device__ inline uint32_t field_bytes(const Args& args, int field) {
    switch (field) {
        case kRow: return args.pieces.row_bytes;
        case kScales: return args.num_scales * args.scale_bytes;
        case kTopkIdx: return args.num_topk * args.index_bytes;
        case kTopkWeights: return args.has_weights ? args.num_topk * 4 : 0;
        default: return 4;
    }
}

// Where the fields of row 0 are in the outputs of rank r, which are in its arena: two blocks at these offsets, in units,
// of which the second may be kNoBlock. False: they point out of the region. A peer's memory may hold anything; this rank
// does not write outside of the regions.
template <typename Args>
__device__ inline bool find_fields(const Args& args, int r, uint32_t rows_block, uint32_t metadata_block, int num_rows,
                                   uint64_t (&field)[kNumFields]) {
    const Comm& comm = args.comm;
    const uint64_t rows = rows_block * kUnit, metadata = metadata_block * kUnit;
    const MetadataLayout beside(num_rows, args.num_topk, args.index_bytes, args.has_weights);
    const uint64_t scales = scales_offset(num_rows, args.pieces.row_bytes);
    const bool has_metadata = metadata_block != kNoBlock;
    field[kRow] = comm.region[r] + rows;
    field[kScales] = comm.region[r] + rows + scales;
    field[kSource] = has_metadata ? comm.region[r] + metadata : 0;
    field[kTopkIdx] = comm.region[r] + metadata + beside.topk_idx;
    field[kTopkWeights] = comm.region[r] + metadata + beside.topk_weights;
    const uint64_t rows_end = rows + scales + static_cast<uint64_t>(num_rows) * field_bytes(args, kScales);
    return rows_end <= comm.region_bytes && (!has_metadata || metadata + beside.num_bytes <= comm.region_bytes);
}

// What a lane has of a token's choices: choice `lane`.
struct Chosen {
    int64_t expert;
    float weight;
};

// All lanes: the choices of a token, from where its indices and weights begin.
template <typename Args>
__device__ inline Chosen load_chosen(const Args& args, uint64_t topk_idx, uint64_t topk_weights) {
    const int lane = lane_index();
    Chosen chosen = {-1, 0.0f};
    if (lane >= args.num_topk) return chosen;
    chosen.expert = args.index_bytes == 8 ? pointer<const int64_t>(topk_idx)[lane] : pointer<const int32_t>(topk_idx)[lane];
    if (args.has_weights) chosen.weight = pointer<const float>(topk_weights)[lane];
    return chosen;
}

template <typename Args> __device__ inline void store_index(const Args& args, uint64_t topk_idx, int64_t expert) {
    if (args.index_bytes == 8) {
        pointer<int64_t>(topk_idx)[lane_index()] = expert;
    } else {
        pointer<int32_t>(topk_idx)[lane_index()] = static_cast<int32_t>(expert);
    }
}

// All lanes: the choices of a token as rank r sees them, its own experts counted from 0, and no others.
template <typename Args>
__device__ inline void store_local(const Args& args, int r, const Chosen& chosen, uint64_t topk_idx,
                                   uint64_t topk_weights) {
    const int lane = lane_index();
    if (lane >= args.num_topk) return;
    const int64_t local = chosen.expert - static_cast<int64_t>(r) * args.num_local_experts;
    const bool is_here = static_cast<uint64_t>(local) < static_cast<uint64_t>(args.num_local_experts);
    store_index(args, topk_idx, is_here ? local : -1);
    if (args.has_weights) pointer<float>(topk_weights)[lane] = is_here ? chosen.weight : 0.0f;
}

// All lanes: `count` elements, read once, to every lane's destination that is not 0.
template <typename T>
__device__ inline void spread(const T* from, int64_t stride, int count, uint64_t destination) {
    const uint32_t wanted = __ballot_sync(~0u, destination != 0);
    for (int first = lane_index(); first - lane_index() < count; first += 2 * kWarp) {
        const int second = first + kWarp;
        T values[2];
        if (first < count) values[0] = from[first * stride];
        if (second < count) values[1] = from[second * stride];
        for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
            T* to = pointer<T>(__shfl_sync(~0u, destination, __ffs(rest) - 1));
            if (first < count) to[first] = values[0];
            if (second < count) to[second] = values[1];
        }
    }
}

// All lanes: the scales of a token; `stride` in elements.
template <typename Args>
__device__ inline void spread_scales(const Args& args, uint64_t from, int64_t stride, uint64_t destination) {
    if (args.num_scales == 0) return;
    if (args.scale_bytes == 4) {
        spread(pointer<const uint32_t>(from), stride, args.num_scales, destination);
    } else if (args.scale_bytes == 2) {
        spread(pointer<const uint16_t>(from), stride, args.num_scales, destination);
    } else {
        spread(pointer<const uint8_t>(from), stride, args.num_scales, destination);
    }
}

// All blocks: rows from `num_received` on select nothing.
template <typename Args> __device__ inline void pad_topk_idx(const Args& args, int num_received) {
    const int64_t first = static_cast<int64_t>(min(num_received, args.num_worst_tokens)) * args.num_topk;
    const int64_t end = static_cast<int64_t>(args.num_worst_tokens) * args.num_topk;
    for (int64_t i = first + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += gridDim.x * blockDim.x) {
        if (args.index_bytes == 8) {
            pointer<int64_t>(args.out[kTopkIdx])[i] = -1;
        } else {
            pointer<int32_t>(args.out[kTopkIdx])[i] = -1;
        }
    }
}

// All threads of all blocks, with num_worst_tokens: pad, and tell the host of rows for this rank that did not fit.
template <typename Args> __device__ inline void note_worst_case(const Args& args) {
    const Comm& comm = args.comm;
    const int32_t* last_row = pointer<const int32_t>(args.rank_prefix) + (comm.num_ranks - 1) * comm.num_ranks;
    const int num_received = last_row[comm.rank];
    pad_topk_idx(args, num_received);
    if (blockIdx.x == 0 && threadIdx.x == 0 && num_received > args.num_worst_tokens)
        *const_cast<volatile uint32_t*>(&comm.page()->dropped) += num_received - args.num_worst_tokens;
}

}  // namespace epcomm
