"""Rows between and within nodes, counted token by token, by code that shares nothing with epcomm."""

from __future__ import annotations

import numpy as np

__all__ = ["count_rows"]


def count_rows(topk_idx: np.ndarray, rank: int, num_nodes: int, gpus: int, num_experts: int) -> dict[str, np.ndarray]:
    """By name of `Rows`: for each token of all ranks, the rows that it gives `rank` to send; an independent count."""
    num_tokens, num_ranks = topk_idx.shape[1], num_nodes * gpus
    node, local = divmod(rank, gpus)
    is_there = np.zeros((num_ranks, num_tokens, num_ranks), bool)
    for source, token, expert in np.ndindex(topk_idx.shape):
        is_there[source, token, topk_idx[source, token, expert] // (num_experts // num_ranks)] = True
    nodes = is_there.reshape(num_ranks, num_tokens, num_nodes, gpus).any(axis=3)
    others = [other for other in range(num_nodes) if other != node]
    neighbours = [node * gpus + other for other in range(gpus) if other != local]
    rail = [other * gpus + local for other in others]
    far = [receiver for receiver in range(num_ranks) if receiver // gpus != node]
    return {
        "crossing": nodes[rank][:, others].sum(axis=1),
        "near": is_there[rank][:, neighbours].sum(axis=1),
        "forwarded": is_there[rail][:, :, neighbours].sum(axis=2).ravel(),
        "own": is_there[[rank, *rail]][:, :, rank].ravel(),
        "received": is_there[:, :, rank].ravel(),
        "for_each_rank": is_there[rank][:, far].sum(axis=1),
    }
