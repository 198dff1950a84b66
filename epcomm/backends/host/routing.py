"""Dispatch layout: which rank, node and expert gets how many of this rank's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty
from epcomm.backends.protocol import LayoutOutcome

__all__ = ["dispatch_layout"]


def dispatch_layout(topk_idx: NDArray[Any], num_experts: int, num_ranks: int, ranks_per_node: int) -> LayoutOutcome:
    """Count and mark destinations. Indices outside ``[0, num_experts)`` select nothing."""
    num_tokens = len(topk_idx)
    token, choice = np.nonzero((topk_idx >= 0) & (topk_idx < num_experts))
    expert = topk_idx[token, choice]
    in_rank = empty((num_tokens, num_ranks), np.bool_, fill=False)
    in_rank[token, expert // (num_experts // num_ranks)] = True
    num_nodes = num_ranks // ranks_per_node
    in_node = in_rank.reshape(num_tokens, num_nodes, ranks_per_node).any(axis=2)
    return LayoutOutcome(
        num_tokens_per_rank=_counts(in_rank.sum(axis=0)),
        num_tokens_per_rdma_rank=_counts(in_node.sum(axis=0)) if num_nodes > 1 else None,
        num_tokens_per_expert=_counts(np.bincount(expert, minlength=num_experts)),
        is_token_in_rank=in_rank,
    )


def _counts(values: NDArray[Any]) -> NDArray[np.int32]:
    counts = empty(values.shape, np.int32)
    counts[...] = values
    return counts
