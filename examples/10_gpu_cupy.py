"""The same on GPUs, with CuPy arrays: outputs lie in memory that the peers write, and nothing is copied.

epcomm run -n 4 --mps -- python examples/10_gpu_cupy.py
"""

import sys

import cupy as cp

import epcomm
from epcomm import testing

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL = 1024, 2048, 4, 8

# The arena: room for what dispatch delivers, for as long as you hold it. Without room all works, but slower.
with epcomm.Buffer(num_nvl_bytes=256 << 20, backend="cuda") as buffer, cp.cuda.Stream(non_blocking=True):
    rank, num_experts, first_token = buffer.rank, NUM_LOCAL * buffer.group_size, buffer.rank * NUM_TOKENS
    x = cp.asarray(testing.token_data(NUM_TOKENS, HIDDEN, "float32", first_token=first_token))
    topk_idx = cp.asarray(testing.uniform_routing(NUM_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first_token))

    # All of it runs in CuPy's current stream; only dispatch waits on the host, for the number of rows.
    layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv = buffer.dispatch(x, topk_idx=topk_idx, **layout.arguments())
    y = buffer.get_combine_buffer(recv.handle, x.dtype)  # experts that write here save combine a copy
    cp.multiply(recv.recv_x, 2, out=y)
    out = buffer.combine(y, recv.handle).combined_x

    # The routing again, for other rows: nothing is counted, and the host waits for nothing.
    again = buffer.dispatch(2 * x, handle=recv.handle).recv_x

    num_visited = layout.is_token_in_rank.sum(axis=1, keepdims=True)
    # Copies of a row are added one by one; up to 4 of them are exact but for the last bit or two.
    if not cp.allclose(out, 2 * x * num_visited, rtol=1e-6, atol=0) or not (again == y).all():
        sys.exit(f"rank {rank}: wrong rows")
    if rank == 0:
        in_arena, by_window = buffer.stats["dispatch_in_arena"], buffer.stats["dispatch_by_window"]
        print(f"{buffer.group_size} ranks; {in_arena} dispatches into the arena, {by_window} through the window")
        print(f"rank 0 received {len(recv.recv_x)} rows; check: rows and sums are right")
