// barrier.cu: all ranks reach this point of their streams before any rank leaves it.
//
// Grid: one warp.
#include "sync/call.cuh"

namespace epcomm {

struct BarrierArgs {
    Comm comm;
};
static_assert(sizeof(BarrierArgs) == sizeof(Comm), "BarrierArgs differs from epcomm/kernels/barrier.py");

extern "C" __global__ void __launch_bounds__(kWarp) epcomm_barrier(const __grid_constant__ BarrierArgs args) {
    Call call;
    if (!begin(args.comm, kBarrier, call)) return;
    meet(args.comm, call, [&](Signals& signals) -> uint32_t(&)[kMaxRanks] { return signals.barrier[call.parity]; });
    end(args.comm, call);
}

}  // namespace epcomm
