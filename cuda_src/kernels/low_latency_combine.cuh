// low_latency_combine.cuh: what the halves of low_latency_combine.cu share: arguments, places, shared memory.
#pragma once

#include "common/numerics.cuh"
#include "sync/message.cuh"
#include "sync/slot.cuh"

#ifndef LOW_LATENCY_PAYLOAD
#define LOW_LATENCY_PAYLOAD 0
#endif

namespace epcomm {

// What travels; the numbers are in epcomm/kernels/low_latency_combine.py.
enum Payload {
    kRows = 0,         // the experts' rows, pushed or pulled
    kEncodedRows = 1,  // the experts' rows in LogFMT, pushed
    kPartialSums = 2   // the sum of a token's rows at each owner, pushed
};

inline constexpr Payload kPayload = static_cast<Payload>(LOW_LATENCY_PAYLOAD);
inline constexpr bool kMayPull = kPayload == kRows;
inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kServer = kWarps - 1;  // the warp that serves its block
inline constexpr uint32_t kColumn = kWarp * sizeof(Vector);  // bytes of a row that a warp takes at once
inline constexpr int kPushColumns = 8;                       // of a piece, at most
using Sum = VectorSum<__nv_bfloat16>;

struct LowLatencyCombineArgs {
    Comm comm;
    SlotArgs slot;
    uint64_t buffer[kMaxRanks];  // by rank: address of its combine buffer of this slot, or 0
    uint64_t staging;            // offset of this rank's rows that go through the network, as they will lie at each far rank
    uint64_t staging_bytes;      // of those for one rank
    uint64_t x;                  // bfloat16 [L, max_rows, hidden], this rank's
    uint64_t topk_idx;           // int32 or int64 [num_tokens, num_topk]
    uint64_t topk_weights;       // float32 [num_tokens, num_topk]
    uint64_t send_info;          // int32 [num_tokens, num_topk, 2], of the dispatch
    uint64_t layout_range;       // int64 [L, num_ranks], of the dispatch: first row << 32 | rows
    uint64_t messages;           // int32 [num_ranks, max_tokens, 1 + num_topk], of the dispatch
    uint64_t num_messages;       // int32 [num_ranks + 1], of the dispatch: behind them the ranks that had sent, a bit each
    uint64_t out;                // bfloat16 [num_tokens, hidden]
    uint64_t wait_stats;         // int64 [num_ranks] or 0
    uint32_t row_bytes;
    uint32_t wire_bytes;   // of a row as it travels
    uint32_t piece_bytes;  // of a row, before it is encoded; the same on all ranks
    uint32_t num_pieces;
    int32_t is_pulled;     // x is this rank's combine buffer, and its rows are pulled
    int32_t num_tokens, num_topk, index_bytes, num_local_experts, max_tokens;
    Divisor by_local, by_pieces;  // by num_local_experts, num_pieces

    __device__ int num_experts() const { return num_local_experts * comm.num_ranks; }
    __device__ int max_rows() const { return max_tokens * comm.num_ranks; }
    // Of rank `source`: where the rows of one of its choices go, the cells of their pieces, and those of first rows.
    __device__ uint64_t place_of(int source, int64_t choice) const {
        return slot.rows_at(comm, source) + choice * wire_bytes;
    }
    __device__ uint64_t staged_at(int source, int64_t choice) const {
        return comm.control[comm.rank] + staging + slot.far_index(source) * staging_bytes + choice * wire_bytes;
    }
    // Cells, which a sender sets by set_word: those of its own, as if it were the other.
    __device__ uint64_t* begins_at(int source) const { return slot.cells_at(comm, source); }
    __device__ uint64_t* piece_at(int source, int64_t choice, uint32_t piece) const {
        return begins_at(source) + num_experts() + choice * num_pieces + piece;
    }
    // Of rank `source` at rank `owner`, where there are partial sums: what must be equal on all ranks; no row is pulled.
    __device__ uint64_t* digest_at(int owner, int source) const { return begins_at(owner) + source; }
    // At rank `owner`: the weight of a choice of `source`.
    __device__ uint64_t* weight_at(int owner, int source, int64_t choice) const {
        const int64_t num_choices = static_cast<int64_t>(max_tokens) * num_topk;
        return piece_at(owner, num_choices, 0) + source * num_choices + choice;
    }
    // First row of `source` at a local expert.
    __device__ int begin_of(int expert, int source) const {
        return static_cast<int>(pointer<const int64_t>(layout_range)[expert * comm.num_ranks + source] >> 32);
    }
};
static_assert(sizeof(LowLatencyCombineArgs) == sizeof(Comm) + 88 + 256 + 11 * 8 + 10 * 4 + 2 * 8,
              "LowLatencyCombineArgs differs from epcomm/kernels/low_latency_combine.py");

struct Shared {
    Opening opening;
    uint32_t dispatched;  // ranks that had sent in the dispatch, a bit each; none: it moved nothing, or this call is rejected
    uint32_t service;
    Arrival arrival;
    int32_t first_message[kMaxRanks + 1];  // by source: number of its first message, of all
    // By warp: of the rows that it adds, and of those that it adds next; in the order in which they are added.
    uint64_t address[kWarps][2][kMaxTopk];
    float weight[kWarps][2][kMaxTopk];
};

}  // namespace epcomm
