"""Decoding on GPUs: two micro-batches in flight, experts that write where combine reads, and all of it a CUDA graph.

epcomm run -n 4 --mps -- python examples/13_gpu_decode.py
"""

import sys

import cupy as cp
import ml_dtypes
from mpi4py import MPI

import epcomm
from epcomm import testing

MAX_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL, NUM_STEPS = 16, 256, 2, 4, 6
num_ranks, num_experts = MPI.COMM_WORLD.size, NUM_LOCAL * MPI.COMM_WORLD.size
num_bytes = epcomm.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, num_ranks, num_experts)
buffer = epcomm.Buffer(num_rdma_bytes=num_bytes, low_latency_mode=True, backend="cuda")  # chooses the GPU
with buffer, cp.cuda.Stream(non_blocking=True) as stream:
    # What the graph reads, of two micro-batches: the same memory in every replay.
    x = [cp.zeros((MAX_TOKENS, HIDDEN), ml_dtypes.bfloat16) for _ in range(2)]
    topk_idx = [cp.zeros((MAX_TOKENS, NUM_TOPK), cp.int64) for _ in range(2)]
    weights = cp.full((MAX_TOKENS, NUM_TOPK), 1 / NUM_TOPK, cp.float32)
    options = {"use_fp8": False, "return_recv_hook": True}

    def set_inputs(step):
        for batch in range(2):
            first = ((step * 2 + batch) * num_ranks + buffer.rank) * MAX_TOKENS
            x[batch].set(testing.token_data(MAX_TOKENS, HIDDEN, ml_dtypes.bfloat16, first_token=first))
            topk_idx[batch].set(testing.uniform_routing(MAX_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first))

    def layer():
        """Sends both batches, then receives them in turn; between a send and its hook no SM is occupied."""
        sent = [buffer.low_latency_dispatch(x[b], topk_idx[b], MAX_TOKENS, num_experts, **options) for b in range(2)]
        combined = []
        for indices, (recv_x, _, handle, _, receive) in zip(topk_idx, sent, strict=True):
            receive()
            y = buffer.get_next_low_latency_combine_buffer(handle)
            cp.copyto(y.view(cp.uint16), recv_x.view(cp.uint16))  # the experts: what they get is what they give
            combined.append(
                buffer.low_latency_combine(y, indices, weights, handle, zero_copy=True, return_recv_hook=True)
            )
        for _, _, receive in combined:
            receive()
        return [result.combined_x for result in combined]

    set_inputs(0)
    layer()  # once without a graph: compiles, and takes memory
    stream.synchronize()
    stream.begin_capture()
    sums = layer()
    graph = stream.end_capture()
    for step in range(NUM_STEPS):
        set_inputs(step)
        graph.launch(stream)
        # Two experts, each gives back the row, each weighs one half. (CuPy does not compare bfloat16.)
        if not all((a.get() == b.get()).all() for a, b in zip(sums, x, strict=True)):
            sys.exit(f"rank {buffer.rank}: wrong sums in step {step}")
    if buffer.rank == 0:
        print(f"{num_ranks} ranks, {NUM_STEPS} replays of 2 micro-batches; check: sums are exact")
