// low_latency_combine_send.cuh: the send half. Rows that are pulled need only be told of; otherwise a warp takes a piece of
// a message of the dispatch, and writes it to the source, at the places of the token's choices: the rows as they are, or
// encoded, or their sum.
#pragma once

#include "common/logfmt.cuh"
#include "kernels/low_latency_combine.cuh"

namespace epcomm {

// -- where things are -------------------------------------------------------------------------------------------------

// All threads: tell the sources that fall to this block where their rows are. The threads have executed a fence.
__device__ inline void send_places(const LowLatencyCombineArgs& args, const Call& call, uint32_t reachable) {
    const Comm& comm = args.comm;
    const int num_local = args.num_local_experts;
#pragma unroll 1
    for (int source = blockIdx.x; source < comm.num_ranks; source += gridDim.x) {
        if (!(reachable >> source & 1) || args.slot.is_far(source)) continue;
        // RELEASE what earlier kernels of this stream wrote to the combine buffer, by the fence at the start of this one;
        // if the rows are pushed, that says only so. Pairs with the ACQUIRE in await_places, there.
#pragma unroll 1
        for (int expert = threadIdx.x; expert < num_local; expert += kThreads)
            ptx::st_relaxed_sys(&args.begins_at(source)[comm.rank * num_local + expert],
                                tagged(call.sequence, args.is_pulled ? args.begin_of(expert, source) : 0));
    }
}

// All threads of all blocks: the weights of this rank's choices, to their owners. Cells that carry their own flag. With
// other sizes they lie elsewhere, so what must be equal goes ahead of all greetings.
__device__ inline void send_weights(const LowLatencyCombineArgs& args, const Call& call, uint32_t reachable) {
    const int r = threadIdx.x;
    if (blockIdx.x == 0 && r < args.comm.num_ranks && (reachable >> r & 1))
        set_word(args.comm, r, args.digest_at(args.comm.rank, args.comm.rank), tagged(call.sequence, args.slot.digest));
    const int num_choices = args.num_tokens * args.num_topk;
#pragma unroll 1
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_choices; i += gridDim.x * kThreads) {
        const int expert = pointer<const int2>(args.send_info)[i].x;
        const int owner = args.by_local.divide(max(expert, 0));
        if (expert < 0 || !(reachable >> owner & 1)) continue;
        // Pairs with await_weight, there.
        set_word(args.comm, owner, args.weight_at(args.comm.rank, args.comm.rank, i),
                 tagged(call.sequence, pointer<const uint32_t>(args.topk_weights)[i]));
    }
}

// Whether a rank that has been heard of takes part in this very call; one that has not may yet come.
__device__ inline bool may_come(const LowLatencyCombineArgs& args, const Call& call, int source) {
    const Comm& comm = args.comm;
    const uint64_t word = ptx::ld_relaxed_sys(&comm.own().slot_ready[args.slot.index()][source]);
    const uint64_t early = ptx::ld_relaxed_sys(args.digest_at(comm.rank, source));
    const uint32_t sequence = static_cast<uint32_t>(word >> 32), what = static_cast<uint32_t>(word);
    if (is_filled(early, call) && static_cast<uint32_t>(early) != args.slot.digest) return false;
    return !reached(sequence, call.sequence) || (sequence == call.sequence && (what ^ args.slot.digest) <= 1);
}

// All lanes: the weight of a choice of `source` for each lane that wants one. False: there is none, or the call has failed.
// `cell`: what an earlier look at it found. `start_ns`: when this warp began to send.
__device__ inline bool await_weights(const LowLatencyCombineArgs& args, const Call& call, int source, int64_t choice,
                                     bool is_wanted, uint64_t cell, uint64_t start_ns, float& weight) {
    const Comm& comm = args.comm;
    uint32_t late = 0;
    auto awaited = [&] {
        if (!is_wanted || is_filled(cell, call)) return 0u;
        // Pairs with send_weights, there.
        cell = ptx::ld_relaxed_sys(args.weight_at(comm.rank, source, choice));
        if (is_filled(cell, call) || !may_come(args, call, source)) return 0u;
        // Half of the time: others who have nothing from a late rank wait for this one, and must not take it for late.
        if (args.slot.leaves_late && ptx::globaltimer_ns() - start_ns > comm.timeout_ns / 2) late = 1u << source;
        return late ^ 1u << source;
    };
    if (!wait_in_lanes(comm, call, kPhaseDone, awaited)) return false;
    if (!mask_late(comm, call, kPhaseDone, __reduce_or_sync(~0u, late))) return false;
    weight = __uint_as_float(static_cast<uint32_t>(cell));
    return __all_sync(~0u, !is_wanted || is_filled(cell, call));
}

