// internode_dispatch_beside.cuh: what travels beside the rows of an internode dispatch, in small pieces whose latency would
// hold up the pipes of rows, by warps and through rings of its own. A row of such a message:
//
//     [ int32 row at each local rank of the receiver, or -1 | scales | indices | weights | source token ]
#pragma once

#include "kernels/internode_dispatch.cuh"

namespace epcomm {

// Where field f of a local rank's row is; lane-wise or not.
__device__ inline uint64_t place_of(const InternodeDispatchArgs& args, const Shared& shared, int local, int field, int row) {
    return shared.places[args.nodes.first_local() + local].field[field] + static_cast<uint64_t>(row) * field_bytes(args, field);
}

// All lanes: indices, weights and source of a token to the ranks of the own node; lane k knows the row at local rank k.
__device__ inline void hand_out(const InternodeDispatchArgs& args, const Shared& shared, const Chosen& chosen, int token,
                                int local_row) {
    if (!args.has_metadata) return;
    for (uint32_t rest = __ballot_sync(~0u, local_row >= 0); rest != 0; rest &= rest - 1) {
        const int k = __ffs(rest) - 1, row = __shfl_sync(~0u, local_row, k);
        store_local(args, args.nodes.first_local() + k, chosen, place_of(args, shared, k, kTopkIdx, row),
                    place_of(args, shared, k, kTopkWeights, row));
        if (lane_index() == 0) *pointer<int32_t>(place_of(args, shared, k, kSource, row)) = token;
    }
}

// One warp: the tokens of a unit, whose groups are free; `group` is that for the node that a lane stands for. Its number of rows.
__device__ inline int send_beside_unit(const InternodeDispatchArgs& args, const Shared& shared, const Destination& to,
                                       uint64_t group, int first, int end) {
    const Nodes& nodes = args.nodes;
    const int lane = lane_index();
    int num_sent = 0;
    for (int token = first; token < end; ++token) {
        const Wanted wanted(args, shared.extents, token);
        if (wanted.ranks == 0) continue;
        const int64_t choices = static_cast<int64_t>(token) * args.num_topk;
        const Chosen chosen =
            load_chosen(args, args.topk_idx + choices * args.index_bytes, args.topk_weights + choices * sizeof(float));
        const int row = wanted.local_row(args, to);
        const bool is_sent = wanted.has_node(args, to.node);
        const uint64_t slot = is_sent ? group + static_cast<uint64_t>(num_sent++) * args.beside.row_bytes : 0;
        uint64_t scales = is_sent ? slot + args.slot_field[kScales] : 0;
        if (row >= 0) scales = place_of(args, shared, to.local, kScales, row);
        spread_scales(args, args.scales + token * args.scale_stride_token * args.scale_bytes, args.scale_stride_scale,
                      scales);
        hand_out(args, shared, chosen, token, row);
        for (uint32_t rest = __ballot_sync(~0u, is_sent); rest != 0; rest &= rest - 1) {
            const int from = __ffs(rest) - 1;
            const uint64_t there = __shfl_sync(~0u, slot, from);
            const int first_rank = nodes.first_of(__shfl_sync(~0u, to.node, from));
            const int row_there = __shfl_sync(~0u, wanted.row, min(first_rank + lane, kWarp - 1));
            if (lane < nodes.ranks_per_node) pointer<int32_t>(there + args.slot_field[kRow])[lane] = row_there;
            if (lane < args.num_topk) {
                store_index(args, there + args.slot_field[kTopkIdx], chosen.expert);
                if (args.has_weights) pointer<float>(there + args.slot_field[kTopkWeights])[lane] = chosen.weight;
            }
            if (lane == 0) *pointer<int32_t>(there + args.slot_field[kSource]) = token;
        }
    }
    return num_sent;
}

__device__ inline bool send_beside(const InternodeDispatchArgs& args, const Call& call, const Shared& shared,
                                   const Share& share) {
    const Comm& comm = args.comm;
    const Ring& ring = args.beside;
    const Destination to(args);
    const uint32_t num_units = ring.num_units(args.entry.num_tokens);
    for (uint32_t unit = share.first(); unit < num_units; unit += share.step()) {
        if (!await_group(comm, call, args.nodes, ring, kBesideTaken, to.node, unit)) return false;
        const int first = unit * ring.unit_tokens, end = min(first + static_cast<int>(ring.unit_tokens), args.entry.num_tokens);
        const uint64_t group = to.node >= 0 ? ring.outgoing(comm, args.nodes, to.node, unit) : 0;
        const int num_rows = send_beside_unit(args, shared, to, group, first, end);
        send(comm, call, args.nodes, ring, kBesideSent, to.node, unit, num_rows, group);
    }
    return await_taken(comm, call, args.nodes, ring, kBesideTaken, to.node, num_units, share);
}

__device__ inline bool forward_beside(const InternodeDispatchArgs& args, const Call& call, const Shared& shared,
                                      const Share& share) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const Ring& ring = args.beside;
    const int lane = lane_index(), num_local = nodes.ranks_per_node;
    const bool is_local = lane < num_local;
    const int rank = args.nodes.first_local() + (is_local ? lane : 0);
    return for_each_message(args, shared.entries, ring, share, [&](int node, uint32_t unit) {
        const int num_rows = await_message(comm, call, nodes, ring, kBesideSent, node, unit);
        if (num_rows < 0) return false;
        const uint64_t head = ring.head(comm, nodes, comm.rank, node, unit);
        for (int i = 0; i < num_rows; ++i) {
            const uint64_t slot = head + static_cast<uint64_t>(i) * ring.row_bytes;
            int row = is_local ? pointer<const int32_t>(slot + args.slot_field[kRow])[lane] : -1;
            const int token = *pointer<const int32_t>(slot + args.slot_field[kSource]);
            const Chosen chosen = load_chosen(args, slot + args.slot_field[kTopkIdx], slot + args.slot_field[kTopkWeights]);
            if (row >= shared.extents.num_rows[rank]) row = -1;  // as above
            spread_scales(args, slot + args.slot_field[kScales], 1, row < 0 ? 0 : place_of(args, shared, lane, kScales, row));
            hand_out(args, shared, chosen, token, row);
        }
        note_taken(comm, call, nodes, ring, kBesideTaken, node, unit);
        return true;
    });
}

}  // namespace epcomm
