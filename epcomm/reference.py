"""The definition of correct: dispatch and combine over all ranks, in one process, in plain NumPy.

Every function takes and returns lists indexed by rank; nothing here communicates, so nothing is collective.
Backends must agree with this file bit for bit. R ranks, E experts, L = E / R experts a rank, T tokens of a
rank, K choices a token, N rows received by a rank, H channels. Expert e lives on rank e // L.

Arithmetic, which is part of the definition:

* Sums run in float32, one term after the other, and are rounded once, to nearest even. A product and the sum
  it goes into are two roundings; there is no fused multiply-add. ``np.sum`` is never used, for it adds in an
  order of its own.
* Sums start from +0, so a sum of negative zeros is +0.
* Subnormals are kept, in inputs, in partial sums and in results.
* NaN and Inf go through sums as IEEE 754 says. The payload and sign of a NaN are not defined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm.errors import CapacityError, InputError, RoutingError, ShapeError

__all__ = [
    "Dispatched",
    "Layout",
    "LowLatencyDispatched",
    "cast_fp8",
    "combine",
    "dispatch",
    "get_dispatch_layout",
    "low_latency_combine",
    "low_latency_dispatch",
]

Array: TypeAlias = NDArray[Any]
Bias: TypeAlias = Array | tuple[Array, Array] | None

# NaN, Inf and overflow are results here, not events to warn about.
_ieee_754 = np.errstate(all="ignore")


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


@dataclass(frozen=True, eq=False)
class LowLatencyDispatched:
    """What one rank holds after `low_latency_dispatch`; M = num_max_dispatch_tokens_per_rank.

    The rows of an expert are packed from 0, by source rank, then by token index at the source.

    Attributes:
        recv_x: ``[L, R * M, H]``, float8_e4m3fn or bfloat16; zeros past `recv_count`.
        recv_scales: float32 ``[L, R * M, H / 128]`` or int32 ``[L, R * M, ceil(H / 512)]``, as `cast_fp8`
            makes them, zeros past `recv_count`; None for bfloat16.
        recv_count: int32 ``[L]``, rows of each expert.
        src_info: int32 ``[L, R * M]``, token index at the source, -1 past `recv_count`.
        layout_range: int64 ``[L, R]``, rows from each source rank: ``begin << 32 | count``.
    """

    recv_x: Array
    recv_scales: Array | None
    recv_count: Array
    src_info: Array
    layout_range: Array


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
    num_local_experts = _divide("num_experts", num_experts, num_ranks)
    ranks_per_node = ranks_per_node or num_ranks
    num_nodes = _divide("num_ranks", num_ranks, ranks_per_node)
    _check_routing(topk_idx, num_experts)
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
    num_local_experts = _divide("num_experts", num_experts, num_ranks)
    payloads = {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights, "scales": scales}
    for name, arrays in payloads.items():
        if arrays is not None:
            _check_rows(name, arrays, [len(rows) for rows in x])
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


@_ieee_754
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


@_ieee_754
def cast_fp8(x: Array, *, round_scale: bool = False, use_ue8m0: bool = False) -> tuple[Array, Array]:
    """Cast to float8_e4m3fn with one scale for 128 channels; ``q * scale`` gives x back, nearly.

    In float32, each operation rounded once::

        m = fmax(max |x|, 1e-4)        v = m / 448
        scale = v,    s = 448 / m                                   round_scale=False
        scale = 2^e,  s = 2^-e,  e the smallest with 2^e >= v       round_scale=True
        q = e4m3(clip(x * s, -448, 448)), to nearest even

    NaN channels give NaN and do not count in the maximum (CUDA's fmaxf). In a group with an Inf, s is 0:
    Inf gives NaN, finite channels give zeros of their sign, and scale is Inf, or 2^127 with `round_scale`.

    Args:
        x: ``[..., H]`` bfloat16, float16 or float32; H a multiple of 128.
        round_scale: powers of two as scales.
        use_ue8m0: scales as exponent bytes; needs `round_scale`.

    Returns:
        ``(q, scales)``. q float8_e4m3fn ``[..., H]``. scales float32 ``[..., H / 128]``; with `use_ue8m0`
        int32 ``[..., ceil(H / 512)]``: byte i, little endian, of word j is e + 127 of group 4 j + i, 0 where
        there is no such group.

    Raises:
        ShapeError: H is not a multiple of 128.
        InputError: `use_ue8m0` without `round_scale`.
    """
    if use_ue8m0 and not round_scale:
        raise InputError("use_ue8m0", got="round_scale=False", wanted="powers of two", do="pass round_scale=True")
    if x.shape[-1] % 128:
        raise ShapeError("x", got=f"{x.shape[-1]} channels", wanted="a multiple of 128")
    num_groups = x.shape[-1] // 128
    groups = x.astype(np.float32).reshape(*x.shape[:-1], num_groups, 128)
    largest_e4m3 = np.float32(448)
    # Not np.fmax.reduce: NumPy's vector loops lose elements beside a signalling NaN.
    m = np.maximum(np.where(np.isnan(groups), 0, np.abs(groups)).max(axis=-1), np.float32(1e-4))
    scale, s = m / largest_e4m3, largest_e4m3 / m
    if round_scale:
        mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1)
        e = np.where(np.isinf(m), 127, np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.int32)
        scale = np.ldexp(np.float32(1), e)
        s = np.where(np.isinf(m), np.float32(0), np.ldexp(np.float32(1), -e))
    # ml_dtypes converts what is above 464 to NaN; the hardware conversion saturates.
    scaled = np.clip(groups * s[..., None], -largest_e4m3, largest_e4m3)
    q = scaled.astype(ml_dtypes.float8_e4m3fn).reshape(x.shape)
    if not use_ue8m0:
        return q, scale
    words = np.zeros((*x.shape[:-1], -(-num_groups // 4)), np.int32)
    for group in range(num_groups):
        words[..., group // 4] |= (e[..., group] + 127) << (8 * (group % 4))
    return q, words


def low_latency_dispatch(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    *,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
    masks: Sequence[Array] | None = None,
) -> list[LowLatencyDispatched]:
    """Send every token once for each of its experts, into the rows of that expert.

    Args:
        x: per rank bfloat16 ``[T, H]``, T <= `num_max_dispatch_tokens_per_rank`.
        topk_idx: per rank ``[T, K]``; -1 selects nothing.
        num_max_dispatch_tokens_per_rank: the same on all ranks.
        num_experts: E, a multiple of R.
        use_fp8: send `cast_fp8` of x, with its scales.
        round_scale: see `cast_fp8`.
        use_ue8m0: see `cast_fp8`.
        masks: per rank bool ``[R]``, the ranks that it ignores: nothing travels between two ranks when
            either ignores the other.

    Raises:
        ShapeError: lists or arrays whose lengths disagree, or sizes that do not divide.
        CapacityError: more tokens than `num_max_dispatch_tokens_per_rank`.
        RoutingError: an index out of range, or an expert twice in a row of `topk_idx`.
    """
    num_ranks, num_max = len(x), num_max_dispatch_tokens_per_rank
    num_local_experts = _divide("num_experts", num_experts, num_ranks)
    _check_rows("topk_idx", topk_idx, [len(rows) for rows in x])
    for rank, choices in enumerate(topk_idx):
        _check_routing(choices, num_experts)
        if len(choices) > num_max:
            raise CapacityError(f"x of rank {rank}", got=f"{len(choices)} tokens", wanted=f"at most {num_max}")
    casts = [cast_fp8(rows, round_scale=round_scale, use_ue8m0=use_ue8m0) for rows in x] if use_fp8 else []
    rows_out = [q for q, _ in casts] if use_fp8 else x
    scales_out = [scales for _, scales in casts]

    results = []
    for rank in range(num_ranks):
        shape = (num_local_experts, num_ranks * num_max)
        recv_x = np.zeros((*shape, x[0].shape[1]), rows_out[0].dtype)
        recv_scales = np.zeros((*shape, scales_out[0].shape[1]), scales_out[0].dtype) if use_fp8 else None
        recv_count = np.zeros(num_local_experts, np.int32)
        src_info = np.full(shape, -1, np.int32)
        layout_range = np.zeros((num_local_experts, num_ranks), np.int64)
        for local_expert in range(num_local_experts):
            end = 0
            for source in range(num_ranks):
                chosen = (topk_idx[source] == rank * num_local_experts + local_expert).any(axis=1)
                tokens = np.flatnonzero(chosen & _connected(masks, rank, source))
                begin, end = end, end + len(tokens)
                recv_x[local_expert, begin:end] = rows_out[source][tokens]
                if recv_scales is not None:
                    recv_scales[local_expert, begin:end] = scales_out[source][tokens]
                src_info[local_expert, begin:end] = tokens
                layout_range[local_expert, source] = begin << 32 | len(tokens)
            recv_count[local_expert] = end
        results.append(LowLatencyDispatched(recv_x, recv_scales, recv_count, src_info, layout_range))
    return results


@_ieee_754
def low_latency_combine(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    topk_weights: Sequence[Array],
    dispatched: Sequence[LowLatencyDispatched],
    *,
    masks: Sequence[Array] | None = None,
) -> list[Array]:
    """Weighted sum of the expert outputs of every token.

    ``a = +0; for k ascending: a = fadd(a, fmul(w_k, float(x_k))); round to bfloat16``. Choices of -1, and
    those on a rank that ignores or is ignored, are skipped.

    Args:
        x: per rank bfloat16 ``[L, R * M, H]``, one output for every row of `dispatched`.
        topk_idx: per rank ``[T, K]``, as given to `low_latency_dispatch`.
        topk_weights: per rank float32 ``[T, K]``.
        dispatched: per rank, the result of `low_latency_dispatch`.
        masks: see `low_latency_dispatch`; may mask more ranks than the dispatch did.

    Returns:
        Per rank bfloat16 ``[T, H]``.

    Raises:
        ShapeError: lists or arrays whose lengths disagree.
        RoutingError: a choice that is neither masked nor in `dispatched`.
    """
    num_ranks, num_local_experts = len(x), len(dispatched[0].recv_count)
    _check_rows("topk_weights", topk_weights, [len(choices) for choices in topk_idx])
    results = []
    for source, (choices, weights) in enumerate(zip(topk_idx, topk_weights, strict=True)):
        # row_of[e, t]: where expert e received token t of this rank, -1 if it did not.
        row_of = np.full((num_ranks * num_local_experts, len(choices)), -1)
        for rank, received in enumerate(dispatched):
            for local_expert in range(num_local_experts):
                packed = int(received.layout_range[local_expert, source])
                rows = np.arange(packed & 0xFFFFFFFF) + (packed >> 32)
                row_of[rank * num_local_experts + local_expert, received.src_info[local_expert, rows]] = rows
        a = np.zeros((len(choices), x[source].shape[2]), np.float32)
        for k in range(choices.shape[1]):
            for rank in range(num_ranks):
                on_rank = (choices[:, k] >= 0) & (choices[:, k] // num_local_experts == rank)
                tokens = np.flatnonzero(on_rank & _connected(masks, rank, source))
                experts = choices[tokens, k]
                rows = row_of[experts, tokens]
                if (rows < 0).any():
                    raise RoutingError(f"topk_idx of rank {source}", got="other choices", wanted="those dispatched")
                outputs = x[rank][experts % num_local_experts, rows].astype(np.float32)
                product = weights[tokens, k, None].astype(np.float32) * outputs
                a[tokens] = a[tokens] + product
        results.append(a.astype(ml_dtypes.bfloat16))
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


def _connected(masks: Sequence[Array] | None, one: int, other: int) -> bool:
    return masks is None or not (masks[one][other] or masks[other][one])


def _divide(name: str, total: int, parts: int) -> int:
    if parts < 1 or total < 1 or total % parts:
        raise ShapeError(name, got=total, wanted=f"a positive multiple of {parts}")
    return total // parts


def _check_rows(name: str, arrays: Sequence[Array], num_tokens: Sequence[int]) -> None:
    got = [len(array) for array in arrays]
    if got != list(num_tokens):
        raise ShapeError(name, got=f"{got} rows on the ranks", wanted=list(num_tokens), do="one row for each token")


def _check_routing(topk_idx: Array, num_experts: int) -> None:
    """Every index is -1 or an expert, and no expert is twice in a row."""
    if topk_idx.ndim != 2:
        raise ShapeError("topk_idx", got=f"shape {topk_idx.shape}", wanted="[num_tokens, num_topk]")
    for token, choices in enumerate(topk_idx.tolist()):
        experts = [expert for expert in choices if expert != -1]
        if any(not 0 <= expert < num_experts for expert in experts):
            raise RoutingError(f"topk_idx[{token}]", got=choices, wanted=f"-1 or 0 .. {num_experts - 1}")
        if len(set(experts)) < len(experts):
            raise RoutingError(f"topk_idx[{token}]", got=choices, wanted="different experts")
