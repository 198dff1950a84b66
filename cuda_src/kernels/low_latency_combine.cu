// low_latency_combine.cu: bring the experts' rows back to their tokens, and sum them with the tokens' weights.
//
// Grid: num_sms blocks, all resident. Rows that lie anywhere are pushed: their owner writes them, a piece at a time, to
// the slot of the source, at the place of the token's choice, and releases a cell behind each. Rows in a combine buffer,
// which all ranks can address, are pulled: their owner only tells where the rows of a source begin, and the source loads
// them from there. Each owner decides for itself. Either way a warp of the source takes a piece of a token, has the rows
// of all its choices on their way to shared memory at once, and adds them in the order of the choices.
//
// Rows for sources behind the network are always pushed, whole ones, of which the cell of the first piece tells.
//
// LOW_LATENCY_PAYLOAD: rows as they are; or rows in LogFMT, which are always pushed; or, of each owner of a token, the sum of
// its rows. For that the sources send their weights ahead, and an owner waits for those of a message in the send half.
//
// Rows of a slot: [max_tokens, num_topk], those that are pushed; a sum lies at the first choice of its owner. Its cells:
//
//     [ begins: [num_experts], of the owners whose rows are pulled | pieces: [max_tokens, num_topk, num_pieces] |
//       weights: [num_ranks, max_tokens, num_topk], of the choices of all sources, if there are sums ]
//
// Regions: writes slots of all ranks, reads the own one and combine buffers of all ranks. Words: slot_ready, slot_ack,
// which is also what protects a combine buffer; see sync/slot.cuh.
#include "kernels/low_latency_combine_receive.cuh"
#include "kernels/low_latency_combine_send.cuh"

namespace epcomm {

// All threads of all blocks.
__device__ inline void send(const LowLatencyCombineArgs& args, const Call& call, Shared& shared) {
    const uint32_t reachable = shared.opening.reachable;
    if (reachable == 0 || shared.dispatched == 0) return;
    if (kMayPull) send_places(args, call, reachable);
    if (kPayload == kPartialSums) send_weights(args, call, reachable);
    const uint64_t start_ns = kPayload == kPartialSums && args.slot.leaves_late ? ptx::globaltimer_ns() : 0;
    if (kHasNetwork) push_far_messages(args, call, shared, start_ns);  // they take longest
    if (!args.is_pulled) push_messages(args, call, shared, start_ns);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    epcomm_low_latency_combine(const __grid_constant__ LowLatencyCombineArgs args) {
    // Asynchronous copies of 512 bytes take their time where a sector of shared memory begins inside of one: 16% of a call.
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    const SlotArgs& slot = args.slot;
    const uint32_t ring = ptx::shared_address(memory) + warp_index() * kDepth * kColumn + lane_index() * sizeof(Vector);
    int32_t* begins = reinterpret_cast<int32_t*>(memory + kWarps * kDepth * kColumn);  // by expert
    const bool is_server = warp_index() == kServer;
    ptx::wait_for_earlier_kernels();
    if (is_server) open(comm, slot, shared.opening);
    if (warp_index() == 0) number_messages(args, shared);
    if (threadIdx.x == 0) shared.service = kUnderWay;
    // For send_places, by the threads that have something to do there: others of the block wait for memory, too.
    if (args.is_pulled && blockIdx.x < comm.num_ranks && threadIdx.x < args.num_local_experts) ptx::fence_acq_rel_sys();
    __syncthreads();
    if (!shared.opening.is_admitted) return;
    const Call call = {static_cast<Operation>(slot.operation), shared.opening.sequence, 0};
    const Greeting greeting = {shared.dispatched == 0, args.is_pulled != 0};
    if (is_server) introduce(comm, call, slot, shared.opening, greeting);
    if (slot.sends()) send(args, call, shared);
    if (slot.sends() && slot.leaves_late) greet_at_last(comm, call, slot, greeting);
    if (slot.receives()) {
        Units units(comm, call, slot);
        Asked asked;
        if (shared.dispatched != 0) ask(args, units.take(), asked);
        if (is_server) serve(args, call, shared);
        if (await_places(args, call, begins, shared)) sum_tokens(args, call, begins, ring, shared, units, asked);
    }
    if (threadIdx.x == 0) leave(comm, slot);
}

}  // namespace epcomm
