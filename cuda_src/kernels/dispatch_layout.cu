// dispatch_layout.cu: count and mark the destinations of a rank's tokens.
//
// Local: touches no memory of a peer and waits for nobody. Grid: any number of blocks, a thread a token; counts are made
// in shared memory, written as one partial result a block, and added up by the block that finishes last. Sums of
// integers, so the order does not matter.
#include "common/types.cuh"
#include "ptx/memory.cuh"

namespace epcomm {

struct LayoutArgs {
    uint64_t topk_idx;          // int32 or int64 [num_tokens, num_topk]
    uint64_t tokens_per_rank;   // int32 [num_ranks]
    uint64_t tokens_per_node;   // int32 [num_nodes], or 0
    uint64_t tokens_per_expert;  // int32 [num_experts]
    uint64_t is_token_in_rank;  // bool [num_tokens, num_ranks]
    uint64_t partial;           // int32 [blocks, num_counts], scratch
    uint64_t ticket;            // uint32, 0 between calls
    int32_t num_tokens, num_topk, index_bytes, num_experts, num_ranks, ranks_per_node;
};
static_assert(sizeof(LayoutArgs) == 80, "LayoutArgs differs from epcomm/kernels/dispatch_layout.py");

__device__ inline int64_t load_index(const LayoutArgs& args, int64_t at) {
    return args.index_bytes == 8 ? pointer<const int64_t>(args.topk_idx)[at]
                                 : pointer<const int32_t>(args.topk_idx)[at];
}

// One thread: the marks of one token, and its part in the counts [experts | ranks | nodes].
__device__ inline void count_token(const LayoutArgs& args, int token, int* counts) {
    const int experts_per_rank = args.num_experts / args.num_ranks;
    uint8_t* marks = pointer<uint8_t>(args.is_token_in_rank) + static_cast<int64_t>(token) * args.num_ranks;
    uint32_t ranks = 0, nodes = 0;  // of the first 32; more are looked up in the marks
    for (int r = 0; r < args.num_ranks; ++r) marks[r] = 0;
    for (int k = 0; k < args.num_topk; ++k) {
        const int64_t expert = load_index(args, static_cast<int64_t>(token) * args.num_topk + k);
        if (expert < 0 || expert >= args.num_experts) continue;
        atomicAdd(&counts[expert], 1);
        const int r = static_cast<int>(expert) / experts_per_rank;
        const bool is_new = r < 32 ? !(ranks >> r & 1) : !marks[r];
        if (!is_new) continue;
        if (r < 32) ranks |= 1u << r;
        marks[r] = 1;
        atomicAdd(&counts[args.num_experts + r], 1);
        if (args.tokens_per_node == 0) continue;
        const int node = r / args.ranks_per_node;
        bool is_new_node = true;
        if (node < 32) {
            is_new_node = !(nodes >> node & 1);
            nodes |= 1u << node;
        } else {
            for (int other = node * args.ranks_per_node; other < (node + 1) * args.ranks_per_node; ++other)
                is_new_node = is_new_node && (other == r || !marks[other]);
        }
        if (is_new_node) atomicAdd(&counts[args.num_experts + args.num_ranks + node], 1);
    }
}

__device__ inline void write_count(const LayoutArgs& args, int at, int value) {
    if (at < args.num_experts) {
        pointer<int32_t>(args.tokens_per_expert)[at] = value;
    } else if (at < args.num_experts + args.num_ranks) {
        pointer<int32_t>(args.tokens_per_rank)[at - args.num_experts] = value;
    } else {
        pointer<int32_t>(args.tokens_per_node)[at - args.num_experts - args.num_ranks] = value;
    }
}

extern "C" __global__ void __launch_bounds__(256) epcomm_dispatch_layout(const __grid_constant__ LayoutArgs args) {
    extern __shared__ int counts[];
    __shared__ bool last;
    const int num_nodes = args.tokens_per_node ? args.num_ranks / args.ranks_per_node : 0;
    const int num_counts = args.num_experts + args.num_ranks + num_nodes;
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    for (int token = blockIdx.x * blockDim.x + threadIdx.x; token < args.num_tokens; token += gridDim.x * blockDim.x)
        count_token(args, token, counts);
    __syncthreads();
    int32_t* partial = pointer<int32_t>(args.partial);
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
        if (gridDim.x == 1) {
            write_count(args, i, counts[i]);
        } else {
            partial[static_cast<int64_t>(blockIdx.x) * num_counts + i] = counts[i];
        }
    }
    if (gridDim.x == 1) return;
    __threadfence();
    __syncthreads();
    // RELEASE partial of this block; the last block's ticket ACQUIREs those of all.
    if (threadIdx.x == 0)
        last = ptx::atom_add_acq_rel_gpu(pointer<uint32_t>(args.ticket), 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
        int sum = 0;
        for (int block = 0; block < gridDim.x; ++block)
            sum += *const_cast<volatile int32_t*>(&partial[static_cast<int64_t>(block) * num_counts + i]);
        write_count(args, i, sum);
    }
    if (threadIdx.x == 0) *pointer<uint32_t>(args.ticket) = 0;
}

}  // namespace epcomm