// -- pieces -----------------------------------------------------------------------------------------------------------

// Some pieces of the rows of a message. Lane i looks after the i-th choice.
struct Parcel {
    int source, num_choices;
    int64_t choice;            // of this lane, at the source
    uint64_t from, to;         // its row at this rank, and its place at the source, or where it is staged
    uint32_t piece, num_pieces;
    uint32_t begin, num_bytes; // of a row, before it is encoded

    // All lanes: `num_pieces` from `piece` on.
    __device__ Parcel(const LowLatencyCombineArgs& args, int source, int message, uint32_t piece, uint32_t num_pieces)
        : source(source), piece(piece), num_pieces(num_pieces) {
        const int lane = lane_index(), num_topk = args.num_topk;
        const int32_t* kept = pointer<const int32_t>(args.messages) +
                              (static_cast<int64_t>(source) * args.max_tokens + message) * (1 + num_topk);
        const Header header(kept[0]);
        const Choice chosen(lane < num_topk ? kept[1 + lane] : 0);  // behind the last one there is anything
        int row = 0;
        if (lane < header.num_choices) row = args.begin_of(chosen.expert, source) + chosen.row;
        num_choices = header.num_choices;
        choice = static_cast<int64_t>(header.token) * num_topk + chosen.k;
        from = args.x + (static_cast<int64_t>(chosen.expert) * args.max_rows() + row) * args.row_bytes;
        to = args.slot.is_far(source) ? args.staged_at(source, choice) : args.place_of(source, choice);
        begin = piece * args.piece_bytes;
        num_bytes = min(num_pieces * args.piece_bytes, args.row_bytes - begin);
    }
    __device__ bool is_used() const { return lane_index() < num_choices; }
    // Whether a row, or the sum, lies at the i-th choice.
    __device__ bool has_row(int i) const { return i < (kPayload == kPartialSums ? 1 : num_choices); }
};

// All lanes: `kCount` columns of the i-th row, from `at` bytes behind the begin of the parcel on; zeros behind its end.
template <int kCount>
__device__ inline void load_columns(const Parcel& parcel, int i, uint32_t at, Vector (&values)[kCount]) {
    const Vector* x = pointer<const Vector>(__shfl_sync(~0u, parcel.from, i) + parcel.begin + at);
#pragma unroll
    for (int n = 0; n < kCount; ++n)
        values[n] = at + n * kColumn < parcel.num_bytes ? x[n * kWarp] : Vector{0, 0, 0, 0};
}

// All lanes: the rows as they are, of one of which no more than kPushColumns columns.
__device__ inline void push_rows(const Parcel& parcel) {
    const uint32_t at = lane_index() * sizeof(Vector);
#pragma unroll 1
    for (int i = 0; i < parcel.num_choices; ++i) {
        Vector values[kPushColumns];
        load_columns(parcel, i, at, values);
        Vector* there = pointer<Vector>(__shfl_sync(~0u, parcel.to, i) + parcel.begin + at);
#pragma unroll
        for (int n = 0; n < kPushColumns; ++n)
            if (at + n * kColumn < parcel.num_bytes) there[n * kWarp] = values[n];
    }
}

// All lanes: the rows in LogFMT. A column is two groups of channels.
__device__ inline void push_encoded_rows(const Parcel& parcel, uint32_t hidden) {
    const uint32_t at = lane_index() * sizeof(Vector);
#pragma unroll 1
    for (int i = 0; i < parcel.num_choices; ++i) {
        const uint64_t x = __shfl_sync(~0u, parcel.from, i) + parcel.begin + at;
        uint8_t* there = pointer<uint8_t>(__shfl_sync(~0u, parcel.to, i));
        auto load = [&](uint32_t column) {
            const bool is_there = at + column * kColumn < parcel.num_bytes;
            return is_there ? pointer<const Vector>(x)[column * kWarp] : Vector{0, 0, 0, 0};
        };
        Vector now = load(0), next = load(1);  // and one more is on its way while the first is encoded
#pragma unroll 1
        for (uint32_t column = 0; column * kColumn < parcel.num_bytes; ++column) {
            const Vector behind = load(column + 2);
            float values[kLogfmtLane];
            unpack(now, values);
            const uint32_t word = logfmt_word(values);
            const uint32_t group = (parcel.begin + at + column * kColumn) / (kLogfmtBlock * 2);
            if (at + column * kColumn < parcel.num_bytes) {
                store_logfmt(there, group, encode_logfmt(values, word));
                if (lane_index() % kLogfmtLanes == 0)
                    *reinterpret_cast<uint32_t*>(there + logfmt_word_offset(hidden, group)) = word;
            }
            now = next;
            next = behind;
        }
    }
}

