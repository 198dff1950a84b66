"""One Mixture-of-Experts layer: gate, dispatch, experts, combine. Compared with the same layer on one rank.

epcomm run -n 4 -- python examples/02_moe_layer.py
"""

import sys

import numpy as np

import epcomm

NUM_TOKENS, HIDDEN, INNER, NUM_LOCAL, NUM_TOPK = 32, 64, 48, 4, 4


def expert(weights, rows):
    """A feed-forward network with one inner layer."""
    up, down = weights
    return np.maximum(rows @ up, 0) @ down


with epcomm.Buffer() as buffer:
    rank, num_experts = buffer.rank, NUM_LOCAL * buffer.group_size
    shared = np.random.default_rng(0)  # the same on all ranks
    gate = shared.standard_normal((HIDDEN, num_experts), np.float32)
    experts = [
        (
            shared.standard_normal((HIDDEN, INNER), np.float32) / 8,
            shared.standard_normal((INNER, HIDDEN), np.float32) / 8,
        )
        for _ in range(num_experts)
    ]
    x = np.random.default_rng(1 + rank).standard_normal((NUM_TOKENS, HIDDEN), np.float32)

    scores = np.exp(x @ gate / 8)
    topk_idx = np.argsort(-scores, axis=1)[:, :NUM_TOPK].copy()
    topk_weights = np.take_along_axis(scores, topk_idx, axis=1)
    topk_weights /= topk_weights.sum(axis=1, keepdims=True)

    layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    per_rank, per_node, per_expert, in_rank, _ = layout
    recv = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert, topk_idx, topk_weights)

    # combine sums rows unweighted, so this rank's experts are weighted and summed here.
    y = np.zeros_like(recv.recv_x)
    for local in range(NUM_LOCAL):  # recv_topk_idx counts from this rank's first expert; -1 is elsewhere
        rows, choices = np.nonzero(recv.recv_topk_idx == local)
        output = expert(experts[rank * NUM_LOCAL + local], recv.recv_x[rows])
        y[rows] += recv.recv_topk_weights[rows, choices, None] * output
    out = buffer.combine(y, recv.handle).combined_x

    dense = np.zeros_like(x)
    for e in range(num_experts):
        rows, choices = np.nonzero(topk_idx == e)
        dense[rows] += topk_weights[rows, choices, None] * expert(experts[e], x[rows])
    error = float(np.abs(out - dense).max())
    if error > 1e-5:
        sys.exit(f"rank {rank}: off by {error}")
    if rank == 0:
        print(f"{buffer.group_size} ranks, {num_experts} experts; check: largest difference from dense {error:.1e}")
