// low_latency_dispatch.cu: send each token once to every rank that owns one of its experts, and give every expert its
// rows there, by source rank, then token.
//
// Grid: num_sms blocks, all resident. LOW_LATENCY_FP8: rows travel as fp8 with their scales behind them, else as they are.
// Counts and headers go ahead of the rows, in cells of their own: a header names the token, and for each of its choices
// there the expert and the row, counted among the rows that this source has for it. The counts of all sources give the
// first row of each of them at every expert, so that every piece has a place before it arrives.
//
// A slot has a lane for each source. Of rows: one for each message, at multiples of `row_stride`. Of cells, by message:
//
//     [ counts: of each local expert, and of messages | headers: [max_tokens, 1 + num_topk] |
//       pieces: [max_tokens, num_pieces] ]
//
// Owners behind the network get whole rows, of which the cell of the first piece tells.
//
// Regions: writes slots of all ranks, reads the own one. Words: slot_ready, slot_ack; see sync/slot.cuh.
#include "kernels/low_latency_dispatch_receive.cuh"
#include "kernels/low_latency_dispatch_send.cuh"

namespace epcomm {

__device__ inline Chunk chunk_at(const LowLatencyDispatchArgs& args, int first) {
    return {first, min(args.num_tokens - first, 32 * args.num_words)};
}

// All senders: everything before the first barrier. What depends on nothing is on its way first; choices before rows,
// which take longer.
__device__ inline void prepare(const LowLatencyDispatchArgs& args, const Tables& tables, Values& values,
                               Shared& shared) {
    EarlyChoices early;
    early.ask(args, 0);
    clear_bits(args, tables, shared);
#pragma unroll 1
    for (int i = threadIdx.x; i < tables.num_rows; i += kSenders) tables.before[i] = 0;
    sync_senders();
    const Unit unit = unit_at(args, warp_index());
    if (unit.token < args.num_tokens) load_piece(args, unit.token, unit.piece, values);
    fill_tables(args, tables, chunk_at(args, 0), early);
}

// All senders. `values`: the first piece of this warp.
__device__ inline void send(const LowLatencyDispatchArgs& args, const Call& call, const Tables& tables, Values& values,
                            Shared& shared) {
    const uint32_t reachable = shared.opening.reachable;
    if (reachable == 0) return;
    Chunk chunk = chunk_at(args, 0);
#pragma unroll 1
    for (bool is_loaded = true;; is_loaded = false) {
        const bool is_last = chunk.first + chunk.count == args.num_tokens;
        if (is_last) send_counts(args, tables, call, reachable);
        if (kHasNetwork) send_far_rows(args, tables, call, reachable, chunk);  // they take longest
        send_units(args, tables, call, reachable, chunk, unit_at(args, warp_index()), is_loaded, values, shared);
        if (is_last) return;
        chunk = chunk_at(args, chunk.first + chunk.count);
        go_to_chunk(args, tables, chunk, shared);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    epcomm_low_latency_dispatch(const __grid_constant__ LowLatencyDispatchArgs args) {
    extern __shared__ __align__(16) uint32_t memory[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    const SlotArgs& slot = args.slot;
    const Tables tables(args, memory);
    const bool is_server = warp_index() == kServer, is_sending = slot.sends() && !slot.is_rejected && !is_server;
    Values values;
    ptx::wait_for_earlier_kernels();
    if (is_server) open(comm, slot, shared.opening);
    if (is_sending) prepare(args, tables, values, shared);
    if (threadIdx.x == 0) shared.service = kUnderWay;
    __syncthreads();
    if (!shared.opening.is_admitted) {
        if (slot.receives()) write_nothing(args);
        return;
    }
    const Call call = {static_cast<Operation>(slot.operation), shared.opening.sequence, 0};
    const Greeting greeting = {slot.is_rejected != 0, false};
    if (is_server) introduce(comm, call, slot, shared.opening, greeting);
    if (is_sending) send(args, call, tables, values, shared);
    if (slot.sends() && slot.leaves_late) greet_at_last(comm, call, slot, greeting);
    if (slot.receives()) {
        if (is_server) serve(args, call, tables, shared);
        Units units(comm, call, slot);  // behind it: what a server takes waits for it
        if (is_served(shared.service)) {
            receive(args, call, tables, shared, units);
        } else {
            write_nothing(args);
        }
    }
    if (threadIdx.x == 0) leave(comm, slot);
}

}  // namespace epcomm
