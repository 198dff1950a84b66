// low_latency_dispatch.cu: send each token once to every rank that owns one of its experts, and give every expert its
// rows there, by source rank, then token.
//
// Grid: num_sms blocks, all resident. Send half: warps take pieces of tokens, cast them if asked for, and write them
// from registers to the slots of the destinations; block 0 also writes there which token has chosen which expert, a bit
// each. Receive half: these bits of all sources give the row of every token at every expert, so no counts are exchanged
// first; warps take pieces of staged tokens, read them once and write them to all their rows.
//
// A slot has a lane of `lane_bytes` for each source: [choices: uint32 [L, words] | send_begin: int32 [L] | tokens:
// int32 | rows], a row with its scales behind it, at multiples of `row_stride`.
//
// Regions: writes slots of all ranks, reads the own one. Words: slot_ready, slot_ack; see sync/slot.cuh.
#include "common/numerics.cuh"
#include "sync/rows.cuh"
#include "sync/slot.cuh"

namespace epcomm {

inline constexpr int kThreads = 512;
inline constexpr int kBitWords = 4096;  // of shared memory, for choices

// How rows travel. The numbers are in epcomm/kernels/low_latency_dispatch.py.
enum Cast : uint32_t { kBf16 = 0, kFp8 = 1, kFp8PowerOfTwo = 2, kFp8Exponents = 3 };

struct LowLatencyDispatchArgs {
    Comm comm;
    SlotArgs slot;
    uint64_t lane_bytes;
    uint64_t rows_offset;       // in a lane
    uint64_t row_stride;
    uint64_t x;                 // bfloat16 [num_tokens, hidden]
    uint64_t topk_idx;          // int32 or int64 [num_tokens, num_topk]
    uint64_t send_pos;          // int32 [num_tokens, num_topk], out: number of each row among those that this rank
                                // sends, by expert, then token; or -1
    uint64_t recv_x;            // [L, max_rows, row], out
    uint64_t recv_scales;       // float32 or int32 [L, width, max_rows], out
    uint64_t recv_count;        // int32 [L], out
    uint64_t src_info;          // int32 [L, max_rows], out
    uint64_t layout_range;      // int64 [L, num_ranks], out: first row << 32 | rows
    uint64_t send_begin;        // int32 [L, num_ranks], out: number of the first of these rows at its source
    uint64_t expert_stats;      // int32 [L] or 0
    uint64_t wait_stats;        // int64 [num_ranks] or 0
    uint32_t cast;              // Cast
    uint32_t send_vectors;      // of 16 bytes, of x, that a warp takes at once
    uint32_t receive_bytes;     // likewise, of a staged row
    int32_t hidden, num_tokens, num_topk, index_bytes, num_local_experts, max_tokens, unused;
};
static_assert(sizeof(LowLatencyDispatchArgs) == 288 + 80 + 14 * 8 + 10 * 4,
              "LowLatencyDispatchArgs differs from epcomm/kernels/low_latency_dispatch.py");

struct Shared {
    uint32_t bits[kBitWords];  // of block 0: [experts of this pass, words]
    int32_t begin[kThreads];   // number of the first row of an expert of this pass
    int32_t warp_sums[kThreads / kWarp];
    int32_t first_token[kMaxRanks + 1];  // number of the first token of a source, of all
    uint32_t reachable;
    Arrival arrival;
};

// The choices of a source at this rank's experts, and what comes behind them.
struct Lane {
    const uint32_t* choices;
    const int32_t* begin;  // then the number of tokens
    const uint8_t* rows;
};

__device__ inline int num_words(const LowLatencyDispatchArgs& args) { return (args.max_tokens + 31) / 32; }
__device__ inline uint64_t lane_at(const LowLatencyDispatchArgs& args, int owner, int source) {
    return args.slot.at(args.comm, owner) + source * args.lane_bytes;
}

__device__ inline Lane own_lane(const LowLatencyDispatchArgs& args, int source) {
    const uint64_t lane = lane_at(args, args.comm.rank, source);
    const uint64_t choices_bytes = 4ull * args.num_local_experts * num_words(args);
    return {pointer<const uint32_t>(lane), pointer<const int32_t>(lane + choices_bytes),
            pointer<const uint8_t>(lane + args.rows_offset)};
}

__device__ inline uint32_t row_bytes(const LowLatencyDispatchArgs& args) { return args.hidden << (args.cast == kBf16); }

// The expert of a choice, or -1.
__device__ inline int choice_at(const LowLatencyDispatchArgs& args, int64_t at) {
    const int64_t expert = args.index_bytes == 8 ? pointer<const int64_t>(args.topk_idx)[at]
                                                 : pointer<const int32_t>(args.topk_idx)[at];
    return expert >= 0 && expert < static_cast<int64_t>(args.num_local_experts) * args.comm.num_ranks
               ? static_cast<int>(expert)
               : -1;
}

// -- send -------------------------------------------------------------------------------------------------------------

// All threads of a block: exclusive sums of `value` over the threads, and the sum of all.
__device__ inline int sums_before(Shared& shared, int value, int& total) {
    const int sum = sum_to_lane(value);
    if (lane_index() == kWarp - 1) shared.warp_sums[warp_index()] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int warp = 0; warp < warps_per_block(); ++warp) {
        if (warp < warp_index()) before += shared.warp_sums[warp];
        total += shared.warp_sums[warp];
    }
    __syncthreads();
    return before + sum - value;
}