// All lanes: the sum of the rows, each lane with the weight of its choice, to the place of the first choice. Two rows are on
// their way at once.
__device__ inline void push_sum(const Parcel& parcel, float weight) {
    constexpr int kSumColumns = 4;  // that are added at once
    const uint64_t there = __shfl_sync(~0u, parcel.to, 0) + parcel.begin;
#pragma unroll 1
    for (uint32_t at = lane_index() * sizeof(Vector); at < round_up(parcel.num_bytes, kColumn);
         at += kSumColumns * kColumn) {
        Sum sums[kSumColumns];
        auto add = [&](int i, const Vector (&values)[kSumColumns]) {
            const float factor = __shfl_sync(~0u, weight, i);
#pragma unroll
            for (int n = 0; n < kSumColumns; ++n) sums[n].add_weighted(factor, values[n]);
        };
#pragma unroll 1
        for (int i = 0; i < parcel.num_choices; i += 2) {
            const bool has_second = i + 1 < parcel.num_choices;
            Vector first[kSumColumns], second[kSumColumns];
            load_columns(parcel, i, at, first);
            if (has_second) load_columns(parcel, i + 1, at, second);
            add(i, first);
            if (has_second) add(i + 1, second);
        }
#pragma unroll
        for (int n = 0; n < kSumColumns; ++n)
            if (at + n * kColumn < parcel.num_bytes) pointer<Vector>(there + at)[n * kWarp] = sums[n].rounded();
    }
}

// All lanes: the cell of the weight of each choice as it is now, whether there is one or not.
__device__ inline uint64_t look_for_weight(const LowLatencyCombineArgs& args, const Parcel& parcel) {
    if (kPayload != kPartialSums || !parcel.is_used()) return 0;
    return ptx::ld_relaxed_sys(args.weight_at(args.comm.rank, parcel.source, parcel.choice));
}

// All lanes: write what the source gets to where it goes; `weight_cell` and `start_ns` as above. False: it gets nothing.
__device__ inline bool write_parcel(const LowLatencyCombineArgs& args, const Call& call, const Parcel& parcel,
                                    uint64_t weight_cell, uint64_t start_ns) {
    float weight = 0;
    if constexpr (kPayload == kRows) push_rows(parcel);
    if constexpr (kPayload == kEncodedRows) push_encoded_rows(parcel, args.row_bytes / 2);
    if constexpr (kPayload == kPartialSums) {
        if (!await_weights(args, call, parcel.source, parcel.choice, parcel.is_used(), weight_cell, start_ns, weight))
            return false;
        // By now the source may have done without this rank, see await_room.
        if (args.slot.leaves_late && __any_sync(~0u, went_on(args.comm, call, args.slot, parcel.source))) return false;
        push_sum(parcel, weight);
    }
    return true;
}

// Parcels that a warp has written and not yet released: a fence takes about as long as writing one does, so it is for two
// of them.
class Written {
  public:
    // All lanes.
    __device__ void add(const LowLatencyCombineArgs& args, const Parcel& parcel) {
        cells_[1] = cells_[0], num_pieces_[1] = num_pieces_[0];
        cells_[0] = args.piece_at(parcel.source, parcel.choice, parcel.piece);
        num_pieces_[0] = parcel.has_row(lane_index()) ? parcel.num_pieces : 0;
        ++count_;
    }
    __device__ bool is_full() const { return count_ == 2; }
    __device__ void release(const Call& call) {
        if (count_ == 0) return;
        __syncwarp();
        ptx::fence_acq_rel_sys();
        // RELEASE the pieces, which all lanes have written: the fence follows __syncwarp. Pairs with the ACQUIRE in
        // find_rows.
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll 1
            for (uint32_t i = 0; i < num_pieces_[n]; ++i) ptx::st_relaxed_sys(cells_[n] + i, tagged(call.sequence, 0));
            num_pieces_[n] = 0;
        }
        count_ = 0;
    }

  private:
    uint64_t* cells_[2] = {nullptr, nullptr};
    uint32_t num_pieces_[2] = {0, 0}, count_ = 0;
};

