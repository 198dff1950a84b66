// internode_dispatch.cuh: what the roles of internode_dispatch.cu share: arguments and places.
#pragma once

#include "kernels/dispatch_fields.cuh"
#include "kernels/internode.cuh"
#include "sync/entry.cuh"
#include "sync/handover.cuh"

namespace epcomm {

struct InternodeDispatchArgs {
    Comm comm;
    Nodes nodes;
    Ring rows, beside;
    Nodes handed;  // and what is handed over to ranks of the own node, see sync/handover.cuh
    Ring handed_rows, handed_beside;
    EntryArgs entry;
    uint32_t slot_field[kNumFields];  // offsets in a row of the ring `beside`; that of kRow: where it goes
    int32_t has_metadata;             // indices, weights and sources travel
    uint64_t x;                       // [num_tokens, row_bytes]
    uint64_t scales;                  // [num_tokens, num_scales] of scale_bytes each, any strides; or 0
    int64_t scale_stride_token, scale_stride_scale;  // in elements
    uint64_t topk_idx;                // [num_tokens, num_topk] of index_bytes each, or 0
    uint64_t topk_weights;            // float32 [num_tokens, num_topk], or 0
    uint64_t send_pos;                // int32 [num_tokens, num_ranks]
    uint64_t rank_prefix;             // int32 [num_ranks, num_ranks]
    uint64_t out[kNumFields];         // this rank's outputs
    uint64_t node_counts;             // int32 [num_nodes], rows that this rank hands out, by source node, added; or 0
    Pieces pieces;
    uint32_t stage_bytes;
    int32_t num_scales, scale_bytes, num_topk, index_bytes, num_local_experts;
    int32_t num_worst_tokens;  // 0: as many rows as there are
    int32_t is_forced;         // whatever the last exchange said
    int32_t has_weights;       // an empty array has no address
    int32_t num_senders, num_forwarders;  // warps of a block that move rows
    int32_t num_takers;  // likewise; 0: this rank's outputs are in its arena
    int32_t unused;

    __device__ bool has_beside() const { return num_scales > 0 || has_metadata; }
};
static_assert(sizeof(InternodeDispatchArgs) == sizeof(Comm) + 2 * 24 + 4 * 24 + 64 + 24 + 8 * 8 + 40 + 8 + 12 + 4 + 12 * 4,
              "InternodeDispatchArgs differs from epcomm/kernels/internode_dispatch.py");

// Where the fields of rows go at one rank of the own node: field f of row i is at field[f] + i * field_bytes(f).
struct Places {
    uint64_t field[kNumFields];
    bool is_windowed;  // they are outside of its arena
};

struct Shared {
    Entry entries[kMaxRanks];
    Places places[kMaxRanks];
    uint32_t windowed;
    Extents extents;
};

// One thread per rank. False: the offsets point out of the region.
__device__ inline bool find_places(const InternodeDispatchArgs& args, Shared& shared, int r) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    shared.extents.find(args, r);
    const Entry entry = shared.entries[r];
    shared.places[r].is_windowed = false;
    if (nodes.node_of(r) != nodes.own) return true;
    if (entry.rows == kThroughWindow) {
        shared.places[r].is_windowed = true;
        for (int f = 0; f < kNumFields; ++f) shared.places[r].field[f] = args.out[f];  // where they are this rank's own
        return true;
    }
    return find_fields(args, r, entry.rows, entry.metadata, shared.extents.num_rows[r], shared.places[r].field);
}

}  // namespace epcomm
