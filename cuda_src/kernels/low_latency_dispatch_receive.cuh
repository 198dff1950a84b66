// low_latency_dispatch_receive.cuh: the receive half. One warp of each block finds where rows begin, from the counts of
// all sources; then a warp takes pieces of messages that have arrived, reads each once and writes it to all its rows.
#pragma once

#include "kernels/low_latency_dispatch.cuh"

namespace epcomm {

// -- where rows begin -------------------------------------------------------------------------------------------------

// One warp: the first message of every source, and its first row at every expert.
__device__ inline bool place_sources(const LowLatencyDispatchArgs& args, const Call& call, uint32_t present,
                                     const Tables& tables, Shared& shared) {
    constexpr int kBatch = 8;  // counts that a lane has on their way before it looks at the first
    const Comm& comm = args.comm;
    const int lane = lane_index(), num_local = args.num_local_experts, num_ranks = comm.num_ranks;
    const uint64_t nothing = tagged(call.sequence, 0);
    if (num_ranks < kWarp) present &= (1u << num_ranks) - 1;
    const int num_cells = num_local * num_ranks;  // those of a source, then those of the next
    uint64_t messages = 0;
#pragma unroll 1
    for (int first = lane; first - lane < num_cells; first += kBatch * kWarp) {
        const uint64_t* from[kBatch];
        uint64_t cells[kBatch];
        uint32_t source_bit[kBatch];  // 0: there is nothing to wait for
        int32_t* to[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int cell = first + i * kWarp, source = args.by_local.divide(cell), expert = cell - source * num_local;
            source_bit[i] = cell < num_cells ? present & 1u << source : 0;
            from[i] = args.counts_of(comm.rank, source) + expert;
            to[i] = &tables.begins[expert * (num_ranks + 1) + source];
            cells[i] = 0;
        }
        auto awaited = [&] {
            messages = present >> lane & 1 ? ptx::ld_relaxed_sys(&args.counts_of(comm.rank, lane)[num_local]) : nothing;
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (source_bit[i] != 0) cells[i] = ptx::ld_relaxed_sys(from[i]);
            uint32_t missing = is_filled(messages, call) ? 0u : 1u << lane;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) missing |= is_filled(cells[i], call) ? 0u : source_bit[i];
            return missing;
        };
        if (!wait_in_lanes(comm, call, kPhaseCounts, awaited)) return false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i * kWarp < num_cells) *to[i] = static_cast<uint32_t>(cells[i]);
    }
    __syncwarp();
#pragma unroll 1
    for (int expert = lane; expert < num_local; expert += kWarp) {
        int32_t* begin = tables.begins + expert * (num_ranks + 1);
        int row = 0;
#pragma unroll 4
        for (int source = 0; source < num_ranks; ++source) {
            const int count = begin[source];
            begin[source] = row;
            row += count;
        }
        begin[num_ranks] = row;
    }
    const int sum = sum_to_lane(static_cast<uint32_t>(messages));
    if (lane == 0) shared.first_message[0] = 0;
    if (lane < num_ranks) shared.first_message[lane + 1] = sum;
    return true;
}

// One warp of one block: what the host, the user and a later combine want to know.
__device__ inline void write_counts(const LowLatencyDispatchArgs& args, uint32_t present, const Tables& tables,
                                    const Shared& shared) {
    const int lane = lane_index(), num_ranks = args.comm.num_ranks;
#pragma unroll 1
    for (int expert = lane; expert < args.num_local_experts; expert += kWarp) {
        const int32_t* begin = tables.begins + expert * (num_ranks + 1);
        int64_t* range = pointer<int64_t>(args.layout_range) + expert * num_ranks;
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source)
            range[source] = static_cast<int64_t>(begin[source]) << 32 | (begin[source + 1] - begin[source]);
        const int count = begin[num_ranks];
        pointer<int32_t>(args.recv_count)[expert] = count;
        if (args.expert_stats != 0) pointer<int32_t>(args.expert_stats)[expert] += count;
    }
    if (lane < num_ranks)
        pointer<int32_t>(args.num_messages)[lane] = shared.first_message[lane + 1] - shared.first_message[lane];
    if (lane == 0) pointer<uint32_t>(args.num_messages)[num_ranks] = present;
}

// All threads of all blocks, where nothing is received: no row of anybody. A rejected call has no arrays.
__device__ __noinline__ void write_nothing(const LowLatencyDispatchArgs& args) {
    if (args.num_messages == 0) return;
    const int num_local = args.num_local_experts, num_ranks = args.comm.num_ranks;
    const int64_t num_rows = static_cast<int64_t>(num_local) * args.max_rows();
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < num_rows; i += gridDim.x * kThreads)
        pointer<int32_t>(args.src_info)[i] = -1;
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; i < num_local * num_ranks; i += kThreads) pointer<int64_t>(args.layout_range)[i] = 0;
    for (int i = threadIdx.x; i < num_local; i += kThreads) pointer<int32_t>(args.recv_count)[i] = 0;
    for (int i = threadIdx.x; i <= num_ranks; i += kThreads) pointer<int32_t>(args.num_messages)[i] = 0;
}

