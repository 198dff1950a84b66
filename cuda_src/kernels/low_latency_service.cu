// low_latency_service.cu: what low-latency calls need beside them: a wait until a combine buffer may be written, the
// masks, and a new start of all slots.
//
// Grid: one warp. Words: reads slot_ack, and writes the own ones at a new start, when no rank runs anything else; see
// sync/slot.cuh.
#include "sync/slot.cuh"

namespace epcomm {

struct LowLatencyServiceArgs {
    Comm comm;
    uint32_t operation;    // wait until all ranks are through with the last call of this slot; 0: do not wait
    uint32_t leaves_late;  // as in SlotArgs
    uint32_t set, clear;   // bit r: mask, or bring back, rank r
    uint64_t masks;        // int32 [num_ranks] or 0, out: 1 for ranks that are masked
    uint64_t sequences;    // uint32 [2 * kNumSlots] or 0, out: of the last calls of all slots
    uint32_t resume[2 * kNumSlots];  // go on as if these had been the last calls, and everybody through with them; or 0
};
static_assert(sizeof(LowLatencyServiceArgs) == sizeof(Comm) + 4 * 4 + 2 * 8 + 16,
              "LowLatencyServiceArgs differs from epcomm/kernels/low_latency_service.py");

extern "C" __global__ void __launch_bounds__(kWarp)
    epcomm_low_latency_service(const __grid_constant__ LowLatencyServiceArgs args) {
    const Comm& comm = args.comm;
    const int lane = lane_index();
    State& state = comm.state();
    ptx::wait_for_earlier_kernels();
    acknowledge(comm);
    __syncwarp();
    // Before a new start: no word of a call before it may come later. The hosts meet behind this kernel.
    if (kHasNetwork && args.sequences != 0 && lane == 0 && poison_of(comm) == 0) drain_network();
    __syncwarp();
    if (args.operation != 0) {
        const int slot = args.operation - kLowLatencyDispatch;
        const uint32_t last = static_cast<uint32_t>(ptx::ld_relaxed_sys(&state.sends[slot]) / kCallUnits);
        const Call call = {static_cast<Operation>(args.operation), last, 0};
        const uint32_t masked = masked_ranks(comm), *acks = comm.own().slot_ack[slot];
        uint32_t late = 0;
        const bool good = wait_for_ranks(
            comm, call, kPhaseAck,
            // ACQUIRE slot_ack[r]. Pairs with the release of acknowledge, there.
            [&](int r) { return (masked >> r & 1) || reached(ptx::ld_acquire_sys(&acks[r]), last); },
            args.leaves_late ? &late : nullptr);
        if (good) mask_late(comm, call, kPhaseAck, late);
        __syncwarp();
    }
    const uint32_t masked = (masked_ranks(comm) | args.set) & ~args.clear;
    __syncwarp();
    if (lane == 0) state.masked = masked;
    for (int i = 0; i < 2 * kNumSlots; ++i) {
        const uint32_t last = args.resume[i];
        if (args.sequences != 0 && lane == 0)
            pointer<uint32_t>(args.sequences)[i] = static_cast<uint32_t>(state.sends[i] / kCallUnits);
        if (last == 0) continue;
        if (lane == 0) {
            state.sends[i] = last * kCallUnits;
            state.received[i] = state.acknowledged[i] = last;
            state.taken_units[i][0] = state.taken_units[i][1] = 0;
        }
        comm.own().slot_ack[i][lane] = last;
    }
    if (args.masks != 0 && lane < comm.num_ranks) pointer<int32_t>(args.masks)[lane] = masked >> lane & 1;
}

}  // namespace epcomm
