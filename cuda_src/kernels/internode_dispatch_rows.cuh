// internode_dispatch_rows.cuh: the rows of an internode dispatch. Senders read each row once and write it to its final
// place at the ranks of the own node, and to the ring of one rank of each other node that wants it; forwarders there write
// it to its final places. A row of a message:
//
//     [ int32 row at each local rank of the receiver, or -1 | the row itself, kPlacesBytes behind ]
//
// In front of the network a row is written once for all nodes, with the rows at all ranks ahead of it, and a message is a part
// of the unit: a unit there has two tokens at most, since of three a node may want the first and the last one.
#pragma once

#include "kernels/internode_dispatch.cuh"

namespace epcomm {

// What a node gets of a unit, or a local rank whose rows are handed over; of a lane that stands for one.
struct Sent {
    int num_rows = 0;
    uint64_t from = 0;  // in front of the network
};

// A lane that hands over: where its next row goes in the group at `handed`, if there is one.
__device__ inline uint64_t hand_row(const InternodeDispatchArgs& args, uint64_t handed, int row, int& num_rows) {
    if (row < 0) return 0;
    const uint64_t slot = handed + static_cast<uint64_t>(num_rows++) * args.handed_rows.row_bytes;
    *pointer<int32_t>(slot) = row;
    return slot + kPlacesBytes;
}

// One warp: the tokens [first, end) of a unit, whose groups are free.
template <typename Pipe>
__device__ inline Sent send_unit(const InternodeDispatchArgs& args, const Shared& shared, Pipe& pipe,
                                 const Destination& to, const Handing& handing, uint32_t unit, int first, int end) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const Ring& ring = args.rows;
    const int lane = lane_index(), node = args.nodes.own, rank_node = nodes.node_of(min(lane, comm.num_ranks - 1));
    const uint64_t staged = kHasNetwork ? ring.staged(comm, nodes, unit) : 0;
    const uint64_t group = !kHasNetwork && to.node >= 0 ? ring.outgoing(comm, nodes, to.node, unit) : 0;
    // Of a lane below the number of ranks: where the rows of that rank's node are told.
    const bool is_far = lane < comm.num_ranks && rank_node != node;
    const uint64_t told = !kHasNetwork && is_far ? ring.outgoing(comm, nodes, rank_node, unit) : 0;
    const uint64_t rows = to.local >= 0 ? shared.places[args.nodes.first_local() + to.local].field[kRow] : 0;
    const uint64_t handed = handing.group(comm, args.handed, args.handed_rows, comm.rank, unit);
    int num_staged = 0, num_own = 0;
    Sent sent;
    auto source = [&](int token) {
        return pointer<const uint8_t>(args.x) + static_cast<uint64_t>(token) * args.pieces.row_bytes;
    };
    auto destination = [&](int token) -> uint64_t {
        const Wanted wanted(args, shared.extents, token);
        const int row = wanted.local_row(args, to);
        num_own += wanted.has_node(args, node);
        uint64_t far = 0;
        if constexpr (kHasNetwork) {
            const uint64_t slot = staged + static_cast<uint64_t>(num_staged) * ring.row_bytes;
            const bool is_staged = (wanted.ranks & ~nodes.ranks_of(node)) != 0;
            if (is_staged && lane < comm.num_ranks) pointer<int32_t>(slot)[lane] = wanted.row;
            if (wanted.has_node(args, to.node) && sent.num_rows++ == 0) sent.from = slot;
            num_staged += is_staged;
            if (is_staged && lane == nodes.ranks_per_node) far = slot + kPlacesBytes;  // a lane that stands for a node
        } else {
            const int slot = __shfl_sync(~0u, sent.num_rows, is_far ? Destination::lane_of(args, rank_node) : 0);
            if (is_far && wanted.has_node(args, rank_node))
                pointer<int32_t>(told + static_cast<uint64_t>(slot) * ring.row_bytes)[lane - nodes.first_of(rank_node)] =
                    wanted.row;
            if (wanted.has_node(args, to.node))
                far = group + static_cast<uint64_t>(sent.num_rows++) * ring.row_bytes + kPlacesBytes;
        }
        if (to.local < 0) return far;
        if (handing.is_used) return hand_row(args, handed, row, sent.num_rows);
        return row < 0 ? 0 : rows + static_cast<uint64_t>(row) * args.pieces.row_bytes;
    };
    move_rows(pipe, args.pieces, first, end, 1, source, destination);
    pipe.finish();
    if (lane == 0 && args.node_counts != 0 && num_own > 0)
        ptx::atom_add_relaxed_gpu(&pointer<uint32_t>(args.node_counts)[node], static_cast<uint32_t>(num_own));
    return sent;
}

