// exchange.cu: count a rank's rows, tell all ranks, and learn everything about the dispatch that follows.
//
// Grid: one block of 1024 threads. One hop: every rank writes its counts, its agreed values and its status into a slot
// at every peer; cells carry the sequence, so the data is the flag. Afterwards the device knows who sends how much to
// whom (rank_prefix), where each row stands within (source, destination) (send_pos), and so does the host, which polls
// the tag in its page.
#include "sync/call.cuh"

namespace epcomm {

struct ExchangeArgs {
    Comm comm;
    uint64_t is_token_in_rank;   // bool [num_tokens, num_ranks]
    uint64_t tokens_per_rank;    // int32 [num_ranks], the caller's; compared with the marks
    uint64_t tokens_per_expert;  // int32 [num_experts]
    uint64_t send_pos;           // int32 [num_tokens, num_ranks], out: index within (this rank, destination), or -1
    uint64_t rank_prefix;        // int32 [num_ranks, num_ranks], out: rows that ranks 0..i send to rank j
    uint64_t node_counts;        // int32 [num_nodes], out: zeros, to which the dispatch adds; or 0
    int32_t num_tokens;
    int32_t num_local_experts;
    uint32_t status;  // not 0: this rank rejects its own input
    uint32_t tag;     // for the host
    uint32_t is_awaited;  // by the host
    uint32_t capacity;    // rows that this rank has room for: if all have enough, the dispatch behind this moves them
    uint32_t agreed[kNumAgreed];
    int32_t num_nodes;
    uint32_t unused;
};
static_assert(sizeof(ExchangeArgs) == sizeof(Comm) + 6 * 8 + 6 * 4 + 4 * kNumAgreed + 2 * 4,
              "ExchangeArgs differs from epcomm/kernels/exchange.py");

inline constexpr uint32_t kStatusCounts = 2;  // num_tokens_per_rank contradicts is_token_in_rank

inline constexpr int kThreads = 1024;
inline constexpr int kWarps = kThreads / kWarp;

// Count the marks of each destination and number them. Destinations are split over warps, and the tokens of one
// destination over the warps that remain; a warp looks at 32 tokens at a time.
__device__ inline void number_rows(const ExchangeArgs& args, int (&totals)[kMaxRanks]) {
    __shared__ int counts[kMaxRanks][kWarps];
    const int num_ranks = args.comm.num_ranks, lane = lane_index();
    const int num_parts = kWarps / num_ranks;  // at least 1: there are no more ranks than warps
    const int rank = warp_index() % num_ranks, part = warp_index() / num_ranks;
    const bool is_used = part < num_parts;
    const int groups = (args.num_tokens + kWarp - 1) / kWarp;
    const int first = static_cast<int64_t>(groups) * part / num_parts;
    const int end = static_cast<int64_t>(groups) * (part + 1) / num_parts;
    const uint8_t* marks = pointer<const uint8_t>(args.is_token_in_rank);
    auto is_marked = [&](int group) {
        const int token = group * kWarp + lane;
        return token < args.num_tokens && marks[static_cast<int64_t>(token) * num_ranks + rank] != 0;
    };
    if (is_used) {
        int count = 0;
#pragma unroll 8
        for (int group = first; group < end; ++group) count += __popc(__ballot_sync(~0u, is_marked(group)));
        if (lane == 0) counts[rank][part] = count;
    }
    __syncthreads();
    if (is_used) {
        int next = 0, total = 0;
        for (int other = 0; other < num_parts; ++other) {
            if (other < part) next += counts[rank][other];
            total += counts[rank][other];
        }
        if (part == 0 && lane == 0) totals[rank] = total;
        int32_t* send_pos = pointer<int32_t>(args.send_pos);
#pragma unroll 4
        for (int group = first; group < end; ++group) {
            const bool marked = is_marked(group);
            const uint32_t votes = __ballot_sync(~0u, marked);
            const int token = group * kWarp + lane;
            if (token < args.num_tokens)
                send_pos[static_cast<int64_t>(token) * num_ranks + rank] =
                    marked ? next + __popc(votes & ((1u << lane) - 1)) : -1;
            next += __popc(votes);
        }
    }
    __syncthreads();
}

// Where this rank's cells for `peer` are written: there, or to be sent through the network.
__device__ inline ExchangeCells& cells_for(const Comm& comm, const Call& call, int peer) {
    return is_near(comm, peer) ? comm.of(peer).exchange[call.parity][comm.rank]
                               : comm.workspace(comm.rank)->outgoing[call.parity][peer];
}

// All threads: send what was written to the ranks behind the network.
__device__ inline void send_counts(const ExchangeArgs& args, const Call& call) {
    const Comm& comm = args.comm;
    const uint64_t num_cells = kMaxRanks + kNumAgreed + 2 + args.num_local_experts;  // those of experts are the last
    const uint64_t num_bytes = round_up(num_cells * sizeof(uint64_t), sizeof(Vector));
    __syncthreads();
    for (int peer = warp_index(); peer < comm.num_ranks; peer += warps_per_block()) {
        if (is_near(comm, peer)) continue;
        Signals& own = comm.own();
        // RELEASE the cells, which follow in one message. Pairs with the ACQUIRE of has_posted, there. The message before
        // the last one, which lay here, has arrived: the peer has sent its next one since.
        send_message(comm, peer, reinterpret_cast<uint64_t>(&own.exchange[call.parity][comm.rank]),
                     reinterpret_cast<uint64_t>(&cells_for(comm, call, peer)), num_bytes,
                     &own.counts_there[call.parity][comm.rank], call.sequence);
    }
}

// Write this rank's cells for every rank.
__device__ inline void post_counts(const ExchangeArgs& args, const Call& call, const int (&totals)[kMaxRanks],
                                   uint32_t status) {
    const Comm& comm = args.comm;
    const int num_fixed = comm.num_ranks + kNumAgreed + 2;
    const int num_cells = num_fixed + args.num_local_experts;
    const int32_t* experts = pointer<const int32_t>(args.tokens_per_expert);
    for (int i = threadIdx.x; i < num_cells * comm.num_ranks; i += blockDim.x) {
        const int peer = i / num_cells, cell = i % num_cells;
        ExchangeCells& slot = cells_for(comm, call, peer);
        uint64_t* address;
        uint32_t value;
        if (cell < comm.num_ranks) {
            address = &slot.count[cell];
            value = totals[cell];
        } else if (cell < comm.num_ranks + kNumAgreed) {
            address = &slot.agreed[cell - comm.num_ranks];
            value = args.agreed[cell - comm.num_ranks];
        } else if (cell == comm.num_ranks + kNumAgreed) {
            address = &slot.status;
            value = status;
        } else if (cell < num_fixed) {
            address = &slot.capacity;
            value = args.capacity;
        } else {
            address = &slot.expert[cell - num_fixed];
            value = experts != nullptr ? experts[peer * args.num_local_experts + cell - num_fixed] : 0;
        }
        // Each cell carries its own flag: pairs with the loads of await_cell, at `peer`.
        ptx::st_relaxed_sys(address, tagged(call.sequence, value));
    }
    if (kHasNetwork) send_counts(args, call);
}

// Whether rank r has posted its cells; of one behind the network: whether they are all there.
__device__ inline bool has_posted(const Comm& comm, const Call& call, int r) {
    const Signals& own = comm.own();
    // ACQUIRE the cells of a rank behind the network. Pairs with send_counts, there.
    if (!is_near(comm, r)) return ptx::ld_acquire_sys(&own.counts_there[call.parity][r]) == call.sequence;
    return ptx::ld_relaxed_sys(&own.exchange[call.parity][r].status) >> 32 == call.sequence;
}

// The ranks that have posted nothing yet, a bit each, and `r` among them.
__device__ __noinline__ uint32_t missing_ranks(const Comm& comm, const Call& call, int r) {
    uint32_t missing = 1u << r;
    for (int other = 0; other < comm.num_ranks; ++other)
        if (!has_posted(comm, call, other)) missing |= 1u << other;
    return missing;
}

// One thread waits for one cell of rank `r`.
__device__ inline uint32_t await_cell(const Comm& comm, const Call& call, int r, const uint64_t* cell, bool& good) {
    uint64_t value = 0;
    auto ready = [&] {
        value = ptx::ld_relaxed_sys(cell);
        return value >> 32 == call.sequence;
    };
    good = good && wait_for_rank(comm, call, kPhaseCounts, ready, [&] { return missing_ranks(comm, call, r); });
    return good ? static_cast<uint32_t>(value) : 0;
}

// Collect the cells of all ranks into the host's page; the counts and capacities also into shared memory.
__device__ inline bool collect(const ExchangeArgs& args, const Call& call, int (&counts)[kMaxRanks * kMaxRanks],
                               uint32_t (&capacities)[kMaxRanks], bool& agree) {
    const Comm& comm = args.comm;
    HostPage* page = comm.page();
    const int num_ranks = comm.num_ranks;
    const ExchangeCells* slots = comm.own().exchange[call.parity];
    bool good = true, equal = true;
    if (kHasNetwork) {
        // The bytes of a message may come in any order: its cells are looked at when all are there.
        if (warp_index() == 0)
            good = wait_for_ranks(comm, call, kPhaseCounts, [&](int r) { return has_posted(comm, call, r); });
        good = __syncthreads_and(good);
    }
    for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
        counts[i] = await_cell(comm, call, i / num_ranks, &slots[i / num_ranks].count[i % num_ranks], good);
        page->count[i] = counts[i];
    }
    for (int i = threadIdx.x; i < num_ranks * kNumAgreed; i += blockDim.x) {
        const int r = i / kNumAgreed, at = i % kNumAgreed;
        const uint32_t value = await_cell(comm, call, r, &slots[r].agreed[at], good);
        page->agreed[i] = value;
        equal = equal && value == args.agreed[at];
    }
    for (int r = threadIdx.x; r < num_ranks; r += blockDim.x) {
        const uint32_t status = await_cell(comm, call, r, &slots[r].status, good);
        page->status[r] = status;
        capacities[r] = await_cell(comm, call, r, &slots[r].capacity, good);
        equal = equal && status == 0;
    }
    agree = __syncthreads_and(equal);
    // A rank that rejects its input, or that has another number of experts, does not fill these.
    for (int e = threadIdx.x; agree && e < args.num_local_experts; e += blockDim.x) {
        int sum = 0;
        for (int r = 0; r < num_ranks; ++r) sum += await_cell(comm, call, r, &slots[r].expert[e], good);
        page->expert[e] = sum;
    }
    return __syncthreads_and(good);
}

