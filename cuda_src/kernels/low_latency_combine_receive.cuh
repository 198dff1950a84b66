// low_latency_combine_receive.cuh: the receive half. A warp takes a piece of a token, waits for the rows of all its
// choices, and adds them.
#pragma once

#include "kernels/low_latency_combine_columns.cuh"

namespace epcomm {

// One warp of each block: find out who has sent.
__device__ inline void serve(const LowLatencyCombineArgs& args, const Call& call, Shared& shared) {
    Arrival arrival = {0, 0};
    // Where the dispatch moved nothing the host hears of that, and not of peers that say the same now.
    const bool reports = shared.dispatched != 0 || args.slot.is_rejected;
    bool good = await_arrival(args.comm, call, args.slot, shared.opening.masked, args.wait_stats, reports, arrival);
    good = good && arrival.present != 0 && shared.dispatched != 0;
    arrival.present &= shared.dispatched;
    if (lane_index() == 0) shared.arrival = arrival;
    announce(shared.service, good);
}

// All threads, while the server waits: where rows begin at the experts of those who have sent and have theirs pulled. False:
// there is nothing to receive, or the call has failed.
__device__ inline bool await_places(const LowLatencyCombineArgs& args, const Call& call, int32_t* begins,
                                    Shared& shared) {
    if constexpr (!kMayPull) return is_served(shared.service);
    const Comm& comm = args.comm;
    // Who has its own rows pulled expects the same of the others, and looks for places before it knows, if they surely come.
    // Otherwise warps go on as they come, unless somebody says so.
    const bool looks_early = args.is_pulled && !args.slot.leaves_late && shared.dispatched != 0;
    bool good = looks_early || is_served(shared.service);
    if (!looks_early && (!good || shared.arrival.pulling == 0)) return good;
#pragma unroll 1
    for (int first = 0; first < args.num_experts(); first += kThreads) {
        const int expert = first + threadIdx.x, owner = args.by_local.divide(expert);
        uint64_t cell = 0;
        auto awaited = [&] {
            if (expert >= args.num_experts() || args.slot.is_far(owner)) return 0u;
            // ACQUIRE the rows at their owner, for all threads: a barrier follows. Pairs with the release of send_places.
            cell = ptx::ld_acquire_sys(&args.begins_at(comm.rank)[expert]);
            if (is_filled(cell, call)) return 0u;
            const uint32_t service = ptx::ld_acquire_block(&shared.service);
            const bool is_sent = service == kUnderWay || (service == kServed && (shared.arrival.present >> owner & 1));
            return is_sent ? 1u << owner : 0u;
        };
        good = good && wait_in_lanes(comm, call, kPhaseDone, awaited);
        if (expert < args.num_experts()) begins[expert] = static_cast<uint32_t>(cell);
    }
    good = is_served(shared.service) && good;
    return __syncthreads_and(good);
}

// Columns of a piece of a token to be summed, and what lane k asks for of choice k.
struct Asked {
    uint32_t token, piece;
    uint32_t begin, end;  // bytes of the row
    int2 sent;
    float weight;
    int64_t expert;
};

inline constexpr uint32_t kSmall = 2 * kColumn;  // bytes of the last units; the others are whole pieces

// All lanes: ask for what the next unit needs, if there is one.
__device__ inline void ask(const LowLatencyCombineArgs& args, uint32_t unit, Asked& asked) {
    const uint32_t num_pieces = args.num_tokens * args.num_pieces;
    const uint32_t num_large = Units::count_large(num_pieces, 1, gridDim.x * kWarps);
    uint32_t part = 0, index = unit, num_bytes = args.piece_bytes;
    if (unit >= num_large) {
        const uint32_t num_parts = (args.piece_bytes + kSmall - 1) / kSmall, small = (unit - num_large) / num_parts;
        index = num_large + small;
        part = unit - num_large - small * num_parts;
        num_bytes = kSmall;
    }
    asked.token = args.by_pieces.divide(index);
    asked.piece = index - asked.token * args.num_pieces;
    const uint32_t piece_end = min((asked.piece + 1) * args.piece_bytes, args.row_bytes);
    asked.begin = min(asked.piece * args.piece_bytes + part * kSmall, piece_end);
    asked.end = min(asked.begin + num_bytes, piece_end);
    asked.sent = {-1, -1};
    asked.expert = -1;
    if (asked.token >= args.num_tokens || lane_index() >= args.num_topk) return;
    const int64_t at = static_cast<int64_t>(asked.token) * args.num_topk + lane_index();
    asked.sent = pointer<const int2>(args.send_info)[at];
    asked.weight = pointer<const float>(args.topk_weights)[at];
    asked.expert = args.index_bytes == 8 ? pointer<const int64_t>(args.topk_idx)[at]
                                         : pointer<const int32_t>(args.topk_idx)[at];
}

// All lanes: where the rows of a token are, to shared memory; lane k looks after choice k. Their number, or -1 if the
// call has failed.
__device__ inline int find_rows(const LowLatencyCombineArgs& args, const Call& call, const int32_t* begins,
                                const Asked& asked, int side, Shared& shared) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    const int64_t at = static_cast<int64_t>(asked.token) * args.num_topk + lane;
    const Arrival arrival = shared.arrival;
    const int2 sent = asked.sent;
    // Choices that are not those of the dispatch have no row, though their owner may have added it; the host hears of it.
    bool is_other = sent.x >= 0 && asked.expert != sent.x;
    if (sent.x < 0 && asked.expert >= 0 && asked.expert < args.num_experts())  // nothing to somebody who was there
        is_other = shared.dispatched >> args.by_local.divide(static_cast<uint32_t>(asked.expert)) & 1;
    if (__any_sync(~0u, is_other) && lane == 0)
        ptx::st_relaxed_sys(&comm.page()->other_choices, call.sequence << 1 | (args.slot.index() & 1));
    const int owner = args.by_local.divide(max(sent.x, 0));
    bool is_there = sent.x >= 0 && (arrival.present >> owner & 1);
    const bool is_coming = is_there;  // also for a choice that has no row here
    uint32_t owners = 0;
    if constexpr (kPayload != kPartialSums) {
        is_there = is_there && !is_other;
    } else {  // what an owner sends lies at the first of its choices
        owners = __reduce_or_sync(~0u, is_there ? 1u << owner : 0u);
        const uint32_t same = __match_any_sync(~0u, is_there ? owner : -1);
        is_there = is_there && lane == __ffs(same) - 1;
    }
    const bool is_pulled = kMayPull && is_there && (arrival.pulling >> owner & 1);
    uint64_t row = 0;
    if (is_pulled) {
        const int number = min(begins[sent.x] + sent.y, args.max_rows() - 1);  // inside, whatever the owner says
        const int64_t flat = static_cast<int64_t>(sent.x - owner * args.num_local_experts) * args.max_rows() + number;
        row = args.buffer[owner] + flat * args.row_bytes;
    } else if (is_there) {
        row = args.place_of(comm.rank, at);
    }
    // ACQUIRE pushed pieces. Pairs with the release of Written, or of push_far_message, there.
    const uint64_t* cell = args.piece_at(comm.rank, at, args.slot.is_far(owner) ? 0 : asked.piece);
    auto awaited = [&] {
        // Through a network what nobody reads must have arrived, too, before its sender may use the memory again.
        const bool is_awaited = kHasNetwork && kPayload != kPartialSums ? is_coming && !(arrival.pulling >> owner & 1)
                                                                        : is_there && !is_pulled;
        return is_awaited && !is_filled(ptx::ld_acquire_sys(cell), call) ? 1u << owner : 0u;
    };
    if (!wait_in_lanes(comm, call, kPhaseDone, awaited)) return -1;
    const uint32_t wanted = __ballot_sync(~0u, is_there);
    // In the order of the choices, or of the owners.
    const int place = kPayload == kPartialSums ? __popc(owners & ((1u << owner) - 1)) : __popc(wanted & ((1u << lane) - 1));
    if (is_there) {
        shared.address[warp_index()][side][place] = kPayload == kEncodedRows ? row : row + asked.begin;
        shared.weight[warp_index()][side][place] = kPayload == kPartialSums ? 1.0f : asked.weight;
    }
    __syncwarp();
    return __popc(wanted);
}

