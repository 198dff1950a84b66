// low_latency_dispatch_send.cuh: the send half. All warps look at who goes where; then a warp takes a piece of a token,
// casts it if asked for, writes it from registers to the slots of its owners, and releases a cell there.
//
// Code is kept short here, loops are not unrolled without need: what a call runs is fetched from memory each time.
#pragma once

#include "kernels/low_latency_dispatch.cuh"

namespace epcomm {

// -- who goes where ---------------------------------------------------------------------------------------------------

// The tokens that are looked at together.
struct Chunk {
    int first, count;
};

// The first choices of a chunk that a thread notes, asked for before it knows anything.
struct EarlyChoices {
    static constexpr int kCount = 3;
    int64_t values[kCount];

    __device__ void ask(const LowLatencyDispatchArgs& args, int first_token) {
        const int64_t begin = static_cast<int64_t>(first_token) * args.num_topk;
        const int64_t num_choices = static_cast<int64_t>(args.num_tokens) * args.num_topk - begin;
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            const int i = threadIdx.x + n * kSenders;
            values[n] = i < num_choices ? choice_at(args, begin + i) : -1;
        }
    }
};

__device__ inline void sync_senders() { ptx::bar_sync(1, kSenders); }

// All senders; a barrier follows.
__device__ inline void clear_bits(const LowLatencyDispatchArgs& args, const Tables& tables, Shared& shared) {
    const int num_words = tables.num_rows * args.num_words;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_words; i += kSenders) tables.bits[i] = 0;
    if (threadIdx.x == 0) shared.next_unit = kServer;  // each of the warps begins with one
}

// All senders, with cleared bits: what tokens of the chunk have chosen. A barrier follows.
__device__ inline void fill_tables(const LowLatencyDispatchArgs& args, const Tables& tables, const Chunk& chunk,
                                   const EarlyChoices& early) {
    const int num_choices = chunk.count * args.num_topk, num_experts = args.num_experts();
#pragma unroll 1
    for (int n = 0, i = threadIdx.x; i < num_choices; ++n, i += kSenders) {
        const int64_t choice = n == 0   ? early.values[0]
                               : n == 1 ? early.values[1]
                               : n == 2 ? early.values[2]
                                        : choice_at(args, static_cast<int64_t>(chunk.first) * args.num_topk + i);
        const int expert = choice >= 0 && choice < num_experts ? static_cast<int>(choice) : -1;
        const int owner = args.by_local.divide(max(expert, 0)), token = args.by_topk.divide(i);
        tables.chosen[i] = expert < 0 ? -1 : owner << 16 | (expert - owner * args.num_local_experts);
        if (expert < 0) continue;
        atomicOr(&tables.bits[expert * args.num_words + token / 32], 1u << token % 32);
        atomicOr(&tables.bits[(num_experts + owner) * args.num_words + token / 32], 1u << token % 32);
    }
}

// How many bits of a row there are before `token` of the chunk, and in earlier chunks.
__device__ inline int count_before(const LowLatencyDispatchArgs& args, const Tables& tables, int row, int token) {
    const uint32_t* bits = &tables.bits[row * args.num_words];
    int count = tables.before[row];
#pragma unroll 1
    for (; token >= 32; token -= 32) count += __popc(*bits++);
    return count + __popc(*bits & ((1u << token) - 1));
}

// And how many there are in this chunk and those before.
__device__ inline int count_all(const LowLatencyDispatchArgs& args, const Tables& tables, int row) {
    const uint32_t is_last = tables.bits[(row + 1) * args.num_words - 1] >> 31;
    return count_before(args, tables, row, 32 * args.num_words - 1) + is_last;
}

// All senders, between two chunks: go on to the next one.
__device__ __noinline__ void go_to_chunk(const LowLatencyDispatchArgs& args, const Tables& tables, const Chunk& chunk,
                                         Shared& shared) {
    sync_senders();
    for (int row = threadIdx.x; row < tables.num_rows; row += kSenders)
        tables.before[row] = count_all(args, tables, row);
    EarlyChoices early;
    early.ask(args, chunk.first);
    sync_senders();
    clear_bits(args, tables, shared);
    sync_senders();
    fill_tables(args, tables, chunk, early);
    sync_senders();
}

