// internode_combine.cu: as combine.cu, over several nodes: the rows of each node are summed and rounded there, and one row
// for a token comes from each of them; then the nodes are added in ascending order.
//
// Grid: num_sms blocks, all resident. The rank of a token knows where all of its rows are, and asks: a message of a few
// bytes to the rank of its rail at each other node says which rows to sum, and that there is room for the answer. So nobody
// keeps anything of the dispatch but the ranks of the tokens, and answers are never held up. Every warp asks, answers and
// gathers, whichever can go on. Nobody leaves before the ranks of its node are done, which protects `x`, and those on its
// rail, which have its answers then.
//
// Ranks whose `x` is outside of their arenas have warps that feed it to those who sum; see internode_combine_feed.cuh.
//
// Regions: reads blocks of the ranks of the own node, writes rings of the ranks on the rail, and reads theirs in front of the
// network, if loads reach them. Words: combine_entry, combine_done, and those of the rings; see sync/ring.cuh.
#include "kernels/internode_combine_answer.cuh"
#include "kernels/internode_combine_gather.cuh"

namespace epcomm {

enum Turn : int { kAnswers = 1, kGathers = 2 };

// One warp: answer questions and gather parts of units, each in ascending order, and never wait for one while the other can go
// on: whatever is left of the lowest unit of all ranks can. Who asks waits for answers, so these come first. (With half of the
// warps for each, all answers took 80 % of the time, and who gathers had to wait for the first of them.) All warps of the rank
// draw from the same, so that they come to their end together. False: the call has failed.
template <bool kHasFed>
__device__ inline bool take_turns(const InternodeCombineArgs& args, const Call& call, Shared& shared,
                                  PullPipe<kStages>& pipe, uint32_t num_summing) {
    const Comm& comm = args.comm;
    const Destination to(args);
    const uint32_t num_groups = args.asked.num_groups;
    const uint32_t num_units = args.asked.num_units(args.entry.num_tokens), num_parts = parts_of(args.asked);
    for (uint32_t unit = blockIdx.x + warp_index() * gridDim.x; unit < min(num_groups, num_units);
         unit += gridDim.x * num_summing)
        ask(args, call, shared, to, unit);
    Incoming<Drawn> question(args.nodes, shared.entries, args.asked, {&comm.state().drawn[0]});
    Drawn parts = {&comm.state().drawn[1]};
    uint32_t part = parts.draw();
    auto can = [&](uint32_t awaited, uint32_t& all_awaited) {
        all_awaited |= awaited;
        return __all_sync(~0u, awaited == 0);
    };
    auto awaited_fed = [&](int source, uint32_t unit) {
        return kHasFed ? Feeding(args, shared, source, unit).awaited(call, unit) : 0;
    };
    auto fed = [&](int source, uint32_t unit) {
        return kHasFed ? Feeding(args, shared, source, unit).find(source, unit) : Fed();
    };
    for (;;) {
        const uint32_t unit = part / num_parts;
        if (unit >= num_units && !question.is_any()) return true;
        auto choose = [&](uint32_t& awaited) -> int {
            if (question.is_any() && can(awaited_question(args, call, question.node, question.unit) |
                                             awaited_fed(args.nodes.on_rail(question.node), question.unit),
                                         awaited))
                return kAnswers;
            const bool is_there = unit < num_units && can(awaited_answers(args, call, to, unit) |
                                                              awaited_fed(comm.rank, unit),
                                                          awaited);
            return is_there ? kGathers : 0;
        };
        const int turn = wait_for_choice(comm, call, kPhaseReady, choose);
        if (turn == 0) return false;
        share_acquired();
        if (turn == kAnswers) {
            const Fed rows = fed(args.nodes.on_rail(question.node), question.unit);
            answer_unit(args, call, shared, pipe, rows, question.node, question.unit);
            if (kHasFed) note_fed(call, rows, question.unit);
            question.advance();
        } else {
            const Fed rows = fed(comm.rank, unit);
            gather_part(args, shared, pipe, to, rows, unit, part % num_parts);
            const bool is_asked_again = unit + num_groups < num_units;
            if ((is_asked_again || kHasFed) && ends_unit(args, unit)) {
                if (kHasFed) note_fed(call, rows, unit);
                if (is_asked_again) ask(args, call, shared, to, unit + num_groups);
            }
            part = parts.draw();
        }
    }
}

// All threads: the whole work between entry and exit. False: the call has failed, or nothing moves.
__device__ inline bool run(const InternodeCombineArgs& args, const Call& call, Shared& shared, uint8_t* dynamic) {
    if (!enter(args, call, shared)) return false;
    const int warp = warp_index(), num_summing = warps_per_block() - args.num_feeding;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp * 2 * kStages;
    Pulled* pulled = reinterpret_cast<Pulled*>(barriers + kStages);
    uint8_t* stages = dynamic + round_up(warps_per_block() * 2 * kStages * sizeof(uint64_t), kUnit) +
                      static_cast<uint64_t>(warp) * kStages * args.stage_bytes;
    PullPipe<kStages> pipe(stages, barriers, pulled, args.stage_bytes);
    // Code that is not run must not be in the way of the rest.
    const bool good = warp >= num_summing    ? feed(args, call, shared, {warp - num_summing, args.num_feeding})
                      : shared.windowed == 0 ? take_turns<false>(args, call, shared, pipe, num_summing)
                                             : take_turns<true>(args, call, shared, pipe, num_summing);
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
        if (threadIdx.x == 0) {
            comm.page()->rows_to_nodes[1] = comm.state().rows_to_nodes[1];
            comm.state().drawn[0] = comm.state().drawn[1] = 0;
        }
        end(comm, call);
    }
}

}  // namespace epcomm
