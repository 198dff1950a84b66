// layout.cuh: where everything lies in the memory that ranks share, and in the page that the host reads.
//
// Each rank owns one region that all ranks of its host address:
//
//     [ Workspace | window | arena | low-latency area | rings ]
//
// The workspace holds this file's State and Signals; the window carries rows of arrays that lie outside the arena;
// the arena holds outputs of dispatch and inputs of combine, placed by the host; the low-latency area holds what is on
// its way in low-latency calls, see sync/slot.cuh, and the rings what is on its way between nodes, see sync/ring.cuh.
//
// Where ranks of other nodes are reached through NVSHMEM, words and messages lie in its symmetric heap instead, and the
// region has the rest:
//
//     heap: [ Workspace | low-latency area, and what it sends | rings ]        region: [ arena ]
//
// Twin: epcomm/kernels/layout.py.
#pragma once

#include "common/types.cuh"

namespace epcomm {

inline constexpr int kNumAgreed = 16;       // values of an exchange that must be equal on all ranks
inline constexpr int kNumEntryAgreed = 12;  // and of an entry without one
inline constexpr uint64_t kUnit = 128;      // bytes; offsets in a region travel in units of this, fields start at one

// What a rank says instead of the offset of a block.
inline constexpr uint32_t kThroughWindow = 0xffffffffu;  // my rows are outside of the arena: use the window
inline constexpr uint32_t kRejected = 0xfffffffeu;       // my input is bad: nobody moves anything
inline constexpr uint32_t kNoBlock = 0xfffffffdu;        // this call has no such block
inline constexpr uint32_t kLeftOut = 0xffffffffu;        // of low latency: you are masked here, nothing comes from me

// Operations, each with a sequence of its own that counts its calls. Low-latency ones count by slot: slot s of a
// dispatch is kLowLatencyDispatch + s.
enum Operation : uint32_t {
    kExchange = 0,
    kDispatch = 1,
    kCombine = 2,
    kBarrier = 3,
    kLowLatencyDispatch = 4,
    kLowLatencyCombine = 6,
};
inline constexpr int kNumSlots = 2;  // calls of one low-latency operation that may be under way at once
inline constexpr int kNumOperations = kLowLatencyCombine + kNumSlots;

// Whether the dispatch behind an exchange moves rows; the same on all ranks. If not, it is no call.
enum Verdict : uint32_t {
    kMove = 0,
    kVoid = 1,     // a rank rejected its input, or the ranks disagree
    kNoRoom = 2,   // a rank gets more rows than it has room for: the host makes room and launches another one
};

// What a call adds to a counter, a part by each of its blocks: the quotient counts calls of which all blocks have ended.
inline constexpr uint64_t kCallUnits = 1ull << 20;

// A window is filled and emptied in as many parts.
inline constexpr int kWindowParts = 2;

// What a rank may be waiting for. The names are in epcomm/kernels/layout.py.
enum Phase : uint32_t { kPhaseCounts = 0, kPhaseEntry = 1, kPhaseDone = 2, kPhaseReady = 3, kPhaseAck = 4 };

// Device-private; every rank touches its own only.
struct State {
    uint32_t sequence[kLowLatencyDispatch];  // by Operation, without those of low latency: number of the last call
    uint32_t ticket[kNumOperations];  // by Operation: blocks that have finished the present call
    uint32_t failed;       // the error record is taken
    uint32_t verdict;      // Verdict of the last exchange
    uint32_t filled[2][kWindowParts];  // by Operation - kDispatch: blocks that have filled a part of the windows
    uint32_t taken[2][kWindowParts];   // and that have emptied it
    uint32_t masked;       // bit r: low-latency calls go without rank r
    uint32_t unused;
    uint64_t entries, exits;  // kCallUnits for each kernel that has begun, and that has ended
    // Of low latency, by Operation - kLowLatencyDispatch:
    uint64_t sends[2 * kNumSlots];      // kCallUnits for each send half that has ended
    uint32_t received[2 * kNumSlots];   // sequence of the last receive half that has begun
    uint32_t acknowledged[2 * kNumSlots];  // and of the last one that the peers were told of
    // What block 0 has seen, for the other blocks, where ranks that are late are left out: {sequence << 32 | ranks that
    // are there}, and {sequence << 32 | those of them whose rows are pulled}.
    uint64_t seen[2 * kNumSlots][2];
    // How many units of work have been taken in the receive half, by parity of the sequence: a call uses one counter, and
    // clears the other one for the next call.
    uint32_t taken_units[2 * kNumSlots][2];
    // By Operation - kDispatch, since construction: rows of this rank's tokens that have gone to other nodes, and come back.
    uint64_t rows_to_nodes[2];
    // By Operation - kLowLatencyDispatch: the last call that has not received all that was sent to it; see sync/slot.cuh.
    uint32_t incomplete_call[2 * kNumSlots];
    // Of a combine over several nodes: questions and parts of units that its warps have drawn; the last block clears both.
    uint32_t drawn[2];
    uint32_t unused2[18];
};
static_assert(sizeof(State) == 384);

// One rank's part of an exchange. Cells are {sequence << 32 | value}: the data is the flag.
struct ExchangeCells {
    uint64_t count[kMaxRanks];  // rows to each rank
    uint64_t agreed[kNumAgreed];
    uint64_t status;
    uint64_t capacity;                  // rows that it has room for already
    uint64_t expert[kMaxLocalExperts];  // tokens of the receiver's experts
    uint64_t unused[14];
};

// How a rank enters an operation: cells as above.
struct EntryCells {
    uint64_t rows;        // offset of its block of rows
    uint64_t metadata;    // offset of its block of what travels beside
    uint64_t num_tokens;  // tokens that it sends, or gets back
    uint64_t digest;      // of the values that must be equal on all ranks
};

// Written by peers; the slot [rank] has that rank as its only writer. Words only grow.
struct Signals {
    uint32_t poison;  // 1 + the rank that gave up
    uint32_t unused[31];
    ExchangeCells exchange[2][kMaxRanks];  // by parity of the sequence
    EntryCells dispatch_entry[2][kMaxRanks];
    EntryCells combine_entry[2][kMaxRanks];
    uint32_t dispatch_done[kMaxRanks];
    uint32_t combine_done[kMaxRanks];
    uint32_t barrier[2][kMaxRanks];  // by parity: through a network, a word may come after the next one
    uint64_t window_ready[2][kMaxRanks];  // by Operation - kDispatch: {sequence << 32 | rounds}
    uint64_t window_ack[2][kMaxRanks];
    uint64_t counts_there[2][kMaxRanks];  // by parity: sequence of the exchange of which a rank behind the network has sent all
    // After a mismatch: by 2 * (Operation - kDispatch) + parity, and by Operation for those of low latency.
    uint64_t entry_agreed[kNumOperations][kMaxRanks][kNumEntryAgreed];
    // By Operation - kLowLatencyDispatch: {sequence << 32 | digest, whose last bit says whether rows are to be pulled, or
    // kRejected, or kLeftOut}, and the sequence of the last call of the slot that the rank is through with.
    uint64_t slot_ready[2 * kNumSlots][kMaxRanks];
    uint32_t slot_ack[2 * kNumSlots][kMaxRanks];
};

struct Workspace {
    State state;
    Signals signals;
    ExchangeCells outgoing[2][kMaxRanks];  // by parity: what this rank sends through the network
};

// What this rank's warps choose from for what goes through the network, see transport/peer.cuh. It ends the workspace; the
// host writes it before the first kernel.
inline constexpr int kMaxQueuePairs = 127;
struct QueuePairs {
    uint32_t count;                  // 0: NVSHMEM chooses
    int32_t handle[kMaxQueuePairs];  // of NVSHMEM's host library
};
static_assert(sizeof(QueuePairs) == 512);

inline constexpr uint64_t kWorkspaceBytes = 2ull << 20;
inline constexpr uint64_t kQueuePairsOffset = kWorkspaceBytes - sizeof(QueuePairs);
static_assert(sizeof(Workspace) <= kQueuePairsOffset);

// Why a call did not do its work.
enum ErrorKind : uint32_t { kNoError = 0, kTimeout = 1, kPoisoned = 2, kAborted = 3, kConcurrent = 4, kBadOffset = 5 };

// Host memory that the device writes, but for the words that the host is said to write: each word has one writer. Twin:
// epcomm/kernels/layout.py.
struct HostPage {
    uint32_t error_kind;  // ErrorKind; written last
    uint32_t operation;
    uint32_t sequence;
    uint32_t phase;
    uint32_t awaited;  // bit r: rank r
    uint32_t elapsed_us;
    uint32_t abort;    // written by the host: stop waiting
    uint32_t dropped;  // rows that did not fit into num_worst_tokens, since construction
    uint32_t num_mismatches;   // entries that disagreed, since construction; `mismatch` and its operation tell of the
    uint32_t seen_mismatches;  // first that the host has not seen: it writes this
    uint32_t mismatch_operation;
    uint32_t num_voids;   // exchanges that the host does not wait for, and that went wrong; `void_…` tell why, of the
    uint32_t seen_voids;  // first that the host has not seen: it writes this
    uint32_t num_left_behind;  // low-latency calls in which peers were ahead of this rank, since construction
    uint32_t other_choices;    // number of the last low-latency combine whose topk_idx was not that of its dispatch
    uint32_t unused[17];
    uint32_t tag;           // of the exchange whose result follows; written last
    uint32_t verdict;       // Verdict
    uint32_t num_received;  // rows for this rank
    uint32_t num_sent;      // and from it
    uint64_t rows_to_nodes[2];  // as in State, after the last call
    uint32_t unused2[24];
    int32_t count[kMaxRanks * kMaxRanks];  // [source * num_ranks + destination]
    uint32_t agreed[kMaxRanks * kNumAgreed];
    uint32_t status[kMaxRanks];
    int32_t expert[kMaxLocalExperts];
    uint32_t num_rejections[kMaxRanks];  // calls without exchange of which this rank rejected its input
    uint32_t mismatch[kMaxRanks * kNumEntryAgreed];
    uint32_t void_agreed[kMaxRanks * kNumAgreed];
    uint32_t void_status[kMaxRanks];
};
static_assert(sizeof(HostPage) == 256 + 4096 + 2048 + 128 + 4096 + 128 + 1536 + 2048 + 128);

// Offsets of the fields in a received block of metadata of `num_rows` rows.
struct MetadataLayout {
    uint64_t topk_idx, topk_weights, num_bytes;
    __host__ __device__ MetadataLayout(uint64_t num_rows, uint32_t num_topk, uint32_t index_bytes, bool has_weights) {
        topk_idx = round_up(num_rows * 4, kUnit);  // source indices come first
        topk_weights = topk_idx + round_up(num_rows * num_topk * index_bytes, kUnit);
        num_bytes = topk_weights + (has_weights ? num_rows * num_topk * 4 : 0);
    }
};

// Offset of the scales behind `num_rows` received rows.
__host__ __device__ inline uint64_t scales_offset(uint64_t num_rows, uint64_t row_bytes) {
    return round_up(num_rows * row_bytes, kUnit);
}

// What every kernel knows of the job.
struct Comm {
    uint64_t region[kMaxRanks];   // by rank: address of its region in this process; 0: there is none here
    uint64_t control[kMaxRanks];  // likewise, of its words and messages: the region itself, or a part of the symmetric heap
    uint16_t pe[kMaxRanks];       // by rank: its number in NVSHMEM, if that is there
    uint64_t host;                // HostPage
    uint64_t region_bytes;
    uint64_t timeout_ns;
    int32_t rank;
    int32_t num_ranks;

    __device__ Workspace* workspace(int r) const { return pointer<Workspace>(control[r]); }
    __device__ State& state() const { return workspace(rank)->state; }
    __device__ Signals& own() const { return workspace(rank)->signals; }
    __device__ const QueuePairs& queue_pairs() const { return *pointer<QueuePairs>(control[rank] + kQueuePairsOffset); }
    __device__ Signals& of(int r) const { return workspace(r)->signals; }
    __device__ HostPage* page() const { return pointer<HostPage>(host); }
};
static_assert(sizeof(Comm) == 608);

__host__ __device__ inline uint64_t tagged(uint32_t sequence, uint32_t value) {
    return static_cast<uint64_t>(sequence) << 32 | value;
}

}  // namespace epcomm