// All warps: tokens in pieces, of which the first is asked for. While a warp adds the rows of one, it looks for those of
// the next, and asks for the one behind.
__device__ inline void sum_tokens(const LowLatencyCombineArgs& args, const Call& call, const int32_t* begins,
                                  uint32_t ring, Shared& shared, Units& units, Asked& asked) {
    auto find_next = [&](int side) {
        Work work = {-1, 0, 0, 0};
        if (asked.token >= args.num_tokens) return work;
        work.num_rows = find_rows(args, call, begins, asked, side, shared);
        work.begin = asked.begin;
        work.num_bytes = asked.end - asked.begin;
        work.out = args.out + static_cast<uint64_t>(asked.token) * args.row_bytes + asked.begin;
        return work;
    };
    Columns columns(args, ring, shared.address[warp_index()]);
    Work work = {-1, 0, 0, 0};
#pragma unroll 1
    for (int side = 0;; side = 1 - side) {
        const Work next = find_next(side);
        columns.append(next, side);
        if (next.num_rows >= 0) ask(args, units.take(), asked);
        const float* weight = shared.weight[warp_index()][1 - side];
#pragma unroll 1
        for (uint32_t at = lane_index() * sizeof(Vector); work.num_rows >= 0 && at / kColumn < work.num_columns();
             at += kColumn) {
            const Sum sum = columns.sum_next(work, 1 - side, at, weight);
            if (at < work.num_bytes) *pointer<Vector>(work.out + at) = sum.rounded();
        }
        if (next.num_rows < 0) break;
        work = next;
        __syncwarp();
    }
    ptx::async_wait<0>();
}

}  // namespace epcomm
