// network_probe.cu: do puts and signals of NVSHMEM work between these ranks, and how long does a message take?
//
// The ranks form a ring. In each round a rank sends a message to the next one, which answers as soon as the signal is
// there, and then compares every word. Messages go to two areas in turn, so that the next one may come meanwhile: a
// rank answers a round after it has compared the one before.
//
// Grid: one block. Every wait ends after `timeout_ns`; what went wrong is in the report.
#include "ptx/memory.cuh"
#include "transport/nvshmem.cuh"

namespace epcomm {

// In the symmetric heap; each word has one writer, and only grows.
struct NetworkProbeCells {
    uint64_t arrived;  // written by the previous rank with its message: number of the round
    uint64_t word;     // written by the next rank before its answer: the same
    uint64_t answer;   // written by the next rank: the same
    uint64_t unused[13];
};
static_assert(sizeof(NetworkProbeCells) == 128, "NetworkProbeCells differs from epcomm/kernels/network_probe.py");

enum NetworkProbeError : uint32_t { kProbeGood = 0, kProbeNoMessage = 1, kProbeNoAnswer = 2, kProbeLateWord = 3 };

struct NetworkProbeReport {
    uint32_t error;      // NetworkProbeError
    uint32_t num_done;   // rounds
    uint32_t num_wrong;  // words that did not arrive as they were sent
    int32_t awaited_pe;  // with an error: who should have written
};
static_assert(sizeof(NetworkProbeReport) == 16, "NetworkProbeReport differs from epcomm/kernels/network_probe.py");

struct NetworkProbeArgs {
    uint64_t receive;     // symmetric: two areas
    uint64_t send;        // symmetric: num_bytes
    uint64_t cells;       // symmetric: NetworkProbeCells
    uint64_t report;      // NetworkProbeReport, on this GPU
    uint64_t elapsed_ns;  // by round, on this GPU: from the put until the answer
    uint64_t area_bytes;  // the same in all launches, so that a message never comes where an earlier one is compared
    uint64_t num_bytes;   // a multiple of 16, at most area_bytes
    uint64_t timeout_ns;
    uint64_t first;       // number of the first round: one more than that of the last round before, in these cells
    uint32_t num_rounds;
    int32_t rank, previous_rank;      // in the ring
    int32_t next_pe, previous_pe;
    uint32_t by_block;  // the whole block sends, or one warp
};
static_assert(sizeof(NetworkProbeArgs) == 96, "NetworkProbeArgs differs from epcomm/kernels/network_probe.py");

// Twin: `pattern` of epcomm/kernels/network_probe.py.
__device__ inline uint64_t pattern(uint64_t index, uint64_t round, int rank) {
    return (index + 1) * 0x9e3779b97f4a7c15ull ^ (round << 16 | static_cast<uint64_t>(rank));
}

// One thread: answer the previous rank's message and wait for the next one's answer, whichever comes first.
__device__ NetworkProbeError exchange(const NetworkProbeArgs& args, uint64_t round, uint64_t start_ns,
                                      uint64_t& elapsed_ns) {
    auto* cells = pointer<NetworkProbeCells>(args.cells);
    bool has_message = false, has_answer = false;
    while (!has_message || !has_answer) {
        // ACQUIRE of the signals that put_signal and set_signal deliver.
        if (!has_message && ptx::ld_acquire_sys(&cells->arrived) >= round) {
            has_message = true;
            nvshmem::put_word(&cells->word, round, args.previous_pe);
            nvshmem::fence();  // the word before the answer; and the block has compared the last message
            nvshmem::set_signal(&cells->answer, round, args.previous_pe);
        }
        const uint64_t now_ns = ptx::globaltimer_ns();
        if (!has_answer && ptx::ld_acquire_sys(&cells->answer) >= round) {
            has_answer = true;
            elapsed_ns = now_ns - start_ns;
            if (ptx::ld_acquire_sys(&cells->word) != round) return kProbeLateWord;
        }
        if (now_ns - start_ns > args.timeout_ns) break;
    }
    return !has_message ? kProbeNoMessage : !has_answer ? kProbeNoAnswer : kProbeGood;
}

// All threads: how many words of the message differ from what the previous rank sent.
__device__ void compare(const NetworkProbeArgs& args, uint64_t round, NetworkProbeReport* report) {
    const uint64_t* received = pointer<uint64_t>(args.receive + round % 2 * args.area_bytes);
    uint32_t num_wrong = 0;
    for (uint64_t i = threadIdx.x; i < args.num_bytes / 8; i += blockDim.x) {
        num_wrong += received[i] != pattern(i, round, args.previous_rank);
    }
    if (num_wrong != 0) atomicAdd(&report->num_wrong, num_wrong);
}

extern "C" __global__ void __launch_bounds__(256) epcomm_network_probe(const __grid_constant__ NetworkProbeArgs args) {
    __shared__ uint32_t error;
    auto* cells = pointer<NetworkProbeCells>(args.cells);
    auto* report = pointer<NetworkProbeReport>(args.report);
    uint64_t* send = pointer<uint64_t>(args.send);
    if (threadIdx.x == 0) *report = {kProbeGood, 0, 0, -1};
    for (uint64_t round = args.first; round < args.first + args.num_rounds; ++round) {
        // The last message has arrived, or there was none: the next rank has answered.
        for (uint64_t i = threadIdx.x; i < args.num_bytes / 8; i += blockDim.x) send[i] = pattern(i, round, args.rank);
        __syncthreads();
        const uint64_t start_ns = ptx::globaltimer_ns();
        void* to = pointer<void>(args.receive + round % 2 * args.area_bytes);
        if (args.by_block) {
            nvshmem::put_signal_block(to, send, args.num_bytes, &cells->arrived, round, args.next_pe);
        } else if (warp_index() == 0) {
            nvshmem::put_signal(to, send, args.num_bytes, &cells->arrived, round, args.next_pe);
        }
        if (threadIdx.x == 0) {
            uint64_t elapsed_ns = 0;
            error = exchange(args, round, start_ns, elapsed_ns);
            pointer<uint64_t>(args.elapsed_ns)[round - args.first] = elapsed_ns;
        }
        __syncthreads();
        if (error != kProbeGood) {
            if (threadIdx.x == 0) {
                report->error = error;
                report->awaited_pe = error == kProbeNoMessage ? args.previous_pe : args.next_pe;
            }
            return;
        }
        compare(args, round, report);
        if (threadIdx.x == 0) ++report->num_done;
    }
    // All messages have been answered, and this rank's last answer is on its way.
    if (threadIdx.x == 0) nvshmem::quiet();
}

}  // namespace epcomm
