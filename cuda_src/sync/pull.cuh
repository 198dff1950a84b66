// pull.cuh: a warp's pipe for the pieces of one token's rows: from several places in global memory to shared memory.
//
// All pieces of a stage are under way before the first is read: a pull is bound by latency, not by the links. On sm_80
// there is no such pipe, and kernels load by lanes.
#pragma once

#include "common/types.cuh"
#include "ptx/bulk.cuh"

namespace epcomm {

#if __CUDA_ARCH__ >= 900

// Shared memory of one warp: kStages times a piece from each rank.
template <int kStages> class PullPipe {
  public:
    __device__ PullPipe(uint8_t* shared, uint64_t* barriers, uint32_t* counts, uint32_t piece_bytes, int num_ranks)
        : shared_(shared), barriers_(barriers), counts_(counts), piece_bytes_(piece_bytes),
          stage_bytes_(piece_bytes * num_ranks), num_loaded_(0), num_taken_(0) {
        if (lane_index() < kStages) ptx::mbarrier_init(&barriers_[lane_index()], 1);
        ptx::fence_mbarrier_init();
        __syncwarp();
    }

    // Start loading a piece from each address that is not 0; pieces lie in the order of the lanes.
    __device__ void load(uint64_t address, uint32_t num_bytes) {
        const uint32_t stage = num_loaded_++ % kStages;
        const uint32_t wanted = __ballot_sync(~0u, address != 0);
        if (lane_index() == 0) {
            counts_[stage] = __popc(wanted);
            ptx::mbarrier_arrive_expect_tx(&barriers_[stage], __popc(wanted) * num_bytes);
        }
        __syncwarp();
        const int place = __popc(wanted & ((1u << lane_index()) - 1));
        if (address != 0)
            ptx::bulk_load(shared_ + stage * stage_bytes_ + place * piece_bytes_, pointer<void>(address), num_bytes,
                           &barriers_[stage]);
    }

    // Wait for the oldest pieces; their number.
    __device__ int wait(const uint8_t*& first) {
        const uint32_t stage = num_taken_ % kStages, parity = num_taken_ / kStages & 1;
        ++num_taken_;
        ptx::mbarrier_wait(&barriers_[stage], parity);
        first = shared_ + stage * stage_bytes_;
        return counts_[stage];
    }

    // After the last read of a stage by all lanes, before it is loaded again.
    __device__ void release() {
        ptx::fence_proxy_async_shared();
        __syncwarp();
    }

  private:
    uint8_t* shared_;
    uint64_t* barriers_;
    uint32_t* counts_;
    uint32_t piece_bytes_, stage_bytes_;
    uint32_t num_loaded_, num_taken_;
};

#else

template <int kStages> class PullPipe {
  public:
    __device__ PullPipe(uint8_t*, uint64_t*, uint32_t*, uint32_t, int) {}
};

#endif

// One warp: the first of the rows [first, end), which are sorted by token, whose token is not below `token`.
__device__ inline int lower_bound(const int32_t* tokens, int first, int end, int token) {
    while (first < end) {
        const int step = (end - first + kWarp - 1) / kWarp;
        const int probe = first + lane_index() * step;
        const int below = __popc(__ballot_sync(~0u, probe < end && tokens[min(probe, end - 1)] < token));
        end = min(end, first + below * step);
        if (below > 0) first += (below - 1) * step + 1;
    }
    return first;
}

}  // namespace epcomm