// All warps: the messages of the dispatch, back to their sources.
__device__ inline void push_messages(const LowLatencyCombineArgs& args, const Call& call, const Shared& shared,
                                     uint64_t start_ns) {
    const Comm& comm = args.comm;
    const uint32_t num_messages = shared.first_message[comm.num_ranks], num_warps = gridDim.x * kWarps;
    // A fence takes about as long as moving a few KB does: there is one for as many pieces as a warp can have on their way,
    // but warps go first.
    const uint32_t most = kPushColumns * kColumn / args.piece_bytes;
    const uint32_t a_unit = min(most, max(1u, num_messages * args.num_pieces / (2 * num_warps)));
    const uint32_t units_a_row = (args.num_pieces + a_unit - 1) / a_unit, num_units = num_messages * units_a_row;
    Written written;
#pragma unroll 1
    for (uint32_t unit = blockIdx.x + warp_index() * gridDim.x; unit < num_units; unit += num_warps) {
        const uint32_t number = unit / units_a_row, piece = (unit - number * units_a_row) * a_unit;
        const bool is_before = lane_index() < comm.num_ranks && shared.first_message[lane_index()] <= number;
        const int source = __popc(__ballot_sync(~0u, is_before)) - 1;
        if (!(shared.opening.reachable >> source & 1) || args.slot.is_far(source)) continue;
        const int message = number - shared.first_message[source];
        // On its way while the fence waits.
        const Parcel parcel(args, source, message, piece, min(a_unit, args.num_pieces - piece));
        const uint64_t weight_cell = look_for_weight(args, parcel);
        const bool is_held_up = kPayload == kPartialSums && parcel.is_used() && !is_filled(weight_cell, call);
        // Who waits for others must not keep them waiting.
        if (written.is_full() || __any_sync(~0u, is_held_up)) written.release(call);
        if (write_parcel(args, call, parcel, weight_cell, start_ns)) written.add(args, parcel);
    }
    written.release(call);
}

// All lanes: a message to a source behind the network. Its rows are staged, in pieces as far as registers ask for that, and
// sent one by one.
__device__ inline void push_far_message(const LowLatencyCombineArgs& args, const Call& call, int source, int message,
                                        uint64_t start_ns) {
    const Comm& comm = args.comm;
    const uint32_t a_step = kPayload == kRows ? 1 : args.num_pieces;
#pragma unroll 1
    for (uint32_t piece = 0; piece < args.num_pieces; piece += a_step)
        if (!write_parcel(args, call, Parcel(args, source, message, piece, a_step), 0, start_ns)) return;
    const Parcel parcel(args, source, message, 0, args.num_pieces);
    const uint64_t to = args.place_of(comm.rank, parcel.choice);
    uint64_t* cell = args.piece_at(comm.rank, parcel.choice, 0);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; parcel.has_row(i); ++i) {
        // RELEASE the row, in one message. Pairs with the ACQUIRE in find_rows.
        send_message(comm, source, __shfl_sync(~0u, to, i), __shfl_sync(~0u, parcel.to, i), args.wire_bytes,
                     pointer<uint64_t>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(cell), i)), tagged(call.sequence, 0));
    }
}

// All warps: the messages of sources behind the network. Code of its own, so that what goes to near ones stays short.
__device__ __noinline__ void push_far_messages(const LowLatencyCombineArgs& args, Call call, const Shared& shared,
                                               uint64_t start_ns) {
    uint32_t number = blockIdx.x + warp_index() * gridDim.x;  // among those of far sources
#pragma unroll 1
    for (uint32_t rest = args.slot.far & shared.opening.reachable; rest != 0; rest &= rest - 1) {
        const int source = __ffs(rest) - 1;
        const uint32_t count = shared.first_message[source + 1] - shared.first_message[source];
#pragma unroll 1
        for (; number < count; number += gridDim.x * kWarps) push_far_message(args, call, source, number, start_ns);
        number -= count;
    }
}

// One warp: number the messages of all sources. Those of ranks that had not sent are none.
__device__ inline void number_messages(const LowLatencyCombineArgs& args, Shared& shared) {
    const int lane = lane_index(), num_ranks = args.comm.num_ranks;
    const int32_t* num_messages = pointer<const int32_t>(args.num_messages);
    const int sum = sum_to_lane(lane < num_ranks && !args.slot.is_rejected ? num_messages[lane] : 0);
    if (lane == 0) shared.dispatched = args.slot.is_rejected ? 0 : num_messages[num_ranks];
    if (lane == 0) shared.first_message[0] = 0;
    if (lane < num_ranks) shared.first_message[lane + 1] = sum;
}

}  // namespace epcomm
