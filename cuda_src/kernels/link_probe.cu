// link_probe.cu: rows of one rank to or from all others, moved as dispatch moves them, and nothing else: what is left of a
// link for some SMs. Waits for nobody.
//
// Grid: any number of blocks. Warps take rows in turn; row i goes to slot i of a peer that is drawn from its number, or
// comes from there.
//
// Regions: writes, or reads, the given ones of all other ranks.
#include "common/layout.cuh"
#include "sync/rows.cuh"

#ifndef KERNEL_STAGES
#define KERNEL_STAGES 2
#endif

namespace epcomm {

struct LinkProbeArgs {
    uint64_t region[kMaxRanks];  // by rank: [num_rows, row_bytes]
    uint64_t own;                // this rank's rows that go there, or where those that come from there go
    Pieces pieces;
    int32_t num_rows, rank, num_ranks, is_reading;
    uint32_t unused;
};
static_assert(sizeof(LinkProbeArgs) == 8 * kMaxRanks + 40, "LinkProbeArgs differs from epcomm/kernels/link_probe.py");

// As in epcomm/kernels/link_probe.py: by turns all warps of some grids would take the same peer always.
__device__ inline int peer_of(const LinkProbeArgs& args, int row) {
    const uint32_t draw = (static_cast<uint32_t>(row) * 2654435761u) >> 16;
    return (args.rank + 1 + draw % (args.num_ranks - 1)) % args.num_ranks;
}

extern "C" __global__ void __launch_bounds__(512, 1) epcomm_link_probe(const __grid_constant__ LinkProbeArgs args) {
    constexpr int kStages = KERNEL_STAGES;
    extern __shared__ __align__(128) uint8_t dynamic[];
    uint64_t* barriers = reinterpret_cast<uint64_t*>(dynamic) + warp_index() * kStages;
    uint8_t* stages = dynamic + round_up(warps_per_block() * kStages * sizeof(uint64_t), kUnit) +
                      static_cast<uint64_t>(warp_index()) * kStages * args.pieces.piece_bytes;
    RowPipe<kStages> pipe(stages, barriers, args.pieces.piece_bytes);
    auto there = [&](int row) {
        return args.region[peer_of(args, row)] + static_cast<uint64_t>(row) * args.pieces.row_bytes;
    };
    auto here = [&](int row) { return args.own + static_cast<uint64_t>(row) * args.pieces.row_bytes; };
    auto source = [&](int row) { return pointer<const uint8_t>(args.is_reading ? there(row) : here(row)); };
    auto destination = [&](int row) -> uint64_t {
        if (lane_index() != 0) return 0;
        return args.is_reading ? here(row) : there(row);
    };
    move_rows(pipe, args.pieces, blockIdx.x + warp_index() * gridDim.x, args.num_rows, gridDim.x * warps_per_block(),
              source, destination);
    pipe.finish();
}

}  // namespace epcomm