// All threads of block 0: tell every rank who has chosen its experts, and number the rows. Experts come in passes of as
// many as have room in shared memory.
__device__ inline void send_choices(const LowLatencyDispatchArgs& args, Shared& shared) {
    const Comm& comm = args.comm;
    const int words = num_words(args), num_local = args.num_local_experts, num_experts = num_local * comm.num_ranks;
    const int experts_a_pass = min(kThreads, kBitWords / words);
    const int num_choices = args.num_tokens * args.num_topk;
    int num_before = 0;
    if (threadIdx.x < comm.num_ranks && (shared.reachable >> threadIdx.x & 1))
        pointer<int32_t>(lane_at(args, threadIdx.x, comm.rank) + 4ull * num_local * words)[num_local] = args.num_tokens;
    for (int first = 0; first < num_experts; first += experts_a_pass) {
        const int count = min(experts_a_pass, num_experts - first);
        for (int i = threadIdx.x; i < count * words; i += kThreads) shared.bits[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < num_choices; i += kThreads) {
            const int expert = choice_at(args, i) - first, token = i / args.num_topk;
            if (expert >= 0 && expert < count)
                atomicOr(&shared.bits[expert * words + token / 32], 1u << token % 32);
        }
        __syncthreads();
        int num_rows = 0, total;
        const int own = threadIdx.x;
        for (int word = 0; own < count && word < words; ++word) num_rows += __popc(shared.bits[own * words + word]);
        const int begin = num_before + sums_before(shared, num_rows, total);
        num_before += total;
        if (own < count) {
            shared.begin[own] = begin;
            const int d = (first + own) / num_local, expert = (first + own) % num_local;
            if (shared.reachable >> d & 1)
                pointer<int32_t>(lane_at(args, d, comm.rank) + 4ull * num_local * words)[expert] = begin;
        }
        for (int i = threadIdx.x; i < count * words; i += kThreads) {
            const int d = (first + i / words) / num_local, expert = (first + i / words) % num_local;
            if (shared.reachable >> d & 1)
                pointer<uint32_t>(lane_at(args, d, comm.rank))[expert * words + i % words] = shared.bits[i];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_choices; i += kThreads) {
            const int chosen = choice_at(args, i), expert = chosen - first, token = i / args.num_topk;
            if (chosen < 0 && first == 0) pointer<int32_t>(args.send_pos)[i] = -1;
            if (chosen < 0 || expert < 0 || expert >= count) continue;
            const uint32_t* bits = &shared.bits[expert * words];
            int pos = shared.begin[expert] + __popc(bits[token / 32] & ((1u << token % 32) - 1));
            for (int word = 0; word < token / 32; ++word) pos += __popc(bits[word]);
            pointer<int32_t>(args.send_pos)[i] = pos;
        }
        __syncthreads();
    }
}

