// combine.cu: bring the rows of a dispatch back to their tokens, and sum them in ascending order of ranks.
//
// Grid: num_sms blocks, all resident. Ranks enter with the offset of their rows; every warp takes pieces of tokens in
// turn, pulls that piece of the token's row from each rank that has one, all under way before the first addition, and
// writes the sum. Nobody leaves before all ranks have read: that protects `x`. A rank whose rows lie outside of the
// arena enters with kThroughWindow: the second half of its warps copies them to its window, in rounds by tokens, for
// all ranks but itself.
//
// Regions: reads blocks and windows of all ranks, writes the own window. Words: combine_entry, window_ready, window_ack,
// combine_done; see common/layout.cuh for writers, sync/ for the pairs of release and acquire.
#include "common/numerics.cuh"
#include "sync/entry.cuh"
#include "sync/pull.cuh"
#include "sync/rows.cuh"
#include "sync/window.cuh"

#ifndef KERNEL_STAGES
#define KERNEL_STAGES 2
#endif
#ifndef KERNEL_ELEMENT
#define KERNEL_ELEMENT __nv_bfloat16
#endif

namespace epcomm {

inline constexpr int kStages = KERNEL_STAGES;
using Sum = VectorSum<KERNEL_ELEMENT>;

struct CombineArgs {
    Comm comm;
    Window window;
    EntryArgs entry;                 // its metadata: the weights
    uint32_t slot_weights;           // offset in a slot of the window; the row comes first
    uint32_t piece_bytes;            // of a row; a stage holds one for each rank
    uint64_t x;                      // this rank's rows, [num_rows, row_bytes]
    uint64_t x_weights;              // float32 [num_rows, num_topk], or 0
    uint64_t src_idx;                // int32 [num_rows], token of each row at its source
    uint64_t send_pos;               // int32 [num_tokens, num_ranks]
    uint64_t rank_prefix;            // int32 [num_ranks, num_ranks]
    uint64_t bias[2];                // [num_tokens, row_bytes], or 0
    uint64_t out;                    // [num_tokens, row_bytes]
    uint64_t out_weights;            // float32 [num_tokens, num_topk]
    Pieces feed;                     // how rows are cut on their way to the window
    uint32_t row_bytes;
    int32_t num_topk, num_worst_tokens;
};
static_assert(sizeof(CombineArgs) == sizeof(Comm) + 24 + 64 + 8 + 9 * 8 + 12 + 3 * 4,
              "CombineArgs differs from epcomm/kernels/combine.py");

// Where the rows of one rank are.
struct Places {
    uint64_t rows, weights;  // addresses of row 0; of slot 0 of the present round, through a window
    int32_t first_row;       // of this rank's rows there
    int32_t num_rows;        // that were delivered there
    bool is_windowed;
};

struct Shared {
    Entry entries[kMaxRanks];
    Places places[kMaxRanks];
    int32_t feed_first[kMaxRanks], feed_end[kMaxRanks];  // this rank's rows of the present round, by source
    uint32_t windowed;
    bool answer[2];
    uint32_t count[2];
};

__device__ inline int num_delivered(const CombineArgs& args, int rank) {
    const int num_ranks = args.comm.num_ranks;
    const int num_sent = pointer<const int32_t>(args.rank_prefix)[(num_ranks - 1) * num_ranks + rank];
    return args.num_worst_tokens > 0 ? min(num_sent, args.num_worst_tokens) : num_sent;
}

// One thread per rank. False: the offsets point out of the region.
__device__ inline bool find_places(const CombineArgs& args, Shared& shared, int r) {
    const Comm& comm = args.comm;
    Places& places = shared.places[r];
    const Entry entry = shared.entries[r];
    const int32_t* prefix = pointer<const int32_t>(args.rank_prefix);
    places.first_row = comm.rank > 0 ? prefix[(comm.rank - 1) * comm.num_ranks + r] : 0;
    places.num_rows = num_delivered(args, r);
    places.is_windowed = entry.rows == kThroughWindow && r != comm.rank;
    if (places.is_windowed) return true;
    if (r == comm.rank) {
        places.rows = args.x;
        places.weights = args.x_weights;
        return true;
    }
    const uint64_t rows = entry.rows * kUnit, weights = entry.metadata * kUnit;
    places.rows = comm.region[r] + rows;
    places.weights = comm.region[r] + weights;
    const uint64_t num_rows = places.num_rows;
    return rows + num_rows * args.row_bytes <= comm.region_bytes &&
           (args.num_topk == 0 || weights + num_rows * args.num_topk * 4 <= comm.region_bytes);
}

// Lane r: where rank r's row of token `token` is and which row that is, or 0 and -1.
struct Origin {
    uint64_t address;
    int index;
};

__device__ inline Origin origin_of(const CombineArgs& args, const Shared& shared, int token, int first_token) {
    const int lane = lane_index(), num_ranks = args.comm.num_ranks;
    if (lane >= num_ranks) return {0, -1};
    const Places& places = shared.places[lane];
    const int pos = pointer<const int32_t>(args.send_pos)[static_cast<int64_t>(token) * num_ranks + lane];
    const int row = places.first_row + pos;
    if (pos < 0 || row >= places.num_rows) return {0, -1};
    if (!places.is_windowed) return {places.rows + static_cast<uint64_t>(row) * args.row_bytes, row};
    const int slot = token - first_token;
    return {places.rows + static_cast<uint64_t>(slot) * args.window.slot_bytes, slot};
}

__device__ inline Sum biases_at(const CombineArgs& args, uint64_t offset) {
    Sum sum;
    for (int i = 0; i < 2; ++i)
        if (args.bias[i] != 0) sum.add(*pointer<const Vector>(args.bias[i] + offset));
    return sum;
}

// All lanes: sum the weights of a token, lane k those of its choice k.
__device__ inline void sum_weights(const CombineArgs& args, const Shared& shared, int token, const Origin& origin) {
    constexpr int kBatch = 8;
    const int lane = lane_index();
    uint64_t weights = 0;
    if (origin.index >= 0) {
        const Places& places = shared.places[lane];
        const uint64_t stride = places.is_windowed ? args.window.slot_bytes : args.num_topk * 4;
        weights = places.weights + static_cast<uint64_t>(origin.index) * stride;
    }
    float sum = 0.0f;
    uint32_t rest = __ballot_sync(~0u, weights != 0);
    while (rest != 0) {
        float values[kBatch];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (rest == 0) continue;
            const uint64_t from = __shfl_sync(~0u, weights, __ffs(rest) - 1);
            rest &= rest - 1;
            count = i + 1;
            values[i] = lane < args.num_topk ? pointer<const volatile float>(from)[lane] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (i < count) sum = accumulate(sum, values[i]);
    }
    const int64_t at = static_cast<int64_t>(token) * args.num_topk + lane;
    if (lane < args.num_topk) pointer<float>(args.out_weights)[at] = sum;
}

#if __CUDA_ARCH__ >= 900

// All lanes: sum the `count` pieces that the pipe has to `out_offset`.
__device__ inline void sum_pieces(const CombineArgs& args, const PullPipe<kStages>& pipe, int count, uint64_t out_offset,
                                  uint32_t num_bytes) {
    for (uint32_t at = lane_index() * sizeof(Vector); at < num_bytes; at += kWarp * sizeof(Vector)) {
        Sum sum = biases_at(args, out_offset + at);
#pragma unroll 4
        for (int i = 0; i < count; ++i) sum.add(pipe.get(i, at));
        *pointer<Vector>(args.out + out_offset + at) = sum.rounded();
    }
}

// The warps of `role` sum the tokens [first, end).
__device__ inline void pull_tokens(const CombineArgs& args, const Shared& shared, PullPipe<kStages>& pipe,
                                   const Role& role, int first, int end) {
    constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;
    const int step = gridDim.x * role.num_warps;
    const uint32_t num_pieces = (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
    auto bytes_of = [&](uint32_t piece) { return min(args.piece_bytes, args.row_bytes - piece * args.piece_bytes); };
    int token = first + blockIdx.x + role.warp() * gridDim.x, load_token = token;
    uint32_t piece = 0, load_piece = 0;
    uint64_t from = 0;
    auto load_next = [&] {
        if (load_token >= end) return;
        if (load_piece == 0) from = origin_of(args, shared, load_token, first).address;
        pipe.load(from != 0 ? from + load_piece * args.piece_bytes : 0, args.piece_bytes, bytes_of(load_piece));
        if (++load_piece == num_pieces) load_piece = 0, load_token += step;
    };
    for (int i = 0; i < kAhead; ++i) load_next();
    while (token < end) {
        if (kStages > 1) load_next();
        const int count = __popc(pipe.wait().lanes);
        const uint64_t offset = static_cast<uint64_t>(token) * args.row_bytes + piece * args.piece_bytes;
        sum_pieces(args, pipe, count, offset, bytes_of(piece));
        pipe.release();
        if (piece == 0 && args.num_topk > 0) sum_weights(args, shared, token, origin_of(args, shared, token, first));
        if (++piece == num_pieces) piece = 0, token += step;
        if (kStages == 1) load_next();
    }
}

#else

__device__ inline void pull_tokens(const CombineArgs& args, const Shared& shared, PullPipe<kStages>&, const Role& role,
                                   int first, int end) {
    constexpr int kUnroll = 4;
    const int step = gridDim.x * role.num_warps;
    const uint32_t num_vectors = args.row_bytes / sizeof(Vector);
    for (int token = first + blockIdx.x + role.warp() * gridDim.x; token < end; token += step) {
        const Origin origin = origin_of(args, shared, token, first);
        const uint64_t offset = static_cast<uint64_t>(token) * args.row_bytes;
        const uint32_t wanted = __ballot_sync(~0u, origin.address != 0);
        for (uint32_t begin = 0; begin < num_vectors; begin += kUnroll * kWarp) {
            Sum sums[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const uint32_t at = begin + i * kWarp + lane_index();
                if (at < num_vectors) sums[i] = biases_at(args, offset + at * sizeof(Vector));
            }
            for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
                // Plain loads, and no `__restrict__`: what peers wrote must not come through the read-only cache.
                const Vector* from = pointer<const Vector>(__shfl_sync(~0u, origin.address, __ffs(rest) - 1));
#pragma unroll
                for (int i = 0; i < kUnroll; ++i) {
                    const uint32_t at = begin + i * kWarp + lane_index();
                    if (at < num_vectors) sums[i].add(from[at]);
                }
            }
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const uint32_t at = begin + i * kWarp + lane_index();
                if (at < num_vectors) pointer<Vector>(args.out + offset)[at] = sums[i].rounded();
            }
        }
        if (args.num_topk > 0) sum_weights(args, shared, token, origin);
    }
}