// All senders, in the last chunk: tell the ranks that fall to this block how much comes.
__device__ inline void send_counts(const LowLatencyDispatchArgs& args, const Tables& tables, const Call& call,
                                   uint32_t reachable) {
    const Comm& comm = args.comm;
    const int num_local = args.num_local_experts;
#pragma unroll 1
    for (int r = blockIdx.x; r < comm.num_ranks; r += gridDim.x) {
        if (!(reachable >> r & 1)) continue;
#pragma unroll 1
        for (int i = threadIdx.x; i <= num_local; i += kSenders) {
            const int row = i < num_local ? r * num_local + i : args.num_experts() + r;
            set_word(comm, r, &args.counts_of(comm.rank, comm.rank)[i],
                     tagged(call.sequence, count_all(args, tables, row)));
        }
    }
}

// One warp: the header of a token, to all its owners. Lane k has the choice `chosen` of k, lane r the number `message`
// that the token has among those to rank r.
__device__ inline void send_header(const LowLatencyDispatchArgs& args, const Tables& tables, const Call& call,
                                   uint32_t reachable, int token, int token_of_chunk, int chosen, int message) {
    const Comm& comm = args.comm;
    const int lane = lane_index(), owner = chosen >> 16, local = chosen & 0xffff;  // -1 >> 16 is -1
    const uint32_t same = __match_any_sync(~0u, owner);
    const int place = __popc(same & ((1u << lane) - 1));
    const int number = __shfl_sync(~0u, message, max(owner, 0));
    int2 sent = {-1, -1};
    if (owner >= 0 && (reachable >> owner & 1)) {
        sent.x = owner * args.num_local_experts + local;
        sent.y = count_before(args, tables, sent.x, token_of_chunk);
        uint64_t* header = args.header_of(comm.rank, comm.rank, number);
        set_word(comm, owner, &header[1 + place], tagged(call.sequence, Choice(lane, local, sent.y).value()));
        if (place == 0) set_word(comm, owner, header, tagged(call.sequence, Header(__popc(same), token).value()));
    }
    if (lane < args.num_topk)
        pointer<int2>(args.send_info)[static_cast<int64_t>(token) * args.num_topk + lane] = sent;
}

// -- rows -------------------------------------------------------------------------------------------------------------

// A piece of a token of the chunk.
struct Unit {
    int token;
    uint32_t piece;
};

__device__ inline Unit unit_at(const LowLatencyDispatchArgs& args, int number) {
    const uint32_t unit = blockIdx.x + number * gridDim.x, token = args.by_pieces.divide(unit);
    return {static_cast<int>(token), unit - token * args.num_pieces};
}

// All lanes: the next unit of the block that nobody has taken.
__device__ inline Unit take_unit(const LowLatencyDispatchArgs& args, Shared& shared) {
    const int number = lane_index() == 0 ? atomicAdd(&shared.next_unit, 1) : 0;
    return unit_at(args, __shfl_sync(~0u, number, 0));
}

using Values = Vector[kSendVectors];

// All lanes: a piece of a row of x, zeros behind its end.
__device__ inline void load_piece(const LowLatencyDispatchArgs& args, int64_t token, uint32_t piece, Values& values) {
    const uint32_t at = lane_index() * sizeof(Vector), num_bytes = args.bytes_of(piece) << kIsFp8;
    const uint64_t x = args.x + 2 * token * args.hidden + (piece * args.piece_bytes << kIsFp8) + at;
#pragma unroll
    for (int i = 0; i < kSendVectors; ++i)
        values[i] = at + i * kColumn < num_bytes ? pointer<const Vector>(x)[i * kWarp] : Vector{0, 0, 0, 0};
}