__device__ inline float largest_magnitude(uint4 v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        largest = fmaxf(largest, fabsf(__uint_as_float(words[i] << 16)));
        largest = fmaxf(largest, fabsf(__uint_as_float(words[i] & 0xffff0000u)));
    }
    return largest;
}

__device__ inline uint2 cast_vector(uint4 v, float factor) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t bytes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = to_e4m3(__uint_as_float(words[i] << 16), factor);
        const uint32_t high = to_e4m3(__uint_as_float(words[i] & 0xffff0000u), factor);
        bytes[i / 2] |= (low | high << 8) << (i % 2 * 16);
    }
    return {bytes[0], bytes[1]};
}

// All lanes: cast the vectors [first, end) of a row of x; lane d gives the place of the row at destination d, or 0.
// Sixteen lanes share a scale.
__device__ inline void send_cast(const LowLatencyDispatchArgs& args, const Vector* x, uint64_t destination,
                                 uint32_t first, uint32_t end) {
    constexpr int kUnroll = 4;
    const uint32_t wanted = __ballot_sync(~0u, destination != 0);
    for (; first < end; first += kUnroll * kWarp) {
        Vector values[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const uint32_t at = first + i * kWarp + lane_index();
            values[i] = at < end ? x[at] : Vector{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const uint32_t at = first + i * kWarp + lane_index();
            float amax = largest_magnitude(values[i]);
            for (int step = 8; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
            const Fp8Scale scale = args.cast == kFp8 ? fp8_scale(amax) : fp8_scale_pow2(amax);
            const uint2 bytes = cast_vector(values[i], scale.factor);
            for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
                const uint64_t to = __shfl_sync(~0u, destination, __ffs(rest) - 1);
                if (at >= end) continue;
                pointer<uint2>(to)[at] = bytes;
                if (at % 16 != 0) continue;
                if (args.cast == kFp8Exponents) {
                    pointer<uint8_t>(to + args.hidden)[at / 16] = scale.exponent;
                } else {
                    pointer<float>(to + args.hidden)[at / 16] = scale.scale;
                }
            }
        }
    }
}

// All warps: tokens in pieces. Block 0, which also sends the choices, takes its share last.
__device__ inline void send_rows(const LowLatencyDispatchArgs& args, uint32_t reachable) {
    const Comm& comm = args.comm;
    const uint32_t num_vectors = args.hidden / 8, lane = lane_index();
    const uint32_t num_pieces = (num_vectors + args.send_vectors - 1) / args.send_vectors;
    const uint32_t num_units = args.num_tokens * num_pieces;
    const uint32_t block = (blockIdx.x + gridDim.x - 1) % gridDim.x;
    for (uint32_t unit = block + warp_index() * gridDim.x; unit < num_units; unit += gridDim.x * warps_per_block()) {
        const uint32_t token = unit / num_pieces, first = unit % num_pieces * args.send_vectors;
        const int expert = lane < args.num_topk ? choice_at(args, token * args.num_topk + lane) : -1;
        const uint32_t owners = __reduce_or_sync(~0u, expert >= 0 ? 1u << expert / args.num_local_experts : 0u);
        uint64_t to = 0;
        if (owners & reachable & (1u << lane))
            to = lane_at(args, lane, comm.rank) + args.rows_offset + token * args.row_stride;
        const Vector* x = pointer<const Vector>(args.x) + static_cast<uint64_t>(token) * num_vectors;
        const uint32_t end = min(num_vectors, first + args.send_vectors);
        if (args.cast == kBf16) {
            copy_by_lanes(reinterpret_cast<const uint8_t*>(x + first), to != 0 ? to + first * sizeof(Vector) : 0,
                          (end - first) * sizeof(Vector));
        } else {
            send_cast(args, x, to, first, end);
        }
    }
}

// -- receive ----------------------------------------------------------------------------------------------------------

// All threads of a block: begins[e * (R + 1) + s] is the first row of source s at expert e, that of s = R the end.
__device__ inline void place_sources(const LowLatencyDispatchArgs& args, Shared& shared, int32_t* begins) {
    const uint32_t present = shared.arrival.present;
    const int num_ranks = args.comm.num_ranks, num_local = args.num_local_experts, words = num_words(args);
    for (int i = threadIdx.x; i < num_local * num_ranks; i += kThreads) {
        const int expert = i % num_local, source = i / num_local;
        const uint32_t* choices = own_lane(args, source).choices + static_cast<int64_t>(expert) * words;
        int count = 0;
        if (present >> source & 1)
            for (int word = 0; word < words; ++word) count += __popc(choices[word]);
        begins[expert * (num_ranks + 1) + source] = count;
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < num_local; expert += kThreads) {
        int32_t* begin = begins + expert * (num_ranks + 1);
        int sum = 0;
        for (int source = 0; source < num_ranks; ++source) {
            const int count = begin[source];
            begin[source] = sum;
            sum += count;
        }
        begin[num_ranks] = sum;
    }
    if (warp_index() == 0) {
        const int source = lane_index();
        const bool is_there = source < num_ranks && (present >> source & 1);
        const int count = is_there ? min(max(own_lane(args, source).begin[num_local], 0), args.max_tokens) : 0;
        const int sum = sum_to_lane(count);
        if (source == 0) shared.first_token[0] = 0;
        if (source < num_ranks) shared.first_token[source + 1] = sum;
    }
    __syncthreads();
}

// All threads of one block: what the host, the user and a later combine want to know.
__device__ inline void write_counts(const LowLatencyDispatchArgs& args, uint32_t present, const int32_t* begins) {
    const int num_ranks = args.comm.num_ranks;
    for (int i = threadIdx.x; i < args.num_local_experts * num_ranks; i += kThreads) {
        const int expert = i / num_ranks, source = i % num_ranks;
        const int32_t* begin = begins + expert * (num_ranks + 1) + source;
        pointer<int64_t>(args.layout_range)[i] = static_cast<int64_t>(begin[0]) << 32 | (begin[1] - begin[0]);
        pointer<int32_t>(args.send_begin)[i] = present >> source & 1 ? own_lane(args, source).begin[expert] : 0;
    }
    for (int expert = threadIdx.x; expert < args.num_local_experts; expert += kThreads) {
        const int count = begins[expert * (num_ranks + 1) + num_ranks];
        pointer<int32_t>(args.recv_count)[expert] = count;
        if (args.expert_stats != 0) pointer<int32_t>(args.expert_stats)[expert] += count;
    }
    if (__popc(present) == num_ranks) return;
    // What went to a rank that is not there does not come back.
    for (int i = threadIdx.x; i < args.num_tokens * args.num_topk; i += kThreads) {
        const int expert = choice_at(args, i);
        if (expert >= 0 && !(present >> expert / args.num_local_experts & 1)) pointer<int32_t>(args.send_pos)[i] = -1;
    }
}

// All lanes: the scales of a staged row, to one row of one expert.
__device__ inline void place_scales(const LowLatencyDispatchArgs& args, const uint8_t* staged, int expert, int row) {
    const int64_t max_rows = static_cast<int64_t>(args.max_tokens) * args.comm.num_ranks;
    const int num_scales = args.hidden / kFp8Block;
    const bool is_packed = args.cast == kFp8Exponents;
    const int width = is_packed ? (num_scales + 3) / 4 : num_scales;
    for (int at = lane_index(); at < width; at += kWarp) {
        uint32_t value = reinterpret_cast<const uint32_t*>(staged)[at];
        const int num_bytes = num_scales - 4 * at;  // that are exponents
        if (is_packed && num_bytes < 4) value &= (1u << 8 * num_bytes) - 1;
        pointer<uint32_t>(args.recv_scales)[(static_cast<int64_t>(expert) * width + at) * max_rows + row] = value;
    }
}

// All lanes: a piece of a staged token, to its row at every expert that it has chosen.
__device__ inline void place_piece(const LowLatencyDispatchArgs& args, const int32_t* begins, int source, int token,
                                   uint32_t offset) {
    const int num_ranks = args.comm.num_ranks, num_local = args.num_local_experts, words = num_words(args);
    const int64_t max_rows = static_cast<int64_t>(args.max_tokens) * num_ranks;
    const uint32_t bytes = row_bytes(args), num_bytes = min(args.receive_bytes, bytes - offset);
    const Lane lane = own_lane(args, source);
    const uint8_t* row = lane.rows + token * args.row_stride;
    for (int first = 0; first < num_local; first += kWarp) {
        const int expert = first + lane_index();
        const uint32_t* choices = lane.choices + static_cast<int64_t>(expert) * words;
        const uint32_t word = expert < num_local ? choices[token / 32] : 0;
        const bool is_chosen = word >> token % 32 & 1;
        const uint32_t chosen = __ballot_sync(~0u, is_chosen);
        if (chosen == 0) continue;
        int at = 0;
        if (is_chosen) {
            at = begins[expert * (num_ranks + 1) + source] + __popc(word & ((1u << token % 32) - 1));
            for (int i = 0; i < token / 32; ++i) at += __popc(choices[i]);
        }
        const int64_t flat = expert * max_rows + at;
        copy_by_lanes(row + offset, is_chosen ? args.recv_x + flat * bytes + offset : 0, num_bytes);
        if (offset != 0) continue;
        if (is_chosen) pointer<int32_t>(args.src_info)[flat] = token;
        if (args.cast == kBf16) continue;
        for (uint32_t rest = chosen; rest != 0; rest &= rest - 1) {
            const int from = __ffs(rest) - 1;
            place_scales(args, row + args.hidden, first + from, __shfl_sync(~0u, at, from));
        }
    }
}

// All threads of all blocks.
__device__ inline void receive_rows(const LowLatencyDispatchArgs& args, const Shared& shared, const int32_t* begins) {
    const int num_ranks = args.comm.num_ranks;
    const uint32_t num_pieces = (row_bytes(args) + args.receive_bytes - 1) / args.receive_bytes;
    const uint32_t max_rows = args.max_tokens * num_ranks, num_units = shared.first_token[num_ranks] * num_pieces;
    for (uint32_t unit = blockIdx.x + warp_index() * gridDim.x; unit < num_units;
         unit += gridDim.x * warps_per_block()) {
        const int number = unit / num_pieces;
        const bool is_before = lane_index() < num_ranks && shared.first_token[lane_index()] <= number;
        const int source = __popc(__ballot_sync(~0u, is_before)) - 1;
        place_piece(args, begins, source, number - shared.first_token[source], unit % num_pieces * args.receive_bytes);
    }
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t num_rows = static_cast<int64_t>(args.num_local_experts) * max_rows;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_rows; i += step)
        if (i % max_rows >= begins[i / max_rows * (num_ranks + 1) + num_ranks])
            pointer<int32_t>(args.src_info)[i] = -1;
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    epcomm_low_latency_dispatch(const __grid_constant__ LowLatencyDispatchArgs args) {
    extern __shared__ __align__(16) int32_t begins[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, args.slot.operation, call)) return;
    bool good = true, is_last = false;
    uint32_t num_tickets = 0;
    if (args.slot.halves & kSend) {
        const uint32_t reachable = await_room(comm, call, args.slot, shared.reachable);
        good = reachable != 0;
        if (good && !args.slot.is_rejected) {
            if (blockIdx.x == 0) send_choices(args, shared);
            send_rows(args, reachable);
        }
        is_last = is_last_to_tell(comm, call);
        if (is_last && warp_index() == 0) post_words(comm, call, args.slot);
        num_tickets = gridDim.x;
    }
    if (args.slot.halves & kReceive) {
        good = good && await_arrival(comm, call, args.slot, pointer<int64_t>(args.wait_stats), shared.arrival);
        if (good && !args.slot.is_rejected) {
            place_sources(args, shared, begins);
            if (blockIdx.x == 0) write_counts(args, shared.arrival.present, begins);
            receive_rows(args, shared, begins);
        }
        is_last = is_last_to_tell(comm, call, num_tickets);
        if (is_last && warp_index() == 0) acknowledge(comm, call, args.slot);
    }
    if (is_last) end(comm, call, args.slot.halves & kReceive);
}

}  // namespace epcomm