#endif

// The pulling warps: all tokens, in rounds if a rank has a window.
__device__ inline bool pull_role(const CombineArgs& args, const Call& call, Shared& shared, PullPipe<kStages>& pipe,
                                 const Role& role) {
    const Comm& comm = args.comm;
    if (shared.windowed == 0) {
        pull_tokens(args, shared, pipe, role, 0, args.entry.num_tokens);
        return true;
    }
    const uint32_t num_rounds = args.window.rounds(args.entry.num_tokens);
    for (uint32_t round = 0; round < num_rounds; ++round) {
        if (!await_round(comm, call, role, kPhaseReady, comm.own().window_ready[1], shared.windowed, round + 1,
                         shared.answer[0]))
            return false;
        if (role.leads() && (shared.windowed >> lane_index() & 1)) {
            const uint64_t slots = args.window.slots(comm, lane_index(), comm.rank, round);
            shared.places[lane_index()].rows = slots;
            shared.places[lane_index()].weights = slots + args.slot_weights;
        }
        role.sync();
        const int first = round * args.window.num_slots;
        pull_tokens(args, shared, pipe, role, first, args.window.round_end(round, args.entry.num_tokens));
        finish_round(comm, call, role, comm.state().taken[1], shared.windowed, round, shared.count[0],
                     [&](int r) { return &comm.of(r).window_ack[1][comm.rank]; });
    }
    return true;
}

