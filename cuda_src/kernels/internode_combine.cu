// internode_combine.cu: as combine.cu, over several nodes: the rows of each node are summed and rounded there, and one row
// for a token comes from each of them; then the nodes are added in ascending order.
//
// Grid: num_sms blocks, all resident. The rank of a token knows where all of its rows are, and asks: a message of a few
// bytes to the rank of its rail at each other node says which rows to sum, and that there is room for the answer. So nobody
// keeps anything of the dispatch but the ranks of the tokens, and answers are never held up. Some warps gather, the others
// answer. Nobody leaves before the ranks of its node are done, which protects `x`, and those on its rail, which have its
// answers then.
//
// Ranks whose `x` is outside of their arenas have warps that feed it to those who sum; see internode_combine_feed.cuh.
//
// Regions: reads blocks of the ranks of the own node, writes rings of the ranks on the rail. Words: combine_entry,
// combine_done, and those of the rings; see sync/ring.cuh.
#include "kernels/internode_combine_answer.cuh"
#include "kernels/internode_combine_gather.cuh"

namespace epcomm {

// All threads: the whole work between entry and exit. False: the call has failed, or nothing moves.
__device__ inline bool run(const InternodeCombineArgs& args, const Call& call, Shared& shared, uint8_t* dynamic) {
    if (!enter(args, call, shared)) return false;
    const int warp = warp_index(), num_gathering = args.num_gathering;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp * 2 * kStages;
    Pulled* pulled = reinterpret_cast<Pulled*>(barriers + kStages);
    uint8_t* stages = dynamic + round_up(warps_per_block() * 2 * kStages * sizeof(uint64_t), kUnit) +
                      static_cast<uint64_t>(warp) * kStages * args.stage_bytes;
    PullPipe<kStages> pipe(stages, barriers, pulled, args.stage_bytes);
    const int first_feeding = warps_per_block() - args.num_feeding, num_answering = first_feeding - num_gathering;
    const bool good = warp < num_gathering   ? gather(args, call, shared, pipe, {warp, num_gathering})
                      : warp < first_feeding ? answer(args, call, shared, pipe, {warp - num_gathering, num_answering})
                                             : feed(args, call, shared, {warp - first_feeding, args.num_feeding});
    return __syncthreads_and(good);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    epcomm_internode_combine(const __grid_constant__ InternodeCombineArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const Comm& comm = args.comm;
    Call call;
    if (!begin(comm, kCombine, call)) return;
    const bool good = run(args, call, shared, dynamic);
    if (is_last_block(comm, call)) {
        if (good && warp_index() == 0)
            meet(comm, call, [](Signals& signals) -> uint32_t(&)[kMaxRanks] { return signals.combine_done; },
                 args.nodes.ranks_of(args.nodes.own) | args.nodes.rail());
        if (threadIdx.x == 0) comm.page()->rows_to_nodes[1] = comm.state().rows_to_nodes[1];
        end(comm, call);
    }
}

}  // namespace epcomm
