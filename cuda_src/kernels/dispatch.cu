// dispatch.cu: send each token once to every rank that owns one of its experts, to the row where it stays.
//
// Grid: num_sms blocks, all resident. Ranks enter with the offsets of their output blocks; then warps take tokens in
// turn. Most read a row once and write it to the final row at each destination; the last kBesideWarps write what travels
// beside rows, in small pieces whose latency would hold up the pipes of rows. A rank whose outputs lie outside of the
// arena enters with kThroughWindow: rows of others for it go through its window in rounds, and as many warps again copy
// them out. The index of a round says which slots are in use.
//
// Regions: writes blocks and windows of all ranks, reads the own window. Words: dispatch_entry, window_ready,
// window_ack, dispatch_done; see common/layout.cuh for writers, sync/ for the pairs of release and acquire.
#include "kernels/dispatch_fields.cuh"
#include "sync/entry.cuh"
#include "sync/window.cuh"

#ifndef KERNEL_STAGES
#define KERNEL_STAGES 2
#endif

namespace epcomm {

inline constexpr int kStages = KERNEL_STAGES;

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
static_assert(sizeof(DispatchArgs) == sizeof(Comm) + 24 + 64 + 24 + 8 * 8 + 40 + 12 + 4 + 8 * 4,
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
    return find_fields(args, r, entry.rows, entry.metadata, places.num_rows, places.field);
}

// Lane r: where token `token` goes at destination r.
struct Target {
    int row;    // of that rank's output, or -1
    int index;  // likewise, or the slot of its window
};

__device__ inline Target target_of(const DispatchArgs& args, const Shared& shared, int token, int first) {
    const int lane = lane_index(), num_ranks = args.comm.num_ranks;
    if (lane >= num_ranks) return {-1, -1};
    const Places& places = shared.places[lane];
    const int pos = pointer<const int32_t>(args.send_pos)[static_cast<int64_t>(token) * num_ranks + lane];
    int row = pos < 0 ? -1 : places.first_row + pos;
    if (row >= places.num_rows) row = -1;  // does not fit into num_worst_tokens
    return {row, row >= 0 && places.is_windowed ? token - first : row};
}

// Where a field of row (or slot) i is at destination r.
__device__ inline uint64_t place_of(const DispatchArgs& args, const Places& places, int field, int64_t i) {
    return places.field[field] + i * (places.is_windowed ? args.window.slot_bytes : field_bytes(args, field));
}

// All lanes: write what travels beside token `token`; lane r knows its row (or slot) at destination r, or -1.
__device__ inline void send_beside(const DispatchArgs& args, const Shared& shared, int token, int index) {
    const int lane = lane_index();
    const int64_t choices = static_cast<int64_t>(token) * args.num_topk;
    const Chosen chosen =
        load_chosen(args, args.topk_idx + choices * args.index_bytes, args.topk_weights + choices * sizeof(float));
    if (args.num_scales > 0) {
        const uint64_t from = args.scales + token * args.scale_stride_token * args.scale_bytes;
        const Places& places = shared.places[min(lane, args.comm.num_ranks - 1)];
        spread_scales(args, from, args.scale_stride_scale, index < 0 ? 0 : place_of(args, places, kScales, index));
    }
    for (uint32_t rest = __ballot_sync(~0u, index >= 0); rest != 0; rest &= rest - 1) {
        const int r = __ffs(rest) - 1;
        const Places& places = shared.places[r];
        const int64_t i = __shfl_sync(~0u, index, r);
        store_local(args, r, chosen, place_of(args, places, kTopkIdx, i), place_of(args, places, kTopkWeights, i));
        if (lane == 0 && places.field[kSource] != 0) *pointer<int32_t>(place_of(args, places, kSource, i)) = token;
    }
}

// The warps of `role` send the tokens [first, end) of round `round`.
template <typename Pipe>
__device__ inline void send_tokens(const DispatchArgs& args, Shared& shared, Pipe& pipe, const Role& role, int first,
                                   int end, uint32_t round) {
    const int lane = lane_index(), num_ranks = args.comm.num_ranks, num_rows = role.num_warps - kBesideWarps;
    if (role.warp() < num_rows) {
        const Places& places = shared.places[min(lane, num_ranks - 1)];
        const uint64_t stride = places.is_windowed ? args.window.slot_bytes : args.pieces.row_bytes;
        auto source = [&](int token) {
            return pointer<const uint8_t>(args.x) + static_cast<uint64_t>(token) * args.pieces.row_bytes;
        };
        auto destination = [&](int token) -> uint64_t {
            const int index = target_of(args, shared, token, first).index;
            return index < 0 ? 0 : places.field[kRow] + static_cast<uint64_t>(index) * stride;
        };
        const int warp = blockIdx.x + role.warp() * gridDim.x;
        move_rows(pipe, args.pieces, first + warp, end, gridDim.x * num_rows, source, destination);
        return;
    }
    const bool is_windowed = lane < num_ranks && shared.places[lane].is_windowed;
    int32_t* slot_index =
        is_windowed ? pointer<int32_t>(args.window.index(args.comm, lane, args.comm.rank, round)) : nullptr;
    const bool has_source = lane < num_ranks && shared.places[lane].field[kSource] != 0;
    const bool has_beside = args.num_scales > 0 || args.num_topk > 0 || __any_sync(~0u, has_source);
    if (!has_beside && shared.windowed == 0) return;
    const int warp = blockIdx.x + (role.warp() - num_rows) * gridDim.x;
    for (int token = first + warp; token < end; token += gridDim.x * kBesideWarps) {
        const Target target = target_of(args, shared, token, first);
        if (has_beside) send_beside(args, shared, token, target.index);
        if (is_windowed) slot_index[token - first] = target.row;
    }
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
        if (round >= kWindowParts && !await_round(comm, call, role, kPhaseAck, comm.own().window_ack[0],
                                                  shared.windowed, round - kWindowParts + 1, shared.answer[0]))
            return false;
        // The slots' fields at a windowed destination are in another part in each round.
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

// All lanes: copy `count` elements.
template <typename T> __device__ inline void copy_elements(const T* from, T* to, int count) {
    for (int i = lane_index(); i < count; i += kWarp) to[i] = from[i];
}

// One warp copies what lies beside the row in a slot to this rank's outputs. Of all but the scales, loads come before
// stores, for one latency.
__device__ inline void take_beside(const DispatchArgs& args, uint64_t slot, int64_t row) {
    constexpr int kMost = 2;  // words a lane, for 32 indices of 8 bytes
    uint32_t words[kNumFields][kMost];
    auto has = [&](int f, uint32_t at) { return args.out[f] != 0 && at < field_bytes(args, f); };
#pragma unroll
    for (int f = kTopkIdx; f < kNumFields; ++f)
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const uint32_t at = 4 * (lane_index() + i * kWarp);
            if (has(f, at)) words[f][i] = *pointer<const uint32_t>(slot + args.slot_field[f] + at);
        }
#pragma unroll
    for (int f = kTopkIdx; f < kNumFields; ++f)
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const uint32_t at = 4 * (lane_index() + i * kWarp);
            if (has(f, at)) *pointer<uint32_t>(args.out[f] + row * field_bytes(args, f) + at) = words[f][i];
        }
    const uint64_t scales = args.out[kScales] + row * field_bytes(args, kScales), staged = slot + args.slot_field[kScales];
    if (args.scale_bytes == 4) {
        copy_elements(pointer<const uint32_t>(staged), pointer<uint32_t>(scales), args.num_scales);
    } else {
        copy_elements(pointer<const uint8_t>(staged), pointer<uint8_t>(scales), field_bytes(args, kScales));
    }
}