// The feeding warps of a rank with rows outside of the arena: from its rows to its window, round by round.
template <typename Pipe>
__device__ inline bool feed_role(const CombineArgs& args, const Call& call, Shared& shared, Pipe& pipe,
                                 const Role& role) {
    const Comm& comm = args.comm;
    const int num_ranks = comm.num_ranks, lane = lane_index();
    const int32_t* prefix = pointer<const int32_t>(args.rank_prefix);
    const int32_t* src_idx = pointer<const int32_t>(args.src_idx);
    const int num_own = num_delivered(args, comm.rank);
    const int num_slots = args.window.num_slots;
    auto end_of = [&](int source) { return min(num_own, prefix[source * num_ranks + comm.rank]); };
    uint32_t num_rounds = 0;
    for (int r = 0; r < num_ranks; ++r)
        if (r != comm.rank) num_rounds = max(num_rounds, args.window.rounds(shared.entries[r].num_tokens));
    if (role.leads() && lane < num_ranks) shared.feed_end[lane] = lane > 0 ? end_of(lane - 1) : 0;
    role.sync();
    for (uint32_t round = 0; round < num_rounds; ++round) {
        const bool is_fed = lane < num_ranks && lane != comm.rank &&
                            args.window.rounds(shared.entries[lane].num_tokens) > round;
        const uint32_t fed = __ballot_sync(~0u, is_fed);
        if (round >= kWindowParts && !await_round(comm, call, role, kPhaseAck, comm.own().window_ack[1], fed,
                                                  round - kWindowParts + 1, shared.answer[1]))
            return false;
        for (int source = role.warp(); source < num_ranks; source += role.num_warps) {
            const int first = shared.feed_end[source];
            // The own rows are read where they are.
            const int end = source == comm.rank
                                ? first
                                : lower_bound(src_idx, first, end_of(source), (round + 1) * num_slots);
            __syncwarp();
            if (lane == 0) shared.feed_first[source] = first, shared.feed_end[source] = end;
        }
        role.sync();
        int num_rows = 0;
        for (int r = 0; r < num_ranks; ++r) num_rows += shared.feed_end[r] - shared.feed_first[r];
        // Number i of this round's rows: which row it is, and where it goes.
        auto find = [&](int i, int& row) {
            int source = 0;
            while (i >= shared.feed_end[source] - shared.feed_first[source])
                i -= shared.feed_end[source] - shared.feed_first[source], ++source;
            row = shared.feed_first[source] + i;
            return source;
        };
        auto from = [&](int i) {
            int row;
            find(i, row);
            return pointer<const uint8_t>(args.x) + static_cast<uint64_t>(row) * args.row_bytes;
        };
        auto to = [&](int i) -> uint64_t {
            int row;
            const int source = find(i, row);
            const uint64_t slot = args.window.slots(comm, comm.rank, source, round) +
                                  static_cast<uint64_t>(src_idx[row] - round * num_slots) * args.window.slot_bytes;
            if (lane < args.num_topk)
                pointer<float>(slot + args.slot_weights)[lane] =
                    pointer<const float>(args.x_weights)[static_cast<int64_t>(row) * args.num_topk + lane];
            return lane == 0 ? slot : 0;
        };
        const int warp = blockIdx.x + role.warp() * gridDim.x;
        move_rows(pipe, args.feed, warp, num_rows, gridDim.x * role.num_warps, from, to);
        pipe.finish();
        finish_round(comm, call, role, comm.state().filled[1], fed, round, shared.count[1],
                     [&](int r) { return &comm.of(r).window_ready[1][comm.rank]; });
    }
    return true;
}

