// launch.cuh: kernels of a stream that overlap (programmatic dependent launch, since sm_90).
#pragma once

namespace epcomm::ptx {

// All threads, before they touch memory: until the kernels before this one in its stream are through, and what they have
// written is visible. Where launches do not overlap that is so already; see epcomm/jit/overlap.py.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace epcomm::ptx
