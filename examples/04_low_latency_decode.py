"""Decoding with two micro-batches in flight: while one computes, the rows of the other are on their way.

epcomm run -n 4 -- python examples/04_low_latency_decode.py
"""

import sys

import ml_dtypes
import numpy as np

import epcomm
from epcomm import testing

MAX_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL, NUM_STEPS = 8, 128, 2, 2, 3
BFLOAT16 = ml_dtypes.bfloat16


def experts(recv_x, recv_count):
    """Doubles the rows of every local expert. Rows past recv_count are undefined, and nobody reads their results."""
    y = np.zeros(recv_x.shape, BFLOAT16)
    for e, count in enumerate(recv_count):
        y[e, :count] = recv_x[e, :count].astype(np.float32) * 2
    return y


with epcomm.Buffer(low_latency_mode=True) as buffer:
    rank, num_experts = buffer.rank, NUM_LOCAL * buffer.group_size
    weights = np.full((MAX_TOKENS, NUM_TOPK), 0.5, np.float32)
    for step in range(NUM_STEPS):
        first_token = (step * buffer.group_size + rank) * 2 * MAX_TOKENS
        x = testing.token_data(2 * MAX_TOKENS, HIDDEN, BFLOAT16, first_token=first_token)
        topk_idx = testing.uniform_routing(2 * MAX_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first_token)
        batches = [slice(0, MAX_TOKENS), slice(MAX_TOKENS, None)]

        # Send both; a hook receives. On a GPU nothing occupies an SM between the send and its hook.
        sent = [
            buffer.low_latency_dispatch(
                x[batch], topk_idx[batch], MAX_TOKENS, num_experts, use_fp8=False, return_recv_hook=True
            )
            for batch in batches
        ]
        combined = []
        for batch, (recv_x, recv_count, handle, _, receive) in zip(batches, sent, strict=True):
            receive()
            y = experts(recv_x, recv_count)
            combined.append(buffer.low_latency_combine(y, topk_idx[batch], weights, handle, return_recv_hook=True))
        for batch, (out, _, receive) in zip(batches, combined, strict=True):
            receive()
            # Two experts, each doubles, each weighs one half.
            if not np.array_equal(out, (x[batch].astype(np.float32) * 2).astype(BFLOAT16)):
                sys.exit(f"rank {rank}: wrong sums in step {step}")
    if rank == 0:
        print(f"{buffer.group_size} ranks, {NUM_STEPS} steps of 2 micro-batches; check: sums are exact")