// All threads: the whole work between entry and exit. False: the call has failed, or nothing moves.
__device__ inline bool run(const CombineArgs& args, const Call& call, Shared& shared, uint8_t* dynamic) {
    const Comm& comm = args.comm;
    if (!enter(args, call, shared)) return false;
    const bool is_feeding = args.entry.rows == kThroughWindow && comm.num_ranks > 1;
    const int num_pullers = is_feeding ? warps_per_block() / 2 : warps_per_block();
    const Role pullers = {0, num_pullers, 1};
    const Role feeders = {num_pullers, warps_per_block() - num_pullers, 2};
    uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp_index() * 2 * kStages;
    Pulled* pulled = reinterpret_cast<Pulled*>(barriers + kStages);
    const uint32_t stage_bytes = args.piece_bytes * comm.num_ranks;
    uint8_t* stages = dynamic + round_up(warps_per_block() * 2 * kStages * sizeof(uint64_t), kUnit) +
                      static_cast<uint64_t>(warp_index()) * kStages * stage_bytes;
    bool good;
    if (pullers.has_this_warp()) {
        PullPipe<kStages> pipe(stages, barriers, pulled, stage_bytes);
        good = pull_role(args, call, shared, pipe, pullers);
    } else {
        RowPipe<kStages> pipe(stages, barriers, stage_bytes);
        good = feed_role(args, call, shared, pipe, feeders);
    }
    return __syncthreads_and(good);
}

extern "C" __global__ void __launch_bounds__(512, 1) epcomm_combine(const __grid_constant__ CombineArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, kCombine, call)) return;
    const bool good = run(args, call, shared, dynamic);
    if (is_last_block(comm, call)) {
        if (good && warp_index() == 0)
            meet(comm, call, [](Signals& signals) -> uint32_t(&)[kMaxRanks] { return signals.combine_done; });
        if (threadIdx.x == 0) reset_rounds(comm, call);
        end(comm, call);
    }
}

}  // namespace epcomm
