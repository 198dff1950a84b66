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

// A lane that hands over: its next slot in the group at `handed`, if it has a row, which it notes there; else 0.
__device__ inline uint64_t hand_slot(const InternodeDispatchArgs& args, const Handing& handing, uint64_t handed, int row,
                                     int& num_handed) {
    if (!handing.is_used || row < 0) return 0;
    const uint64_t slot = handed + static_cast<uint64_t>(num_handed++) * args.handed_beside.row_bytes;
    *pointer<int32_t>(slot + args.slot_field[kRow]) = row;
    return slot;
}

// All lanes: indices, weights and source of a token to the ranks of the own node; lane k knows the row at local rank k, and
// the slot, if that is handed over.
__device__ inline void hand_out(const InternodeDispatchArgs& args, const Shared& shared, const Chosen& chosen, int token,
                                int local_row, uint64_t handed_slot) {
    if (!args.has_metadata) return;
    for (uint32_t rest = __ballot_sync(~0u, local_row >= 0); rest != 0; rest &= rest - 1) {
        const int k = __ffs(rest) - 1, row = __shfl_sync(~0u, local_row, k);
        const uint64_t slot = __shfl_sync(~0u, handed_slot, k);
        auto place = [&](int field) {
            return slot != 0 ? slot + args.slot_field[field] : place_of(args, shared, k, field, row);
        };
        store_local(args, args.nodes.first_local() + k, chosen, place(kTopkIdx), place(kTopkWeights));
        if (lane_index() == 0) *pointer<int32_t>(place(kSource)) = token;
    }
}

// One warp: the tokens of a unit, whose groups are free; `group` is that for the node, or for the local rank to which a lane
// hands over. Its number of rows.
__device__ inline int send_beside_unit(const InternodeDispatchArgs& args, const Shared& shared, const Destination& to,
                                       const Handing& handing, uint64_t group, int first, int end) {
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
        const uint64_t handed = hand_slot(args, handing, group, row, num_sent);
        uint64_t scales = is_sent ? slot + args.slot_field[kScales] : 0;
        if (row >= 0) scales = handed != 0 ? handed + args.slot_field[kScales] : place_of(args, shared, to.local, kScales, row);
        spread_scales(args, args.scales + token * args.scale_stride_token * args.scale_bytes, args.scale_stride_scale,
                      scales);
        hand_out(args, shared, chosen, token, row, handed);
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

template <bool kHandsOver>
__device__ inline bool send_beside(const InternodeDispatchArgs& args, const Call& call, const Shared& shared,
                                   const Share& share) {
    const Comm& comm = args.comm;
    const Ring& ring = args.beside;
    const Destination to(args);
    const Handing handing(comm, args.nodes, args.handed, kHandsOver ? shared.windowed : 0, to.local, comm.rank, kBesideSent,
                          kBesideTaken);
    const uint32_t num_units = ring.num_units(args.entry.num_tokens);
    for (uint32_t unit = share.first(); unit < num_units; unit += share.step()) {
        if (!await_group(comm, call, args.nodes, ring, kBesideTaken, to.node, unit)) return false;
        if (kHandsOver && !handing.await(comm, call, args.handed_beside, unit)) return false;
        const int first = unit * ring.unit_tokens, end = min(first + static_cast<int>(ring.unit_tokens), args.entry.num_tokens);
        uint64_t group = to.node >= 0 ? ring.outgoing(comm, args.nodes, to.node, unit) : 0;
        if (handing.is_used) group = handing.group(comm, args.handed, args.handed_beside, comm.rank, unit);
        const int num_rows = send_beside_unit(args, shared, to, handing, group, first, end);
        if (kHandsOver) handing.send(call, args.handed_beside, unit, num_rows);
        send(comm, call, args.nodes, ring, kBesideSent, to.node, unit, num_rows, group);
    }
    return await_taken(comm, call, args.nodes, ring, kBesideTaken, to.node, num_units, share);
}

template <bool kHandsOver>
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
        const int from = nodes.on_rail(node);
        const Handing handing(comm, nodes, args.handed, kHandsOver ? shared.windowed : 0, is_local ? lane : -1, from,
                              kBesideSent, kBesideTaken);
        if (kHandsOver && !handing.await(comm, call, args.handed_beside, unit)) return false;
        const uint64_t group = handing.group(comm, args.handed, args.handed_beside, from, unit);
        int num_handed = 0;
        const uint64_t head = ring.head(comm, nodes, comm.rank, node, unit);
        for (int i = 0; i < num_rows; ++i) {
            const uint64_t slot = head + static_cast<uint64_t>(i) * ring.row_bytes;
            int row = is_local ? pointer<const int32_t>(slot + args.slot_field[kRow])[lane] : -1;
            const int token = *pointer<const int32_t>(slot + args.slot_field[kSource]);
            const Chosen chosen = load_chosen(args, slot + args.slot_field[kTopkIdx], slot + args.slot_field[kTopkWeights]);
            if (row >= shared.extents.num_rows[rank]) row = -1;  // as above
            const uint64_t handed = hand_slot(args, handing, group, row, num_handed);
            uint64_t scales = 0;
            if (row >= 0) scales = handed != 0 ? handed + args.slot_field[kScales] : place_of(args, shared, lane, kScales, row);
            spread_scales(args, slot + args.slot_field[kScales], 1, scales);
            hand_out(args, shared, chosen, token, row, handed);
        }
        if (kHandsOver) handing.send(call, args.handed_beside, unit, num_handed);
        note_taken(comm, call, nodes, ring, kBesideTaken, node, unit);
        return true;
    });
}

// What is handed over to this rank, whose outputs are outside of its arena.
__device__ inline bool take_beside(const InternodeDispatchArgs& args, const Call& call, const Shared& shared,
                                   const Share& share) {
    const Comm& comm = args.comm;
    const Ring& ring = args.handed_beside;
    const int lane = lane_index(), local = args.nodes.local;
    auto take = [&](int from, int writer, uint32_t unit) {
        const uint64_t* word = args.handed.word(comm, comm.rank, kBesideSent, from, unit % ring.num_groups);
        const int num_rows = await_message_at(comm, call, ring, word, writer, unit);
        if (num_rows < 0) return false;
        const uint64_t head = ring.head(comm, args.handed, comm.rank, from, unit);
        for (int i = 0; i < num_rows; ++i) {
            const uint64_t slot = head + static_cast<uint64_t>(i) * ring.row_bytes;
            const int row = *pointer<const volatile int32_t>(slot + args.slot_field[kRow]);
            if (row < 0 || row >= shared.extents.num_rows[comm.rank]) continue;  // as above
            spread_scales(args, slot + args.slot_field[kScales], 1,
                          lane == 0 ? place_of(args, shared, local, kScales, row) : 0);
            if (!args.has_metadata) continue;
            if (lane < args.num_topk) {
                const Chosen chosen =
                    load_chosen(args, slot + args.slot_field[kTopkIdx], slot + args.slot_field[kTopkWeights]);
                store_index(args, place_of(args, shared, local, kTopkIdx, row), chosen.expert);
                if (args.has_weights)
                    pointer<float>(place_of(args, shared, local, kTopkWeights, row))[lane] = chosen.weight;
            }
            if (lane == 0)
                *pointer<int32_t>(place_of(args, shared, local, kSource, row)) =
                    *pointer<const int32_t>(slot + args.slot_field[kSource]);
        }
        note_handed(comm, call, args.nodes, args.handed, ring, kBesideTaken, from, writer, unit);
        return true;
    };
    return for_each_handed(comm, args.nodes, shared.entries, ring, share.first(), share.step(), take);
}

}  // namespace epcomm