template <bool kHandsOver, typename Pipe>
__device__ inline bool send_rows(const InternodeDispatchArgs& args, const Call& call, const Shared& shared, Pipe& pipe,
                                 const Share& share) {
    const Comm& comm = args.comm;
    const Ring& ring = args.rows;
    const Destination to(args);
    const Handing handing(comm, args.nodes, args.handed, kHandsOver ? shared.windowed : 0, to.local, comm.rank, kRowsSent,
                          kRowsTaken);
    const uint32_t num_units = ring.num_units(args.entry.num_tokens);
    for (uint32_t unit = share.first(); unit < num_units; unit += share.step()) {
        if (!await_group(comm, call, args.nodes, ring, kRowsTaken, to.node, unit)) return false;
        if (kHandsOver && !handing.await(comm, call, args.handed_rows, unit)) return false;
        const int first = unit * ring.unit_tokens, end = min(first + static_cast<int>(ring.unit_tokens), args.entry.num_tokens);
        const Sent sent = send_unit(args, shared, pipe, to, handing, unit, first, end);
        if (kHandsOver) handing.send(call, args.handed_rows, unit, sent.num_rows);
        send(comm, call, args.nodes, ring, kRowsSent, to.node, unit, sent.num_rows, sent.from);
        if (to.node >= 0 && sent.num_rows > 0)
            ptx::red_add_relaxed_gpu(&comm.state().rows_to_nodes[0], sent.num_rows);
    }
    return await_taken(comm, call, args.nodes, ring, kRowsTaken, to.node, num_units, share);
}

template <bool kHandsOver, typename Pipe>
__device__ inline bool forward_rows(const InternodeDispatchArgs& args, const Call& call, const Shared& shared,
                                    Pipe& pipe, const Share& share) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const Ring& ring = args.rows;
    const int lane = lane_index(), num_local = nodes.ranks_per_node;
    const bool is_local = lane < num_local;
    const int rank = args.nodes.first_local() + (is_local ? lane : 0);
    const uint64_t rows = shared.places[rank].field[kRow];
    return for_each_message(args, shared.entries, ring, share, [&](int node, uint32_t unit) {
        const int num_rows = await_message(comm, call, nodes, ring, kRowsSent, node, unit);
        if (num_rows < 0) return false;
        const int from = nodes.on_rail(node);
        const Handing handing(comm, nodes, args.handed, kHandsOver ? shared.windowed : 0, is_local ? lane : -1, from,
                              kRowsSent, kRowsTaken);
        if (kHandsOver && !handing.await(comm, call, args.handed_rows, unit)) return false;
        const uint64_t handed = handing.group(comm, args.handed, args.handed_rows, from, unit);
        int num_handed = 0;
        const uint64_t head = ring.head(comm, nodes, comm.rank, node, unit);
        auto source = [&](int i) {
            return pointer<const uint8_t>(head + static_cast<uint64_t>(i) * ring.row_bytes + kPlacesBytes);
        };
        auto destination = [&](int i) -> uint64_t {
            if (!is_local) return 0;
            // A peer's memory may hold anything; this rank does not write outside of the outputs.
            const uint64_t told = head + static_cast<uint64_t>(i) * ring.row_bytes;
            const int row = pointer<const volatile int32_t>(told)[(kHasNetwork ? nodes.first_local() : 0) + lane];
            const bool is_there = row >= 0 && row < shared.extents.num_rows[rank];
            if (handing.is_used) return hand_row(args, handed, is_there ? row : -1, num_handed);
            return is_there ? rows + static_cast<uint64_t>(row) * args.pieces.row_bytes : 0;
        };
        move_rows(pipe, args.pieces, 0, num_rows, 1, source, destination);
        pipe.finish();
        if (kHandsOver) handing.send(call, args.handed_rows, unit, num_handed);
        note_taken(comm, call, nodes, ring, kRowsTaken, node, unit);
        if (lane == 0 && args.node_counts != 0 && num_rows > 0)
            ptx::atom_add_relaxed_gpu(&pointer<uint32_t>(args.node_counts)[node], static_cast<uint32_t>(num_rows));
        return true;
    });
}

// Rows that are handed over to this rank, whose outputs are outside of its arena.
template <typename Pipe>
__device__ inline bool take_rows(const InternodeDispatchArgs& args, const Call& call, const Shared& shared, Pipe& pipe,
                                 const Share& share) {
    const Comm& comm = args.comm;
    const Ring& ring = args.handed_rows;
    auto take = [&](int from, int writer, uint32_t unit) {
        const uint64_t* word = args.handed.word(comm, comm.rank, kRowsSent, from, unit % ring.num_groups);
        const int num_rows = await_message_at(comm, call, ring, word, writer, unit);
        if (num_rows < 0) return false;
        const uint64_t head = ring.head(comm, args.handed, comm.rank, from, unit);
        auto source = [&](int i) {
            return pointer<const uint8_t>(head + static_cast<uint64_t>(i) * ring.row_bytes + kPlacesBytes);
        };
        auto destination = [&](int i) -> uint64_t {
            const int row = *pointer<const volatile int32_t>(head + static_cast<uint64_t>(i) * ring.row_bytes);
            const bool is_there = lane_index() == 0 && row >= 0 && row < shared.extents.num_rows[comm.rank];
            return is_there ? args.out[kRow] + static_cast<uint64_t>(row) * args.pieces.row_bytes : 0;
        };
        move_rows(pipe, args.pieces, 0, num_rows, 1, source, destination);
        pipe.finish();
        note_handed(comm, call, args.nodes, args.handed, ring, kRowsTaken, from, writer, unit);
        return true;
    };
    return for_each_handed(comm, args.nodes, shared.entries, ring, share.first(), share.step(), take);
}

}  // namespace epcomm
