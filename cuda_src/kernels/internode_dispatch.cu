// internode_dispatch.cu: as dispatch.cu, over several nodes: a row crosses once to each other node, to the rank with the
// local index of its source, and is handed out there.
//
// Grid: num_sms blocks, all resident. Each has warps of four roles, which wait for other ranks only: they send rows, and
// what is beside them, to the own node's outputs and to the rings of other nodes; and they forward what is in this rank's
// rings to the own node's outputs. Ring and words: sync/ring.cuh.
//
// Ranks whose outputs are outside of their arenas have warps of two more roles, which take what is handed over to them; see
// sync/handover.cuh.
//
// Regions: writes outputs of the ranks of the own node, rings of the ranks on the rail; reads the own rings. Words:
// dispatch_entry, dispatch_done, and those of the rings.
#include "kernels/internode_dispatch_beside.cuh"
#include "kernels/internode_dispatch_rows.cuh"

#ifndef KERNEL_STAGES
#define KERNEL_STAGES 2
#endif

namespace epcomm {

inline constexpr int kStages = KERNEL_STAGES;

// One warp in its role. `kHandsOver`: results of some rank of the own node are outside of its arena. Code that is not run
// must not be in the way of the rest.
template <bool kHandsOver>
__device__ __forceinline__ bool play(const InternodeDispatchArgs& args, const Call& call, const Shared& shared,
                                     uint8_t* dynamic) {
    const int num_senders = args.num_senders, num_movers = num_senders + args.num_forwarders;
    const int num_rows = num_movers + args.num_takers, warp = warp_index();
    if (warp < num_rows) {
        uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp * kStages;
        uint8_t* stages = dynamic + round_up(num_rows * kStages * sizeof(uint64_t), kUnit) +
                          static_cast<uint64_t>(warp) * kStages * args.stage_bytes;
        RowPipe<kStages> pipe(stages, barriers, args.stage_bytes);
        if (warp < num_senders) return send_rows<kHandsOver>(args, call, shared, pipe, {warp, num_senders});
        if (warp < num_movers)
            return forward_rows<kHandsOver>(args, call, shared, pipe, {warp - num_senders, args.num_forwarders});
        return !kHandsOver || take_rows(args, call, shared, pipe, {warp - num_movers, args.num_takers});
    }
    if (!args.has_beside()) return true;
    const int role = (warp - num_rows) / kBesideWarps;
    const Share share = {(warp - num_rows) % kBesideWarps, kBesideWarps};
    if (role == 0) return send_beside<kHandsOver>(args, call, shared, share);
    if (role == 1) return forward_beside<kHandsOver>(args, call, shared, share);
    return !kHandsOver || take_beside(args, call, shared, share);
}

// In registers of its own.
__device__ __noinline__ bool play_and_hand_over(const InternodeDispatchArgs& args, Call call, const Shared& shared,
                                                uint8_t* dynamic) {
    return play<true>(args, call, shared, dynamic);
}

// All threads: the whole work between entry and exit. False: the call has failed, or nothing moves.
__device__ inline bool run(const InternodeDispatchArgs& args, const Call& call, Shared& shared, uint8_t* dynamic) {
    if (!enter(args, call, shared)) return false;
    if (args.num_worst_tokens > 0) note_worst_case(args);
    const bool good = shared.windowed == 0 ? play<false>(args, call, shared, dynamic)
                                           : play_and_hand_over(args, call, shared, dynamic);
    return __syncthreads_and(good);
}

extern "C" __global__ void __launch_bounds__(768, 1)
    epcomm_internode_dispatch(const __grid_constant__ InternodeDispatchArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, kDispatch, call)) return;
    // As in dispatch.cu: if the exchange before found that nothing moves, this is no call.
    const bool is_void = !args.is_forced && *const_cast<volatile uint32_t*>(&comm.state().verdict) != kMove;
    const bool good = !is_void && run(args, call, shared, dynamic);
    if (!good && args.num_worst_tokens > 0) pad_topk_idx(args, 0);
    if (is_last_block(comm, call)) {
        if (good && warp_index() == 0)
            meet(comm, call, [](Signals& signals) -> uint32_t(&)[kMaxRanks] { return signals.dispatch_done; },
                 args.nodes.ranks_of(args.nodes.own));
        if (threadIdx.x == 0) comm.page()->rows_to_nodes[0] = comm.state().rows_to_nodes[0];
        end(comm, call, !is_void);
    }
}

}  // namespace epcomm