// All threads: keep why the exchange went wrong, for a host that does not wait for it.
__device__ inline void report_void(const Comm& comm) {
    HostPage* page = comm.page();
    const uint32_t num_before = *const_cast<volatile uint32_t*>(&page->num_voids);
    if (num_before == ptx::ld_relaxed_sys(&page->seen_voids)) {
        for (int i = threadIdx.x; i < comm.num_ranks * kNumAgreed; i += blockDim.x)
            page->void_agreed[i] = page->agreed[i];
        for (int r = threadIdx.x; r < comm.num_ranks; r += blockDim.x) page->void_status[r] = page->status[r];
    }
    ptx::fence_acq_rel_sys();
    __syncthreads();
    // RELEASE void_… -> the host, which reads them when the number has changed.
    if (threadIdx.x == 0) ptx::st_release_sys(&page->num_voids, num_before + 1);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) epcomm_exchange(const __grid_constant__ ExchangeArgs args) {
    __shared__ int totals[kMaxRanks];
    __shared__ int counts[kMaxRanks * kMaxRanks];
    __shared__ uint32_t capacities[kMaxRanks];
    __shared__ uint32_t status;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, kExchange, call)) return;
    if (args.status == 0) {
        number_rows(args, totals);
    } else if (threadIdx.x < kMaxRanks) {
        totals[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) status = args.status;
    if (args.node_counts != 0 && threadIdx.x < args.num_nodes) pointer<int32_t>(args.node_counts)[threadIdx.x] = 0;
    __syncthreads();
    if (args.status == 0 && args.tokens_per_rank != 0 && threadIdx.x < comm.num_ranks &&
        pointer<const int32_t>(args.tokens_per_rank)[threadIdx.x] != totals[threadIdx.x])
        status = kStatusCounts;
    __syncthreads();
    post_counts(args, call, totals, status);
    bool agree = false;
    const bool good = collect(args, call, counts, capacities, agree);
    const int num_ranks = comm.num_ranks;
    bool fits = true;
    if (good && threadIdx.x < num_ranks) {
        int32_t* prefix = pointer<int32_t>(args.rank_prefix);
        const int j = threadIdx.x;
        int sum = 0;
        for (int i = 0; i < num_ranks; ++i) {
            sum += counts[i * num_ranks + j];
            if (prefix != nullptr) prefix[i * num_ranks + j] = sum;
        }
        fits = static_cast<uint32_t>(sum) <= capacities[j];
    }
    fits = __syncthreads_and(fits);
    if (threadIdx.x == 0) {
        comm.state().verdict = comm.page()->verdict = !good || !agree ? kVoid : fits ? kMove : kNoRoom;
        int num_received = 0, num_sent = 0;
        for (int r = 0; r < num_ranks; ++r) {
            num_received += counts[r * num_ranks + comm.rank];
            num_sent += counts[comm.rank * num_ranks + r];
        }
        comm.page()->num_received = num_received;
        comm.page()->num_sent = num_sent;
    }
    if (good && !agree && !args.is_awaited) report_void(comm);
    ptx::fence_acq_rel_sys();  // this thread's part of the host's page, before the tag below
    end(comm, call);
    // RELEASE page -> the host, which polls the tag.
    if (threadIdx.x == 0) ptx::st_release_sys(&comm.page()->tag, args.tag);
}

}  // namespace epcomm