// One warp of those that take copies the slots that it is in charge of, their rows or what is beside them: numbers warp,
// warp + num_warps, … of all slots of a round, of which slot i of source s is number s * num_slots + i. It looks at 32
// entries of the index at a time.
template <typename Pipe>
__device__ inline void take_slots(const DispatchArgs& args, const Shared& shared, Pipe& pipe, uint32_t round,
                                  const Role& role) {
    const Comm& comm = args.comm;
    const int num_rows = role.num_warps - kBesideWarps;
    const bool takes_rows = role.warp() < num_rows;
    const int warp = blockIdx.x + (takes_rows ? role.warp() : role.warp() - num_rows) * gridDim.x;
    const int num_warps = gridDim.x * (takes_rows ? num_rows : kBesideWarps);
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
        auto owner = [&](int i) { return static_cast<int>(__fns(used, 0, i + 1)); };
        if (takes_rows) {
            auto from = [&](int i) {
                return pointer<const uint8_t>(__shfl_sync(~0u, at, owner(i)) + args.slot_field[kRow]);
            };
            auto to = [&](int i) -> uint64_t {
                const int64_t final_row = __shfl_sync(~0u, row, owner(i));
                return lane == 0 ? args.out[kRow] + final_row * args.pieces.row_bytes : 0;
            };
            move_rows(pipe, args.pieces, 0, __popc(used), 1, from, to);
        } else {
            for (int i = 0; i < __popc(used); ++i)
                take_beside(args, __shfl_sync(~0u, at, owner(i)), __shfl_sync(~0u, row, owner(i)));
        }
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
        take_slots(args, shared, pipe, round, role);
        pipe.finish();
        finish_round(comm, call, role, comm.state().taken[0], sending, round, shared.count[1],
                     [&](int r) { return &comm.of(r).window_ack[0][comm.rank]; });
    }
    return true;
}

// All threads: the whole work between entry and exit. False: the call has failed, or nothing moves.
__device__ inline bool run(const DispatchArgs& args, const Call& call, Shared& shared, uint8_t* dynamic) {
    const Comm& comm = args.comm;
    if (!enter(args, call, shared)) return false;
    if (args.num_worst_tokens > 0) note_worst_case(args);
    const bool is_taking = args.entry.rows == kThroughWindow;
    const int num_rows = warps_per_block() - kBesideWarps * (1 + is_taking);
    const int num_senders = kBesideWarps + (is_taking ? num_rows / 2 : num_rows);
    const Role senders = {0, num_senders, 1};
    const Role takers = {num_senders, warps_per_block() - num_senders, 2};
    // Warps that move rows have stages, by number: the others come last in their role.
    const int stage = senders.has_this_warp() ? senders.warp() : takers.warp() + num_senders - kBesideWarps;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp_index() * kStages;
    uint8_t* stages = dynamic + round_up(warps_per_block() * kStages * sizeof(uint64_t), kUnit) +
                      static_cast<uint64_t>(stage) * kStages * args.stage_bytes;
    RowPipe<kStages> pipe(stages, barriers, args.stage_bytes);
    const bool good = senders.has_this_warp() ? send_role(args, call, shared, pipe, senders)
                                              : take_role(args, call, shared, pipe, takers);
    return __syncthreads_and(good);
}

extern "C" __global__ void __launch_bounds__(768, 1) epcomm_dispatch(const __grid_constant__ DispatchArgs args) {
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
