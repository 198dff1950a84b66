"""Dispatch again with the routing of an earlier call, and dispatch into a declared number of rows.

epcomm run -n 4 -- python examples/03_cached_and_worst_case.py
"""

import sys

import numpy as np

import epcomm
from epcomm import testing

NUM_TOKENS, HIDDEN, NUM_TOPK = 16, 32, 2

with epcomm.Buffer() as buffer:
    rank, num_ranks, num_experts = buffer.rank, buffer.group_size, 2 * buffer.group_size
    first_token = rank * NUM_TOKENS
    x = testing.token_data(NUM_TOKENS, HIDDEN, np.float32, first_token=first_token)
    topk_idx = testing.uniform_routing(NUM_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first_token)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    layout = (per_rank, per_node, in_rank, per_expert)
    recv = buffer.dispatch(x, None, *layout, topk_idx)
    num_rows = len(recv.recv_x)

    # Cached: other data, the same tokens to the same ranks, in the same order. Nothing is counted or exchanged first.
    # A backward pass is this: the gradients of combine's sums go where the rows came from.
    again = buffer.dispatch(2 * x, handle=recv.handle)
    if not np.array_equal(again.recv_x, 2 * recv.recv_x):
        sys.exit(f"rank {rank}: a cached dispatch gave other rows")

    # Worst case: shapes that do not depend on the routing; the same number on all ranks. The rows past the real ones
    # are undefined and marked by -1.
    bounded = buffer.dispatch(x, None, *layout, topk_idx, num_worst_tokens=NUM_TOKENS * num_ranks)
    is_real = (bounded.recv_topk_idx >= 0).any(axis=1)
    if bounded.recv_x.shape != (NUM_TOKENS * num_ranks, HIDDEN) or is_real.sum() != num_rows:
        sys.exit(f"rank {rank}: wrong shape or padding")
    if not np.array_equal(bounded.recv_x[is_real], recv.recv_x):
        sys.exit(f"rank {rank}: num_worst_tokens changed the rows")
    buffer.check()  # nothing was dropped

    # Fewer rows than arrive: the last ones are dropped, and check() says so.
    buffer.dispatch(x, None, *layout, topk_idx, num_worst_tokens=1)
    try:
        buffer.check()
        sys.exit(f"rank {rank}: dropped rows went unnoticed")
    except epcomm.errors.CapacityError as error:
        if rank == 0:
            print(f"{num_ranks} ranks; check: cached and bounded rows are the same; and:\n  {error}")
