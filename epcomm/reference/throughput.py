"""Layout, dispatch and combine: a token goes once to each rank that owns one of its experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from epcomm.errors import ShapeError
from epcomm.reference.checks import Array, check_routing, check_rows, divide, ieee_754

__all__ = ["Dispatched", "Layout", "combine", "dispatch", "get_dispatch_layout"]

Bias: TypeAlias = Array | tuple[Array, Array] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of one rank go.

    Attributes:
        num_tokens_per_rank: int32 ``[R]``, tokens with at least one choice on that rank.
        num_tokens_per_rdma_rank: int32 ``[num_nodes]``, tokens with at least one choice on that node; None
            when there is one node.
        num_tokens_per_expert: int32 ``[E]``.
        is_token_in_rank: bool ``[T, R]``.
    """

    num_tokens_per_rank: Array
    num_tokens_per_rdma_rank: Array | None
    num_tokens_per_expert: Array
    is_token_in_rank: Array


@dataclass(frozen=True, eq=False)
class Dispatched:
    """What one rank holds after `dispatch`: N rows, or `num_worst_tokens` rows when that was given.

    Rows past the real ones are zeros, with -1 in `recv_topk_idx`, `recv_src_rank` and `recv_src_idx`.

    Attributes:
        recv_x: ``[N, H]``, the dtype of x; rows by source rank, then by token index at the source.
        recv_scales: ``[N, ...]``, the dtype of scales; None when no scales were sent.
        recv_topk_idx: ``[N, K]``, the dtype of topk_idx; expert index on this rank (0 .. L - 1), -1 where
            the choice is on another rank.
        recv_topk_weights: ``[N, K]``, the dtype of topk_weights; 0 where `recv_topk_idx` is -1; None when no
            weights were sent.
        num_recv_tokens_per_expert_list: tokens for each of the L experts, rounded up to `expert_alignment`;
            empty when `num_worst_tokens` was given.
        rank_prefix_matrix: int32 ``[R, R]``; ``[i, j]`` tokens that ranks 0 .. i send to rank j, dropped
            rows included.
        recv_src_rank: int32 ``[N]``, source rank of each row.
        recv_src_idx: int32 ``[N]``, token index of each row at its source.
        num_recv_tokens: number of real rows, dropped ones not counted.
    """

    recv_x: Array
    recv_scales: Array | None
    recv_topk_idx: Array
    recv_topk_weights: Array | None
    num_recv_tokens_per_expert_list: list[int]
    rank_prefix_matrix: Array
    recv_src_rank: Array
    recv_src_idx: Array
    num_recv_tokens: int