// One warp of each block: find out what this rank gets.
__device__ __noinline__ void serve(const LowLatencyDispatchArgs& args, Call call, const Tables& tables,
                                   Shared& shared) {
    Arrival arrival = {0, 0};
    bool good = await_arrival(args.comm, call, args.slot, shared.opening.masked, args.wait_stats, true, arrival);
    good = good && arrival.present != 0 && !args.slot.is_rejected;
    good = good && place_sources(args, call, arrival.present, tables, shared);
    announce(shared.service, good);
    if (good && blockIdx.x == 0) write_counts(args, arrival.present, tables, shared);
}

// -- rows -------------------------------------------------------------------------------------------------------------

// A piece of a message on its way from the slot, and the header that says where it goes. Plain loads, and no
// `__restrict__`: what peers wrote must not come through the read-only cache.
struct Incoming {
    int source, message;
    uint32_t piece;
    uint32_t scale;        // of lane i: word i of the scales of the piece
    uint64_t first, mine;  // cells of the header: the first one, and that of choice `lane`
    Vector values[kRowVectors];

    // Of the scales of the piece: the first word of them in the row, and their number.
    __device__ uint32_t first_scale(const LowLatencyDispatchArgs& args) const {
        return piece * args.piece_bytes / (args.scales == kExponents ? 4 * kFp8Block : kFp8Block);
    }
    __device__ uint32_t num_scales(const LowLatencyDispatchArgs& args) const {
        const uint32_t num_groups = args.bytes_of(piece) / kFp8Block;
        return args.scales == kExponents ? (num_groups + 3) / 4 : num_groups;
    }
};

// All lanes: ask for a piece.
__device__ inline void ask_for_piece(const LowLatencyDispatchArgs& args, int source, int message, uint32_t piece,
                                     Incoming& in) {
    const Comm& comm = args.comm;
    const uint32_t lane = lane_index(), at = lane * sizeof(Vector), num_bytes = args.bytes_of(piece);
    in.source = source, in.message = message, in.piece = piece;
    const uint64_t row = args.rows_of(comm.rank, source) + message * args.row_stride;
    const Vector* from = pointer<const Vector>(row + piece * args.piece_bytes + at);
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i)
        if (at + i * kColumn < num_bytes) in.values[i] = from[i * kWarp];
    if (kIsFp8 && lane < in.num_scales(args))
        in.scale = pointer<const uint32_t>(row + args.hidden)[in.first_scale(args) + lane];
    const uint64_t* header = args.header_of(comm.rank, source, message);
    in.first = ptx::ld_relaxed_sys(header);
    in.mine = lane < args.num_topk ? ptx::ld_relaxed_sys(&header[1 + lane]) : 0;
}

// All lanes: the scales of a piece, to a row of each of `num_choices` experts, of which lane k has the k-th.
__device__ inline void place_scales(const LowLatencyDispatchArgs& args, const Incoming& in, int num_choices, int expert,
                                    int row) {
    const int num_groups = args.hidden / kFp8Block, at = in.first_scale(args) + lane_index();
    const bool is_packed = args.scales == kExponents, is_there = lane_index() < in.num_scales(args);
    const int width = is_packed ? (num_groups + 3) / 4 : num_groups, num_exponents = num_groups - 4 * at;
    uint32_t scale = in.scale;
    if (is_packed && num_exponents < 4) scale &= (1u << 8 * max(num_exponents, 0)) - 1;
#pragma unroll 1
    for (int k = 0; k < num_choices; ++k) {
        const int64_t column = static_cast<int64_t>(__shfl_sync(~0u, expert, k)) * width + at;
        const int to = __shfl_sync(~0u, row, k);
        if (is_there) pointer<uint32_t>(args.recv_scales)[column * args.max_rows() + to] = scale;
    }
}

// All lanes: a piece that was asked for, to its row at every expert that the token has chosen. False: the call has failed.
__device__ inline bool place_piece(const LowLatencyDispatchArgs& args, const Call& call, const Tables& tables,
                                   Incoming& in) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    const uint64_t* header = args.header_of(comm.rank, in.source, in.message);
    auto awaited = [&] {
        if (!is_filled(in.first, call)) in.first = ptx::ld_relaxed_sys(header);
        const bool is_used = lane < Header(static_cast<uint32_t>(in.first)).num_choices;
        if (is_used && !is_filled(in.mine, call)) in.mine = ptx::ld_relaxed_sys(&header[1 + lane]);
        const bool is_missing = !is_filled(in.first, call) || (is_used && !is_filled(in.mine, call));
        return is_missing ? 1u << in.source : 0u;
    };
    if (!wait_in_lanes(comm, call, kPhaseDone, awaited)) return false;
    const Header head(static_cast<uint32_t>(in.first));
    const Choice choice(static_cast<uint32_t>(in.mine));
    const bool is_used = lane < head.num_choices;
    const int expert = is_used ? choice.expert : 0;
    const int row = is_used ? tables.begins[expert * (comm.num_ranks + 1) + in.source] + choice.row : 0;
    const int64_t flat = static_cast<int64_t>(expert) * args.max_rows() + row;
    const uint64_t place = args.recv_x + flat * args.row_bytes() + in.piece * args.piece_bytes;
    const uint32_t num_bytes = args.bytes_of(in.piece), at = lane * sizeof(Vector);
