"""Send every row to the ranks that own its experts, and bring the results back.

epcomm run -n 4 -- python examples/01_hello_numpy.py
"""

import sys

import numpy as np

import epcomm

with epcomm.Buffer() as buffer:  # all ranks of the job
    rank, num_ranks = buffer.rank, buffer.group_size
    num_tokens, hidden, num_experts = 8, 64, 4 * num_ranks  # 4 experts a rank

    # Token t of this rank wants experts 3t and 3t + 2.
    x = np.full((num_tokens, hidden), rank + 1, np.float32)
    topk_idx = (3 * np.arange(num_tokens)[:, None] + np.array([0, 2])) % num_experts

    layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv = buffer.dispatch(
        x,
        num_tokens_per_rank=layout.num_tokens_per_rank,
        num_tokens_per_rdma_rank=layout.num_tokens_per_rdma_rank,
        is_token_in_rank=layout.is_token_in_rank,
        num_tokens_per_expert=layout.num_tokens_per_expert,
        topk_idx=topk_idx,
    )
    y = 10 * recv.recv_x  # this rank's experts
    out = buffer.combine(y, recv.handle).combined_x

    # A token comes back once from each rank that it went to, and these rows are summed.
    num_visited = layout.is_token_in_rank.sum(axis=1, keepdims=True)
    if not np.array_equal(out, 10 * x * num_visited):
        sys.exit(f"rank {rank}: wrong sums")
    if rank == 0:
        print(f"{num_ranks} ranks; rank 0 received {len(recv.recv_x)} rows; check: sums are exact")