// All lanes: the scales of values, of which sixteen lanes share one. Lane 16 h + i gets that of half h of vector i.
__device__ inline Fp8Scale find_scale(const LowLatencyDispatchArgs& args, const Values& values) {
    uint32_t largest[kSendVectors];
#pragma unroll
    for (int i = 0; i < kSendVectors; ++i) largest[i] = largest_magnitudes(values[i]);
    // Each step halves the vectors that a lane looks after, and doubles the lanes that each has been taken over.
#pragma unroll
    for (int step = 1; step < kSendVectors; step *= 2) {
        const bool is_odd = lane_index() & step;
#pragma unroll
        for (int i = 0; i < kSendVectors / 2 / step; ++i) {
            const uint32_t kept = is_odd ? largest[2 * i + 1] : largest[2 * i];
            const uint32_t given = is_odd ? largest[2 * i] : largest[2 * i + 1];
            largest[i] = larger_pair(kept, __shfl_xor_sync(~0u, given, step));
        }
    }
    static_assert(kSendVectors == 8);
    const float amax = larger_of(larger_pair(largest[0], __shfl_xor_sync(~0u, largest[0], kSendVectors)));
    return args.scales == kExact ? fp8_scale(amax) : fp8_scale_pow2(amax);
}

// All lanes: write values to the owners; lane r has the place of the piece at rank r, or 0.
__device__ inline void store_rows(uint64_t place, uint32_t num_bytes, const Values& values) {
    const uint32_t wanted = __ballot_sync(~0u, place != 0), at = lane_index() * sizeof(Vector);
#pragma unroll 1
    for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
        const uint64_t to = __shfl_sync(~0u, place, __ffs(rest) - 1) + at;
#pragma unroll
        for (int i = 0; i < kSendVectors; ++i)
            if (at + i * kColumn < num_bytes) pointer<Vector>(to)[i * kWarp] = values[i];
    }
}

// All lanes: cast values and write them to the owners, as above; the scales lie `scales` bytes behind the place.
__device__ inline void cast_rows(const LowLatencyDispatchArgs& args, uint64_t place, uint32_t scales, uint32_t num_bytes,
                                 const Values& values) {
    const uint32_t lane = lane_index(), at = lane * sizeof(uint2);
    const Fp8Scale scale = find_scale(args, values);
    uint2 bytes[kSendVectors];
#pragma unroll
    for (int i = 0; i < kSendVectors; ++i) {
        const Vector& v = values[i];
        const float factor = __shfl_sync(~0u, scale.factor, (lane & 16) + i);
        bytes[i] = {pair_to_e4m3(v.x, factor) | pair_to_e4m3(v.y, factor) << 16,
                    pair_to_e4m3(v.z, factor) | pair_to_e4m3(v.w, factor) << 16};
    }
    const uint32_t wanted = __ballot_sync(~0u, place != 0), group = 2 * (lane % 16) + lane / 16;
    const bool has_scale = lane % 16 < kSendVectors && group < num_bytes / kFp8Block;
#pragma unroll 1
    for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
        const uint64_t to = __shfl_sync(~0u, place, __ffs(rest) - 1);
#pragma unroll
        for (int i = 0; i < kSendVectors; ++i)
            if (at + i * kWarp * sizeof(uint2) < num_bytes) pointer<uint2>(to + at)[i * kWarp] = bytes[i];
        if (!has_scale) continue;
        if (args.scales == kExponents) {
            pointer<uint8_t>(to + scales)[group] = scale.exponent;
        } else {
            pointer<float>(to + scales)[group] = scale.scale;
        }
    }
}

// All lanes: write a piece, cast if asked for, to the rows that lie where each lane says, 0: nowhere.
__device__ inline void write_piece(const LowLatencyDispatchArgs& args, uint64_t row, uint32_t piece,
                                   const Values& values) {
    const uint32_t offset = piece * args.piece_bytes, num_bytes = args.bytes_of(piece);
    const uint64_t place = row != 0 ? row + offset : 0;
    if constexpr (kIsFp8) {
        const uint32_t scale_bytes = args.scales == kExponents ? 1 : 4;
        cast_rows(args, place, args.hidden - offset + offset / kFp8Block * scale_bytes, num_bytes, values);
    } else {
        store_rows(place, num_bytes, values);
    }
}

// All lanes: the message that a token of the chunk is to each of its owners among `ranks`; lane r has the number of that to
// rank r, or -1.
__device__ inline int number_of_message(const LowLatencyDispatchArgs& args, const Tables& tables, uint32_t ranks,
                                        int token, int chosen) {
    const int lane = lane_index();
    const uint32_t owners = __reduce_or_sync(~0u, chosen >= 0 ? 1u << (chosen >> 16) : 0u) & ranks;
    return owners >> lane & 1 ? count_before(args, tables, args.num_experts() + lane, token) : -1;
}

