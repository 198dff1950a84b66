// low_latency_dispatch.cuh: what the halves of low_latency_dispatch.cu share: arguments, places, shared memory.
#pragma once

#include "common/numerics.cuh"
#include "sync/message.cuh"
#include "sync/slot.cuh"

#ifndef LOW_LATENCY_FP8
#define LOW_LATENCY_FP8 0
#endif

namespace epcomm {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kServer = kWarps - 1;  // the warp that serves its block; the others send
inline constexpr int kSenders = kServer * kWarp;  // threads
inline constexpr bool kIsFp8 = LOW_LATENCY_FP8;
inline constexpr int kSendVectors = 8;                      // of a piece of x, a lane
inline constexpr int kRowVectors = kSendVectors >> kIsFp8;  // and of what travels of it
inline constexpr uint32_t kColumn = kWarp * sizeof(Vector);  // bytes of a row that a warp moves at once

// How rows are scaled; the numbers are in epcomm/kernels/low_latency_dispatch.py.
enum Scales : uint32_t { kExact = 0, kPowerOfTwo = 1, kExponents = 2 };

struct LowLatencyDispatchArgs {
    Comm comm;
    SlotArgs slot;
    uint64_t row_lane_bytes, cell_lane_bytes;
    uint64_t row_stride;
    uint64_t staging;       // offset of this rank's rows that go through the network, [max_tokens] at that stride
    uint64_t x;             // bfloat16 [num_tokens, hidden]
    uint64_t topk_idx;      // int32 or int64 [num_tokens, num_topk]
    uint64_t send_info;     // int32 [num_tokens, num_topk, 2], out: expert, and row among those that this rank sends to it
    uint64_t recv_x;        // [L, max_rows, row], out
    uint64_t recv_scales;   // float32 or int32 [L, width, max_rows], out
    uint64_t recv_count;    // int32 [L], out
    uint64_t src_info;      // int32 [L, max_rows], out
    uint64_t layout_range;  // int64 [L, num_ranks], out: first row << 32 | rows
    uint64_t messages;      // int32 [num_ranks, max_tokens, 1 + num_topk], out: values of the header cells
    uint64_t num_messages;  // int32 [num_ranks + 1], out: behind them the ranks that have sent, a bit each
    uint64_t expert_stats;  // int32 [L] or 0
    uint64_t wait_stats;    // int64 [num_ranks] or 0
    Divisor by_topk, by_local, by_pieces;  // by num_topk, num_local_experts, num_pieces
    uint32_t scales;        // Scales
    uint32_t piece_bytes;   // of a row as it travels, without scales; the same on all ranks
    uint32_t num_pieces;
    uint32_t num_words;     // of 32 tokens each, that this rank looks at together
    int32_t hidden, num_tokens, num_topk, index_bytes, num_local_experts, max_tokens;

    __device__ int num_experts() const { return num_local_experts * comm.num_ranks; }
    __device__ int max_rows() const { return max_tokens * comm.num_ranks; }
    __device__ uint32_t row_bytes() const { return hidden * (kIsFp8 ? 1 : 2); }
    __device__ uint32_t bytes_of(uint32_t piece) const {
        return min(piece_bytes, row_bytes() - piece * piece_bytes);
    }
    // Lanes of source `source` at rank `owner`.
    __device__ uint64_t rows_of(int owner, int source) const {
        return slot.rows_at(comm, owner) + source * row_lane_bytes;
    }
    __device__ uint64_t staged_row(int token) const { return comm.control[comm.rank] + staging + token * row_stride; }
    // Cells, which a sender sets by set_word: those of its own lane, as if it were the owner.
    __device__ uint64_t* counts_of(int owner, int source) const {
        return slot.cells_at(comm, owner) + source * (cell_lane_bytes / sizeof(uint64_t));
    }
    __device__ uint64_t* header_of(int owner, int source, int message) const {
        return counts_of(owner, source) + num_local_experts + 1 + message * (1 + num_topk);
    }
    __device__ uint64_t* piece_of(int owner, int source, int message, int piece) const {
        return header_of(owner, source, max_tokens) + message * num_pieces + piece;
    }
    // At this rank: the cell that tells of a piece.
    __device__ const uint64_t* arrived_piece(int source, int message, int piece) const {
        return piece_of(comm.rank, source, message, slot.is_far(source) ? 0 : piece);
    }
};
static_assert(sizeof(LowLatencyDispatchArgs) == sizeof(Comm) + 88 + 16 * 8 + 3 * 8 + 10 * 4,
              "LowLatencyDispatchArgs differs from epcomm/kernels/low_latency_dispatch.py");

struct Shared {
    Opening opening;
    uint32_t service;
    int32_t next_unit;                     // of the send half, that no warp has taken
    int32_t first_message[kMaxRanks + 1];  // by source: number of its first message, of all
};

// Dynamic shared memory. Rows of bits: those of the experts, then those of the ranks, one bit a token of the chunk.
struct Tables {
    uint32_t* bits;   // [num_rows, num_words]
    int32_t* before;  // [num_rows]: bits of earlier chunks
    int32_t* chosen;  // [32 * num_words, num_topk]: owner << 16 | local expert, or -1
    int32_t* begins;  // [L, num_ranks + 1]: first row of a source at an expert, and the end
    int num_rows;

    __device__ Tables(const LowLatencyDispatchArgs& args, uint32_t* memory)
        : num_rows(args.num_experts() + args.comm.num_ranks) {
        bits = memory;
        before = reinterpret_cast<int32_t*>(bits + num_rows * args.num_words);
        chosen = before + num_rows;
        begins = chosen + kWarp * args.num_words * args.num_topk;
    }
};

__device__ inline int64_t choice_at(const LowLatencyDispatchArgs& args, int64_t at) {
    return args.index_bytes == 8 ? pointer<const int64_t>(args.topk_idx)[at] : pointer<const int32_t>(args.topk_idx)[at];
}

}  // namespace epcomm