#pragma unroll 1
    for (int k = 0; k < head.num_choices; ++k) {
        const uint64_t to = __shfl_sync(~0u, place, k) + at;
#pragma unroll
        for (int i = 0; i < kRowVectors; ++i)
            if (at + i * kColumn < num_bytes) pointer<Vector>(to)[i * kWarp] = in.values[i];
    }
    if constexpr (kIsFp8) place_scales(args, in, head.num_choices, expert, row);
    if (in.piece != 0) return true;
    int32_t* kept = pointer<int32_t>(args.messages) +
                    (static_cast<int64_t>(in.source) * args.max_tokens + in.message) * (1 + args.num_topk);
    if (lane == 0) kept[0] = head.value();
    if (is_used) {
        kept[1 + lane] = choice.value();
        pointer<int32_t>(args.src_info)[flat] = head.token;
    }
    return true;
}

// All warps: rows of experts that nobody has sent.
__device__ inline void mark_unused_rows(const LowLatencyDispatchArgs& args, const Tables& tables) {
    const int num_ranks = args.comm.num_ranks, max_rows = args.max_rows();
#pragma unroll 1
    for (int expert = blockIdx.x + warp_index() * gridDim.x; expert < args.num_local_experts;
         expert += gridDim.x * kWarps) {
        int32_t* info = pointer<int32_t>(args.src_info) + static_cast<int64_t>(expert) * max_rows;
#pragma unroll 1
        for (int row = tables.begins[expert * (num_ranks + 1) + num_ranks] + lane_index(); row < max_rows; row += kWarp)
            info[row] = -1;
    }
}

// All warps: pieces as they arrive. A warp takes some at a time, and a lane of it looks after each; one is on its way while
// the one before is placed.
__device__ inline void receive(const LowLatencyDispatchArgs& args, const Call& call, const Tables& tables,
                               const Shared& shared, Units& units) {
    constexpr uint32_t kLarge = 2;  // pieces of a unit, but for the last ones
    const Comm& comm = args.comm;
    const uint32_t num_pieces = shared.first_message[comm.num_ranks] * args.num_pieces;
    const uint32_t num_large = Units::count_large(num_pieces, kLarge, gridDim.x * kWarps);
    int source = 0, message = 0;  // of the piece that a lane looks after
    uint32_t piece = 0, here = 0;
    bool is_pending = false, has_piece = false;
    Incoming in, next;
#pragma unroll 1
    for (;;) {
        if (here == 0 && !__any_sync(~0u, is_pending)) {
            const uint32_t unit = units.take(), lane = lane_index();
            const bool is_large = unit < num_large;
            const uint32_t index = is_large ? unit * kLarge + lane : unit + num_large * (kLarge - 1) + lane;
            const uint32_t number = args.by_pieces.divide(index);
            is_pending = lane < (is_large ? kLarge : 1) && index < num_pieces;
            piece = index - number * args.num_pieces;
            source = 0;
#pragma unroll 1
            for (int r = 1; r < comm.num_ranks; ++r) source += shared.first_message[r] <= number;
            message = number - shared.first_message[source];
        }
        if (here == 0 && __any_sync(~0u, is_pending)) {
            // ACQUIRE the pieces. Pairs with the release of send_units, or of send_far_rows, there.
            auto ready = [&] {
                return is_filled(ptx::ld_acquire_sys(args.arrived_piece(source, message, piece)), call);
            };
            here = wait_for_some(comm, call, kPhaseDone, is_pending ? source : -1, ready);
            if (here == 0) return;
            __syncwarp();  // what a lane has acquired is there for all
            if (here >> lane_index() & 1) is_pending = false;
        }
        const bool has_next = here != 0;
        const int from = __ffs(here) - 1;
        if (has_next)
            ask_for_piece(args, __shfl_sync(~0u, source, from), __shfl_sync(~0u, message, from),
                          __shfl_sync(~0u, piece, from), next);
        if (has_piece && !place_piece(args, call, tables, in)) return;
        if (!has_next) break;
        here &= here - 1;
        in = next;
        has_piece = true;
    }
    mark_unused_rows(args, tables);
}

}  // namespace epcomm
