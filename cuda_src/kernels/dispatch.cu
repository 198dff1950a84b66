// dispatch.cu: send each token once to every rank that owns one of its experts, to the row where it stays.
//
// Grid: num_sms blocks, all resident. Ranks enter with the offsets of their output blocks; then every warp takes tokens
// in turn, reads the row once and writes it to the final row at each destination, with what travels beside it. A rank
// whose outputs lie outside of the arena enters with kThroughWindow: rows of others for it go through its window in
// rounds, and the second half of its own warps copies them out. The index of a round says which slots are in use.
//
// Regions: writes blocks and windows of all ranks, reads the own window. Words: dispatch_entry, window_ready,
// window_ack, dispatch_done; see common/layout.cuh for writers, sync/ for the pairs of release and acquire.
#include "sync/entry.cuh"
#include "sync/rows.cuh"
#include "sync/window.cuh"

#ifndef KERNEL_STAGES
#define KERNEL_STAGES 2
#endif

namespace epcomm {

inline constexpr int kStages = KERNEL_STAGES;

// What travels with a token. The numbers are indices of Places.field.
enum Field : int { kRow = 0, kScales = 1, kTopkIdx = 2, kTopkWeights = 3, kSource = 4, kNumFields = 5 };

struct DispatchArgs {
    Comm comm;
    Window window;
    EntryArgs entry;
    uint32_t slot_field[kNumFields];  // offsets in a slot of the window
    uint32_t unused;
    uint64_t x;                       // [num_tokens, row_bytes]
    uint64_t scales;                  // [num_tokens, num_scales] of scale_bytes each, any strides; or 0
    int64_t scale_stride_token, scale_stride_scale;  // in elements
    uint64_t topk_idx;                // [num_tokens, num_topk] of index_bytes each, or 0
    uint64_t topk_weights;            // float32 [num_tokens, num_topk], or 0
    uint64_t send_pos;                // int32 [num_tokens, num_ranks]
    uint64_t rank_prefix;             // int32 [num_ranks, num_ranks]
    uint64_t out[kNumFields];         // this rank's outputs; if they are in the arena, only topk_idx is looked at
    Pieces pieces;
    uint32_t stage_bytes;
    int32_t num_scales, scale_bytes, num_topk, index_bytes, num_local_experts;
    int32_t num_worst_tokens;  // 0: as many rows as there are
    int32_t is_forced;         // whatever the last exchange said
    int32_t has_weights;       // an empty array has no address
};
static_assert(sizeof(DispatchArgs) == 288 + 24 + 64 + 24 + 8 * 8 + 40 + 12 + 4 + 8 * 4,
              "DispatchArgs differs from epcomm/kernels/dispatch.py");

// Where the fields of rows go at one destination: field f of row (or slot) i is at field[f] + i * stride[f].
struct Places {
    uint64_t field[kNumFields];
    int32_t first_row;  // of this rank's rows there
    int32_t num_rows;   // of that rank's output
    bool is_windowed;
};

struct Shared {
    Entry entries[kMaxRanks];
    Places places[kMaxRanks];
    uint32_t windowed;  // bit r: rank r takes its rows through its window
    bool answer[2];
    uint32_t count[2];
};

__device__ inline uint32_t field_bytes(const DispatchArgs& args, int field) {
    switch (field) {
        case kRow: return args.pieces.row_bytes;
        case kScales: return args.num_scales * args.scale_bytes;
        case kTopkIdx: return args.num_topk * args.index_bytes;
        case kTopkWeights: return args.has_weights ? args.num_topk * 4 : 0;
        default: return 4;
    }
}

// One thread per rank: where this rank's rows go. False: the offsets point out of the region.
__device__ inline bool find_places(const DispatchArgs& args, Shared& shared, int r) {
    const Comm& comm = args.comm;
    const int32_t* prefix = pointer<const int32_t>(args.rank_prefix);
    const int num_ranks = comm.num_ranks;
    Places& places = shared.places[r];
    places.first_row = comm.rank > 0 ? prefix[(comm.rank - 1) * num_ranks + r] : 0;
    places.num_rows = args.num_worst_tokens > 0 ? args.num_worst_tokens : prefix[(num_ranks - 1) * num_ranks + r];
    const Entry entry = shared.entries[r];
    places.is_windowed = entry.rows == kThroughWindow && r != comm.rank;
    if (places.is_windowed) return true;
    if (entry.rows == kThroughWindow) {  // this rank itself
        for (int f = 0; f < kNumFields; ++f) places.field[f] = args.out[f];
        return true;
    }
    const uint64_t rows = entry.rows * kUnit, metadata = entry.metadata * kUnit;
    const MetadataLayout beside(places.num_rows, args.num_topk, args.index_bytes, args.has_weights);
    const uint64_t scales = scales_offset(places.num_rows, args.pieces.row_bytes);
    places.field[kRow] = comm.region[r] + rows;
    places.field[kScales] = comm.region[r] + rows + scales;
    places.field[kSource] = comm.region[r] + metadata;
    places.field[kTopkIdx] = comm.region[r] + metadata + beside.topk_idx;
    places.field[kTopkWeights] = comm.region[r] + metadata + beside.topk_weights;
    const bool has_metadata = entry.metadata != kNoBlock;
    if (!has_metadata) places.field[kSource] = 0;
    // A peer's memory may hold anything; this rank does not write outside of the regions.
    const uint64_t rows_end = rows + scales + static_cast<uint64_t>(places.num_rows) * field_bytes(args, kScales);
    return rows_end <= comm.region_bytes && (!has_metadata || metadata + beside.num_bytes <= comm.region_bytes);
}

// All lanes of a warp: copy `num_bytes`, a multiple of `unit` = 1, 2 or 4, between places of that alignment.
template <typename T>
__device__ inline void copy_elements(const T* from, int64_t stride, T* to, int count) {
    for (int i = lane_index(); i < count; i += kWarp) to[i] = from[i * stride];
}

__device__ inline void copy_scales(const DispatchArgs& args, uint64_t from, int64_t stride, uint64_t to) {
    if (args.scale_bytes == 4) {
        copy_elements(pointer<const uint32_t>(from), stride, pointer<uint32_t>(to), args.num_scales);
    } else if (args.scale_bytes == 2) {
        copy_elements(pointer<const uint16_t>(from), stride, pointer<uint16_t>(to), args.num_scales);
    } else {
        copy_elements(pointer<const uint8_t>(from), stride, pointer<uint8_t>(to), args.num_scales);
    }
}

// All lanes: write what travels beside token `token`; lane r knows its row (or slot) at destination r, or -1.
__device__ inline void send_metadata(const DispatchArgs& args, const Shared& shared, int token, int index) {
    const int lane = lane_index();
    int64_t expert = -1;
    float weight = 0.0f;
    if (lane < args.num_topk) {
        const int64_t at = static_cast<int64_t>(token) * args.num_topk + lane;
        expert = args.index_bytes == 8 ? pointer<const int64_t>(args.topk_idx)[at]
                                       : pointer<const int32_t>(args.topk_idx)[at];
        if (args.has_weights) weight = pointer<const float>(args.topk_weights)[at];
    }
    for (uint32_t rest = __ballot_sync(~0u, index >= 0); rest != 0; rest &= rest - 1) {
        const int r = __ffs(rest) - 1;
        const Places& places = shared.places[r];
        const int64_t i = __shfl_sync(~0u, index, r);
        auto place = [&](int field) {
            return places.field[field] + i * (places.is_windowed ? args.window.slot_bytes : field_bytes(args, field));
        };
        if (args.num_scales > 0) {
            const uint64_t from =
                args.scales + static_cast<int64_t>(token) * args.scale_stride_token * args.scale_bytes;
            copy_scales(args, from, args.scale_stride_scale, place(kScales));
        }
        if (lane < args.num_topk) {
            const int64_t local = expert - static_cast<int64_t>(r) * args.num_local_experts;
            const bool is_here = static_cast<uint64_t>(local) < static_cast<uint64_t>(args.num_local_experts);
            if (args.index_bytes == 8) {
                pointer<int64_t>(place(kTopkIdx))[lane] = is_here ? local : -1;
            } else {
                pointer<int32_t>(place(kTopkIdx))[lane] = is_here ? static_cast<int32_t>(local) : -1;
            }
            if (args.has_weights) pointer<float>(place(kTopkWeights))[lane] = is_here ? weight : 0.0f;
        }
        if (lane == 0 && places.field[kSource] != 0) *pointer<int32_t>(place(kSource)) = token;
    }
}

// The warps of `role` send the tokens [first, end) of round `round`.
template <typename Pipe>
__device__ inline void send_tokens(const DispatchArgs& args, Shared& shared, Pipe& pipe, const Role& role, int first,
                                   int end, uint32_t round) {
    const int lane = lane_index(), num_ranks = args.comm.num_ranks;
    const int32_t* send_pos = pointer<const int32_t>(args.send_pos);
    const bool is_mine = lane < num_ranks;
    const bool is_windowed = is_mine && shared.places[lane].is_windowed;
    int32_t* slot_index =
        is_windowed ? pointer<int32_t>(args.window.index(args.comm, lane, args.comm.rank, round)) : nullptr;
    auto source = [&](int token) {
        return pointer<const uint8_t>(args.x) + static_cast<uint64_t>(token) * args.pieces.row_bytes;
    };
    auto destination = [&](int token) -> uint64_t {
        int index = -1, row = -1;
        uint64_t to = 0;
        if (is_mine) {
            const Places& places = shared.places[lane];
            const int pos = send_pos[static_cast<int64_t>(token) * num_ranks + lane];
            row = pos < 0 ? -1 : places.first_row + pos;
            if (row >= places.num_rows) row = -1;  // does not fit into num_worst_tokens
            index = row;
            if (is_windowed) {
                const int slot = token - first;
                slot_index[slot] = row;
                if (row >= 0) index = slot;
            }
            if (row >= 0)
                to = places.field[kRow] +
                     static_cast<uint64_t>(index) * (is_windowed ? args.window.slot_bytes : args.pieces.row_bytes);
        }
        send_metadata(args, shared, token, index);
        return to;
    };
    const int warp = blockIdx.x + role.warp() * gridDim.x;
    move_rows(pipe, args.pieces, first + warp, end, gridDim.x * role.num_warps, source, destination);
}

// The sending warps: all tokens, in rounds if a destination has a window.
template <typename Pipe>
__device__ inline bool send_role(const DispatchArgs& args, const Call& call, Shared& shared, Pipe& pipe,
                                 const Role& role) {
    const Comm& comm = args.comm;
    if (shared.windowed == 0) {
        send_tokens(args, shared, pipe, role, 0, args.entry.num_tokens, 0);
        pipe.finish();
        return true;
    }
    const uint32_t num_rounds = args.window.rounds(args.entry.num_tokens);
    for (uint32_t round = 0; round < num_rounds; ++round) {
        if (round >= 2 && !await_round(comm, call, role, kPhaseAck, comm.own().window_ack[0], shared.windowed,
                                       round - 1, shared.answer[0]))
            return false;
        // The slots' fields at a windowed destination are in another half in each round.
        if (role.leads() && (shared.windowed >> lane_index() & 1))
            for (int f = 0; f < kNumFields; ++f)
                shared.places[lane_index()].field[f] =
                    args.window.slots(comm, lane_index(), comm.rank, round) + args.slot_field[f];
        role.sync();
        const int first = round * args.window.num_slots;
        send_tokens(args, shared, pipe, role, first, args.window.round_end(round, args.entry.num_tokens), round);
        pipe.finish();
        finish_round(comm, call, role, comm.state().filled[0], shared.windowed, round, shared.count[0],
                     [&](int r) { return &comm.of(r).window_ready[0][comm.rank]; });
    }
    return true;
}

// One warp copies the fields of a slot to this rank's outputs, the row left out.
__device__ inline void take_metadata(const DispatchArgs& args, uint64_t slot, int64_t row) {
    const int lane = lane_index();
    if (args.num_scales > 0)
        copy_scales(args, slot + args.slot_field[kScales], 1, args.out[kScales] + row * field_bytes(args, kScales));
    for (int f = kTopkIdx; f <= kSource; ++f) {
        const int num_words = field_bytes(args, f) / 4;
        if (args.out[f] != 0 && lane < num_words) {
            for (int i = lane; i < num_words; i += kWarp)
                pointer<uint32_t>(args.out[f] + row * field_bytes(args, f))[i] =
                    pointer<const uint32_t>(slot + args.slot_field[f])[i];
        }
    }
}

// One warp copies the slots that it is in charge of: numbers warp, warp + num_warps, … of all slots of a round, of which
// slot i of source s is number s * num_slots + i. It looks at 32 entries of the index at a time.
template <typename Pipe>
__device__ inline void take_slots(const DispatchArgs& args, const Shared& shared, Pipe& pipe, uint32_t round, int warp,
                                  int num_warps) {
    const Comm& comm = args.comm;
    const int lane = lane_index(), num_slots = args.window.num_slots, all = comm.num_ranks * num_slots;
    for (int first = warp; first < all; first += kWarp * num_warps) {
        const int number = first + lane * num_warps;
        const int source = number / num_slots, slot = number % num_slots;
        int row = -1;
        uint64_t at = 0;
        if (number < all && source != comm.rank &&
            round * num_slots + slot < shared.entries[source].num_tokens) {
            row = pointer<volatile int32_t>(args.window.index(comm, comm.rank, source, round))[slot];
            at = args.window.slots(comm, comm.rank, source, round) +
                 static_cast<uint64_t>(slot) * args.window.slot_bytes;
        }
        // A peer's memory may hold anything; this rank does not write outside of its outputs.
        const uint32_t used = __ballot_sync(~0u, row >= 0 && row < shared.places[comm.rank].num_rows);
        auto from = [&](int i) {
            return pointer<const uint8_t>(__shfl_sync(~0u, at, __fns(used, 0, i + 1)) + args.slot_field[kRow]);
        };
        auto to = [&](int i) -> uint64_t {
            const int owner = __fns(used, 0, i + 1);
            const int64_t final_row = __shfl_sync(~0u, row, owner);
            take_metadata(args, __shfl_sync(~0u, at, owner), final_row);
            return lane == 0 ? args.out[kRow] + final_row * args.pieces.row_bytes : 0;
        };
        move_rows(pipe, args.pieces, 0, __popc(used), 1, from, to);
    }
}

// The taking warps of a rank with outputs outside of the arena: from its window to the outputs, round by round.
template <typename Pipe>
__device__ inline bool take_role(const DispatchArgs& args, const Call& call, Shared& shared, Pipe& pipe,
                                 const Role& role) {
    const Comm& comm = args.comm;
    const int num_ranks = comm.num_ranks, lane = lane_index();
    const bool is_source = lane < num_ranks && lane != comm.rank;
    uint32_t num_rounds = 0;
    for (int r = 0; r < num_ranks; ++r)
        if (r != comm.rank) num_rounds = max(num_rounds, args.window.rounds(shared.entries[r].num_tokens));
    for (uint32_t round = 0; round < num_rounds; ++round) {
        const bool is_sending = is_source && args.window.rounds(shared.entries[lane].num_tokens) > round;
        const uint32_t sending = __ballot_sync(~0u, is_sending);
        if (!await_round(comm, call, role, kPhaseReady, comm.own().window_ready[0], sending, round + 1,
                         shared.answer[1]))
            return false;
        take_slots(args, shared, pipe, round, blockIdx.x + role.warp() * gridDim.x, gridDim.x * role.num_warps);
        pipe.finish();
        finish_round(comm, call, role, comm.state().taken[0], sending, round, shared.count[1],
                     [&](int r) { return &comm.of(r).window_ack[0][comm.rank]; });
    }
    return true;
}

// All blocks: rows from `num_received` on select nothing.
__device__ inline void pad_topk_idx(const DispatchArgs& args, int num_received) {
    const int64_t first = static_cast<int64_t>(min(num_received, args.num_worst_tokens)) * args.num_topk;
    const int64_t end = static_cast<int64_t>(args.num_worst_tokens) * args.num_topk;
    for (int64_t i = first + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += gridDim.x * blockDim.x) {
        if (args.index_bytes == 8) {
            pointer<int64_t>(args.out[kTopkIdx])[i] = -1;
        } else {
            pointer<int32_t>(args.out[kTopkIdx])[i] = -1;
        }
    }
}

// One thread of one block: tell the host of rows for this rank that did not fit.
__device__ inline void count_dropped(const DispatchArgs& args, int num_received) {
    if (num_received > args.num_worst_tokens)
        *const_cast<volatile uint32_t*>(&args.comm.page()->dropped) += num_received - args.num_worst_tokens;
}

// All threads: the whole work between entry and exit. False: the call has failed, or nothing moves.
__device__ inline bool run(const DispatchArgs& args, const Call& call, Shared& shared, uint8_t* dynamic) {
    const Comm& comm = args.comm;
    if (!enter(args, call, shared)) return false;
    if (args.num_worst_tokens > 0) {
        const int32_t* last_row = pointer<const int32_t>(args.rank_prefix) + (comm.num_ranks - 1) * comm.num_ranks;
        const int num_received = last_row[comm.rank];
        pad_topk_idx(args, num_received);
        if (blockIdx.x == 0 && threadIdx.x == 0) count_dropped(args, num_received);
    }
    uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp_index() * kStages;
    uint8_t* stages = dynamic + round_up(warps_per_block() * kStages * sizeof(uint64_t), kUnit) +
                      static_cast<uint64_t>(warp_index()) * kStages * args.stage_bytes;
    RowPipe<kStages> pipe(stages, barriers, args.stage_bytes);
    const bool is_taking = args.entry.rows == kThroughWindow && comm.num_ranks > 1;
    const int num_senders = is_taking ? warps_per_block() / 2 : warps_per_block();
    const Role senders = {0, num_senders, 1};
    const Role takers = {num_senders, warps_per_block() - num_senders, 2};
    const bool good = senders.has_this_warp() ? send_role(args, call, shared, pipe, senders)
                                              : take_role(args, call, shared, pipe, takers);
    return __syncthreads_and(good);
}

extern "C" __global__ void __launch_bounds__(512, 1) epcomm_dispatch(const __grid_constant__ DispatchArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, kDispatch, call)) return;
    // What the exchange before found is the same on all ranks: all leave, or none. It is no call then: a rank that
    // rejected its input, or that waited for the counts, has launched nothing behind the exchange.
    const bool is_void = !args.is_forced && *const_cast<volatile uint32_t*>(&comm.state().verdict) != kMove;
    const bool good = !is_void && run(args, call, shared, dynamic);
    if (!good && args.num_worst_tokens > 0) pad_topk_idx(args, 0);
    if (is_last_block(comm, call)) {
        if (good && warp_index() == 0)
            meet(comm, call, [](Signals& signals) -> uint32_t(&)[kMaxRanks] { return signals.dispatch_done; });
        if (threadIdx.x == 0) reset_rounds(comm, call);
        end(comm, call, !is_void);
    }
}

}  // namespace epcomm
