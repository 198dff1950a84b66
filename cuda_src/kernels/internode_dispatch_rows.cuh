// internode_dispatch_rows.cuh: the rows of an internode dispatch. Senders read each row once and write it to its final
// place at the ranks of the own node, and to the ring of one rank of each other node that wants it; forwarders there write
// it to its final places. The head of a message has, for each of its rows, the index within (source, local rank) at every
// local rank, or -1: int32 [unit_tokens, ranks_per_node].
#pragma once

#include "kernels/internode_dispatch.cuh"

namespace epcomm {

// One warp: the tokens [first, end) of a unit, whose groups are free. Of a lane that stands for a node: its number of rows.
template <typename Pipe>
__device__ inline int send_unit(const InternodeDispatchArgs& args, const Shared& shared, Pipe& pipe,
                                const Destination& to, uint32_t unit, int first, int end) {
    const Comm& comm = args.comm;
    const Nodes& nodes = args.nodes;
    const int lane = lane_index(), node = args.nodes.own, rank_node = nodes.node_of(min(lane, comm.num_ranks - 1));
    auto head_at = [&](int receiver) { return args.rows.outgoing(comm, nodes, receiver, unit); };
    const uint64_t group = to.node >= 0 ? head_at(to.node) + args.rows.head_bytes : 0;
    // Of a lane below the number of ranks: where the rows of that rank's node are told.
    const bool is_far = lane < comm.num_ranks && rank_node != node;
    const uint64_t head = is_far ? head_at(rank_node) : 0;
    const uint64_t rows = to.local >= 0 ? shared.places[args.nodes.first_local() + to.local].field[kRow] : 0;
    int num_sent = 0, num_own = 0;
    auto source = [&](int token) {
        return pointer<const uint8_t>(args.x) + static_cast<uint64_t>(token) * args.pieces.row_bytes;
    };
    auto destination = [&](int token) -> uint64_t {
        const Wanted wanted(args, shared.extents, token);
        const int row = wanted.local_row(args, to);
        const int slot = __shfl_sync(~0u, num_sent, is_far ? Destination::lane_of(args, rank_node) : 0);
        if (is_far && wanted.has_node(args, rank_node))
            pointer<int32_t>(head)[slot * nodes.ranks_per_node + lane - nodes.first_of(rank_node)] = wanted.row;
        num_own += wanted.has_node(args, node);
        if (to.local >= 0) return row < 0 ? 0 : rows + static_cast<uint64_t>(row) * args.pieces.row_bytes;
        if (!wanted.has_node(args, to.node)) return 0;
        return group + static_cast<uint64_t>(num_sent++) * args.rows.row_bytes;
    };
    move_rows(pipe, args.pieces, first, end, 1, source, destination);
    pipe.finish();
    if (lane == 0 && args.node_counts != 0 && num_own > 0)
        ptx::atom_add_relaxed_gpu(&pointer<uint32_t>(args.node_counts)[node], static_cast<uint32_t>(num_own));
    return num_sent;
}

template <typename Pipe>
__device__ inline bool send_rows(const InternodeDispatchArgs& args, const Call& call, const Shared& shared, Pipe& pipe,
                                 const Share& share) {
    const Comm& comm = args.comm;
    const Ring& ring = args.rows;
    const Destination to(args);
    const uint32_t num_units = ring.num_units(args.entry.num_tokens);
    for (uint32_t unit = share.first(); unit < num_units; unit += share.step()) {
        if (!await_group(comm, call, args.nodes, ring, kRowsTaken, to.node, unit)) return false;
        const int first = unit * ring.unit_tokens, end = min(first + static_cast<int>(ring.unit_tokens), args.entry.num_tokens);
        const int num_rows = send_unit(args, shared, pipe, to, unit, first, end);
        send(comm, call, args.nodes, ring, kRowsSent, to.node, unit, num_rows);
        if (to.node >= 0 && num_rows > 0) ptx::red_add_relaxed_gpu(&comm.state().rows_to_nodes[0], num_rows);
    }
    return await_taken(comm, call, args.nodes, ring, kRowsTaken, to.node, num_units, share);
}

template <typename Pipe>
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
        const uint64_t head = ring.head(comm, nodes, comm.rank, node, unit);
        auto source = [&](int i) {
            return pointer<const uint8_t>(head + ring.head_bytes + static_cast<uint64_t>(i) * ring.row_bytes);
        };
        auto destination = [&](int i) -> uint64_t {
            if (!is_local) return 0;
            // A peer's memory may hold anything; this rank does not write outside of the outputs.
            const int row = pointer<const volatile int32_t>(head)[i * num_local + lane];
            const bool is_there = row >= 0 && row < shared.extents.num_rows[rank];
            return is_there ? rows + static_cast<uint64_t>(row) * args.pieces.row_bytes : 0;
        };
        move_rows(pipe, args.pieces, 0, num_rows, 1, source, destination);
        pipe.finish();
        note_taken(comm, call, nodes, ring, kRowsTaken, node, unit);
        if (lane == 0 && args.node_counts != 0 && num_rows > 0)
            ptx::atom_add_relaxed_gpu(&pointer<uint32_t>(args.node_counts)[node], static_cast<uint32_t>(num_rows));
        return true;
    });
}

}  // namespace epcomm
