"""A layer as a CUDA graph: captured once, replayed with other tokens and another routing, and nothing of Python in it.

epcomm run -n 4 --mps -- python examples/11_graph.py
"""

import sys

import cupy as cp

import epcomm
from epcomm import testing

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL, NUM_STEPS = 64, 1024, 4, 4, 10

with epcomm.Buffer(num_nvl_bytes=64 << 20, backend="cuda") as buffer, cp.cuda.Stream(non_blocking=True) as stream:
    rank, num_ranks, num_experts = buffer.rank, buffer.group_size, NUM_LOCAL * buffer.group_size
    # What the graph reads: the same memory in every replay.
    x = cp.zeros((NUM_TOKENS, HIDDEN), cp.float32)
    topk_idx = cp.zeros((NUM_TOKENS, NUM_TOPK), cp.int64)

    def set_inputs(step):
        first_token = (step * num_ranks + rank) * NUM_TOKENS
        x.set(testing.token_data(NUM_TOKENS, HIDDEN, "float32", first_token=first_token))
        topk_idx.set(testing.uniform_routing(NUM_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first_token))

    def layer():
        """Shapes must not depend on the routing: as many rows as can arrive, of which the first ones are real."""
        layout = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv = buffer.dispatch(x, topk_idx=topk_idx, num_worst_tokens=NUM_TOKENS * num_ranks, **layout.arguments())
        cp.multiply(recv.recv_x, 2, out=recv.recv_x)  # the experts
        return layout, recv, buffer.combine(recv.recv_x, recv.handle).combined_x

    set_inputs(0)
    layer()  # once without a graph: compiles, and takes memory
    stream.synchronize()
    stream.begin_capture()
    layout, recv, out = layer()  # nothing runs; these arrays are filled by every replay
    graph = stream.end_capture()

    for step in range(NUM_STEPS):
        set_inputs(step)
        graph.launch(stream)
        num_visited = layout.is_token_in_rank.sum(axis=1, keepdims=True)
        if not cp.allclose(out, 2 * x * num_visited, rtol=1e-6, atol=0):
            sys.exit(f"rank {rank}: wrong sums in step {step}")
    buffer.check()  # no row was dropped, in any replay
    if rank == 0:
        print(f"{num_ranks} ranks, {NUM_STEPS} replays; check: sums are right, nothing was dropped")