// All lanes: write a unit, of which `values` are loaded. Lane r gets the cell to release behind it at rank r, or null.
__device__ inline uint64_t* write_unit(const LowLatencyDispatchArgs& args, const Tables& tables, const Call& call,
                                       uint32_t reachable, int first_token, const Unit& unit, const Values& values) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    const int chosen = lane < args.num_topk ? tables.chosen[unit.token * args.num_topk + lane] : -1;
    const int message = number_of_message(args, tables, reachable, unit.token, chosen);
    if (unit.piece == 0)
        send_header(args, tables, call, reachable, first_token + unit.token, unit.token, chosen, message);
    const bool is_written = message >= 0 && !args.slot.is_far(lane);
    write_piece(args, is_written ? args.rows_of(lane, comm.rank) + message * args.row_stride : 0, unit.piece, values);
    return is_written ? args.piece_of(lane, comm.rank, message, unit.piece) : nullptr;
}

// All lanes: send units of the block until none is left; of the first one values may be loaded. A fence takes about as
// long as writing a unit does, so it is for two of them.
__device__ inline void send_units(const LowLatencyDispatchArgs& args, const Tables& tables, const Call& call,
                                  uint32_t reachable, const Chunk& chunk, Unit unit, bool is_loaded, Values& values,
                                  Shared& shared) {
    uint64_t *first = nullptr, *second = nullptr;
    int num_written = 0;
#pragma unroll 1
    for (;;) {
        const bool is_there = unit.token < chunk.count;
        // On its way while the fence waits.
        if (is_there && !is_loaded) load_piece(args, chunk.first + unit.token, unit.piece, values);
        is_loaded = false;
        if (num_written == 2 || !is_there) {
            __syncwarp();
            ptx::fence_acq_rel_sys();
            // RELEASE the pieces, which all lanes have written: the fence follows __syncwarp. Pairs with the ACQUIRE in
            // receive.
            if (first != nullptr) ptx::st_relaxed_sys(first, tagged(call.sequence, 0));
            if (second != nullptr) ptx::st_relaxed_sys(second, tagged(call.sequence, 0));
            first = nullptr;
            num_written = 0;
        }
        if (!is_there) return;
        second = first;
        first = write_unit(args, tables, call, reachable, chunk.first, unit, values);
        ++num_written;
        unit = take_unit(args, shared);
    }
}

// All senders: rows of the chunk for owners behind the network. A warp takes a whole row, and writes it once for all of them.
// Code of its own, so that what goes to near owners stays short.
__device__ __noinline__ void send_far_rows(const LowLatencyDispatchArgs& args, const Tables& tables, Call call,
                                           uint32_t reachable, Chunk chunk) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    Values values;
#pragma unroll 1
    for (int token = blockIdx.x + warp_index() * gridDim.x; token < chunk.count; token += gridDim.x * kServer) {
        const int chosen = lane < args.num_topk ? tables.chosen[token * args.num_topk + lane] : -1;
        const int message = number_of_message(args, tables, reachable & args.slot.far, token, chosen);
        const uint64_t row = args.staged_row(chunk.first + token);
        uint32_t rest = __ballot_sync(~0u, message >= 0);
        if (rest == 0) continue;
#pragma unroll 1
        for (uint32_t piece = 0; piece < args.num_pieces; ++piece) {
            load_piece(args, chunk.first + token, piece, values);
            write_piece(args, lane == 0 ? row : 0, piece, values);
        }
        __syncwarp();
#pragma unroll 1
        for (; rest != 0; rest &= rest - 1) {
            const int owner = __ffs(rest) - 1, number = __shfl_sync(~0u, message, owner);
            // RELEASE the row, in one message. Pairs with the ACQUIRE in receive.
            send_message(comm, owner, args.rows_of(comm.rank, comm.rank) + number * args.row_stride, row, args.row_stride,
                         args.piece_of(comm.rank, comm.rank, number, 0), tagged(call.sequence, 0));
        }
    }
}

}  // namespace epcomm