def get_dispatch_layout(topk_idx: Array, num_experts: int, num_ranks: int, ranks_per_node: int | None = None) -> Layout:
    """Count where the tokens of one rank go.

    Args:
        topk_idx: int32 or int64 ``[T, K]``, expert indices; -1 selects nothing.
        num_experts: E, a multiple of `num_ranks`.
        num_ranks: R, a multiple of `ranks_per_node`.
        ranks_per_node: ranks of a node; None puts all on one.

    Raises:
        ShapeError: sizes that do not divide.
        RoutingError: an index out of range, or an expert twice in a row of `topk_idx`.
    """
    num_local_experts = divide("num_experts", num_experts, num_ranks)
    ranks_per_node = ranks_per_node or num_ranks
    num_nodes = divide("num_ranks", num_ranks, ranks_per_node)
    check_routing(topk_idx, num_experts)
    is_token_in_rank = np.zeros((len(topk_idx), num_ranks), bool)
    num_tokens_per_expert = np.zeros(num_experts, np.int32)
    for token, choices in enumerate(topk_idx.tolist()):
        for expert in choices:
            if expert >= 0:
                is_token_in_rank[token, expert // num_local_experts] = True
                num_tokens_per_expert[expert] += 1
    is_token_in_node = is_token_in_rank.reshape(-1, num_nodes, ranks_per_node).any(axis=2)
    return Layout(
        num_tokens_per_rank=is_token_in_rank.sum(axis=0, dtype=np.int32),
        num_tokens_per_rdma_rank=is_token_in_node.sum(axis=0, dtype=np.int32) if num_nodes > 1 else None,
        num_tokens_per_expert=num_tokens_per_expert,
        is_token_in_rank=is_token_in_rank,
    )


def dispatch(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    num_experts: int,
    *,
    topk_weights: Sequence[Array] | None = None,
    scales: Sequence[Array] | None = None,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
) -> list[Dispatched]:
    """Send every token once to every rank that owns one of its experts.

    Args:
        x: per rank ``[T, H]``, any dtype; T may differ between ranks and may be 0.
        topk_idx: per rank int32 or int64 ``[T, K]``; -1 selects nothing.
        num_experts: E, a multiple of R.
        topk_weights: per rank ``[T, K]``, any dtype.
        scales: per rank ``[T, ...]``, any dtype; travels with the row.
        expert_alignment: round the expert counts up to a multiple of this.
        num_worst_tokens: when > 0, give every rank exactly this many rows: rows that do not fit are
            dropped, missing ones are filled.

    Raises:
        ShapeError: lists or arrays whose lengths disagree, or sizes that do not divide.
        RoutingError: an index out of range, or an expert twice in a row of `topk_idx`.
    """
    num_ranks = len(x)
    num_local_experts = divide("num_experts", num_experts, num_ranks)
    payloads = {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights, "scales": scales}
    for name, arrays in payloads.items():
        if arrays is not None:
            check_rows(name, arrays, [len(rows) for rows in x])
    layouts = [get_dispatch_layout(choices, num_experts, num_ranks) for choices in topk_idx]
    prefix = np.cumsum([layout.num_tokens_per_rank for layout in layouts], axis=0, dtype=np.int32)
    num_tokens_per_expert = np.cumsum([layout.num_tokens_per_expert for layout in layouts], axis=0)[-1].tolist()

    results = []
    for rank in range(num_ranks):
        sources = _received_tokens(layouts, rank, num_worst_tokens)
        num_rows = num_worst_tokens or len(sources)
        recv_topk_idx = _gather(topk_idx, sources, num_rows, fill=-1)
        first_expert = rank * num_local_experts
        is_local = (recv_topk_idx >= first_expert) & (recv_topk_idx < first_expert + num_local_experts)
        recv_topk_weights = None
        if topk_weights is not None:
            recv_topk_weights = _gather(topk_weights, sources, num_rows)
            recv_topk_weights[~is_local] = 0
        local_counts = num_tokens_per_expert[first_expert : first_expert + num_local_experts]
        aligned_counts = [-(-count // expert_alignment) * expert_alignment for count in local_counts]
        results.append(
            Dispatched(
                recv_x=_gather(x, sources, num_rows),
                recv_scales=None if scales is None else _gather(scales, sources, num_rows),
                recv_topk_idx=np.where(is_local, recv_topk_idx - first_expert, -1).astype(recv_topk_idx.dtype),
                recv_topk_weights=recv_topk_weights,
                num_recv_tokens_per_expert_list=[] if num_worst_tokens else aligned_counts,
                rank_prefix_matrix=prefix.copy(),
                recv_src_rank=_padded([source for source, _ in sources], num_rows),
                recv_src_idx=_padded([token for _, token in sources], num_rows),
                num_recv_tokens=len(sources),
            )
        )
    return results


@ieee_754
def combine(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    num_experts: int,
    *,
    ranks_per_node: int | None = None,
    topk_weights: Sequence[Array] | None = None,
    bias: Sequence[Bias] | None = None,
    num_worst_tokens: int = 0,
) -> list[tuple[Array, Array | None]]:
    """Bring the rows that `dispatch` delivered back to their tokens, and sum them without weights.

    On one node: ``a = +0; a += bias; for rank ascending: a += x_rank; round``. On several nodes the ranks of
    each node are first summed, from +0, and rounded to the dtype (the own node included); then
    ``a = +0; a += bias; for node ascending: a += partial_node; round``. Ranks and nodes that a token does not
    visit add nothing, so a token that visits none gives 0, or its bias.

    Args:
        x: per rank ``[N, H]`` bfloat16, float16 or float32, one output for every row of `Dispatched`, in the
            same order; rows past the real ones are not read.
        topk_idx: per rank ``[T, K]``, as given to `dispatch`.
        num_experts: as given to `dispatch`.
        ranks_per_node: ranks of a node; None puts all on one.
        topk_weights: per rank float32 ``[N, K]``; summed like x (in float32, without bias).
        bias: per rank None, ``[T, H]`` or a pair of these; any dtype that float32 holds exactly.
        num_worst_tokens: as given to `dispatch`; dropped rows add nothing.

    Returns:
        Per rank ``(combined_x [T, H] of the dtype of x, combined_topk_weights float32 [T, K] or None)``.

    Raises:
        ShapeError: lists or arrays whose lengths disagree, or sizes that do not divide.
        RoutingError: an index out of range, or an expert twice in a row of `topk_idx`.
    """
    num_ranks = len(x)
    ranks_per_node = ranks_per_node or num_ranks
    layouts = [get_dispatch_layout(choices, num_experts, num_ranks, ranks_per_node) for choices in topk_idx]
    num_tokens = [len(choices) for choices in topk_idx]
    # row_of[r][s][t]: where rank r received token t of rank s, -1 if it did not.
    row_of = [[np.full(n, -1) for n in num_tokens] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        sources = _received_tokens(layouts, rank, num_worst_tokens)
        if len(x[rank]) < len(sources):
            raise ShapeError(f"x of rank {rank}", got=f"{len(x[rank])} rows", wanted=f"at least {len(sources)}")
        for row, (source, token) in enumerate(sources):
            row_of[rank][source][token] = row

    nodes = [range(first, first + ranks_per_node) for first in range(0, num_ranks, ranks_per_node)]
    results: list[tuple[Array, Array | None]] = []
    for source in range(num_ranks):
        rows = [row_of[rank][source] for rank in range(num_ranks)]
        biases = _biases(bias[source] if bias is not None else None)
        combined_x = _sum_over_nodes(x, rows, nodes, biases)
        combined_weights = None if topk_weights is None else _sum_over_nodes(topk_weights, rows, nodes, [])
        results.append((combined_x, combined_weights))
    return results


def _received_tokens(layouts: Sequence[Layout], rank: int, num_worst_tokens: int) -> list[tuple[int, int]]:
    """(source rank, token) of every row that a rank receives, in row order."""
    sources = [
        (source, token)
        for source, layout in enumerate(layouts)
        for token in np.flatnonzero(layout.is_token_in_rank[:, rank]).tolist()
    ]
    return sources[:num_worst_tokens] if num_worst_tokens else sources


def _gather(arrays: Sequence[Array], sources: Sequence[tuple[int, int]], num_rows: int, *, fill: int = 0) -> Array:
    """Rows `sources` of per-rank arrays, then rows of `fill` up to `num_rows`."""
    gathered = np.full((num_rows, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, (source, token) in enumerate(sources):
        gathered[row] = arrays[source][token]
    return gathered


def _padded(values: Sequence[int], num_rows: int) -> Array:
    """int32 ``[num_rows]``: `values`, then -1."""
    return np.array([*values, *[-1] * (num_rows - len(values))], np.int32)


def _sum_over_nodes(
    x: Sequence[Array], rows: Sequence[Array], nodes: Sequence[Iterable[int]], biases: Sequence[Array]
) -> Array:
    """Sum ``x[r][rows[r][t]]`` over the ranks r where that row is not -1, rounding as `combine` says."""
    dtype, zeros = x[0].dtype, np.zeros((len(rows[0]), *x[0].shape[1:]), np.float32)
    a = zeros
    for bias in biases:
        a = a + bias.astype(np.float32)
    if len(nodes) == 1:
        return _add_rows(a, x, rows, nodes[0]).astype(dtype)
    for node in nodes:
        # +0 for the tokens that do not visit the node, which changes no bit: a sum from +0 is never -0.
        partial = _add_rows(zeros, x, rows, node).astype(dtype)
        a = a + partial.astype(np.float32)
    return a.astype(dtype)


def _add_rows(a: Array, x: Sequence[Array], rows: Sequence[Array], ranks: Iterable[int]) -> Array:
    """``a``, plus ``x[r][rows[r][t]]`` for `ranks` in order; not rounded to the dtype of x."""
    a = a.copy()
    for rank in ranks:
        tokens = np.flatnonzero(rows[rank] >= 0)
        a[tokens] = a[tokens] + x[rank][rows[rank][tokens]].astype(np.float32)
    return a


def _biases(bias: Bias) -> list[Array]:
    if bias is None:
        return []
    return list(bias) if isinstance(bias, tuple) else [bias]
