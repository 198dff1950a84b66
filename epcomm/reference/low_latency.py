"""Low-latency dispatch and combine: rows grouped by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from epcomm.errors import CapacityError, InputError, RoutingError
from epcomm.reference.checks import Array, check_routing, check_rows, divide, ieee_754
from epcomm.reference.formats import cast_fp8, decode_logfmt, encode_logfmt

__all__ = ["LowLatencyDispatched", "low_latency_combine", "low_latency_dispatch"]


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
    num_local_experts = divide("num_experts", num_experts, num_ranks)
    check_rows("topk_idx", topk_idx, [len(rows) for rows in x])
    for rank, choices in enumerate(topk_idx):
        check_routing(choices, num_experts)
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


@ieee_754
def low_latency_combine(
    x: Sequence[Array],
    topk_idx: Sequence[Array],
    topk_weights: Sequence[Array],
    dispatched: Sequence[LowLatencyDispatched],
    *,
    use_logfmt: bool = False,
    pre_reduce: bool = False,
    masks: Sequence[Array] | None = None,
) -> list[Array]:
    """Weighted sum of the expert outputs of every token.

    ``a = +0; for k ascending: a = fadd(a, fmul(w_k, float(x_k))); round to bfloat16``. Choices of -1, and
    those on a rank that ignores or is ignored, are skipped.

    With `use_logfmt` every x_k, also one that stays on its rank, is what comes back of it through `encode_logfmt`.
    Backends do that with a logarithm of their own: a product may be off by ``|w_k| logfmt_bound(x_k)``.

    With `pre_reduce` each rank that owns experts of a token sums their rows and rounds: ``p_r`` is the sum above
    over the choices on rank r alone, rounded to bfloat16. Then ``a = +0; for r ascending: a = fadd(a, float(p_r));
    round to bfloat16``, over the ranks that the token visits.

    Args:
        x: per rank bfloat16 ``[L, R * M, H]``, one output for every row of `dispatched`.
        topk_idx: per rank ``[T, K]``, as given to `low_latency_dispatch`.
        topk_weights: per rank float32 ``[T, K]``.
        dispatched: per rank, the result of `low_latency_dispatch`.
        use_logfmt: see above; H is a multiple of 128.
        pre_reduce: see above; not together with `use_logfmt`.
        masks: see `low_latency_dispatch`; may mask more ranks than the dispatch did.

    Returns:
        Per rank bfloat16 ``[T, H]``.

    Raises:
        ShapeError: lists or arrays whose lengths disagree, or `use_logfmt` with another H.
        RoutingError: a choice that is neither masked nor in `dispatched`.
        InputError: `pre_reduce` with `use_logfmt`.
    """
    if pre_reduce and use_logfmt:
        raise InputError("pre_reduce", got="also use_logfmt", wanted="one of the two")
    num_ranks = len(x)
    check_rows("topk_weights", topk_weights, [len(choices) for choices in topk_idx])
    results = []
    for source, (choices, weights) in enumerate(zip(topk_idx, topk_weights, strict=True)):
        owners, rows = _rows_of_choices(source, choices, x, dispatched, masks)
        if use_logfmt:
            rows = decode_logfmt(encode_logfmt(rows), rows.shape[-1])
        products = weights.astype(np.float32)[..., None] * rows.astype(np.float32)
        if not pre_reduce:
            a = _sum_of_choices(products, owners >= 0)
        else:
            a = np.zeros((len(choices), x[source].shape[2]), np.float32)
            for rank in range(num_ranks):
                visits = (owners == rank).any(axis=1)
                partial = _sum_of_choices(products, owners == rank).astype(ml_dtypes.bfloat16)
                a[visits] = a[visits] + partial[visits].astype(np.float32)
        results.append(a.astype(ml_dtypes.bfloat16))
    return results


def _rows_of_choices(
    source: int,
    choices: Array,
    x: Sequence[Array],
    dispatched: Sequence[LowLatencyDispatched],
    masks: Sequence[Array] | None,
) -> tuple[Array, Array]:
    """Of the choices of rank `source`: the rank that owns each, ``[T, K]``, -1 if skipped; the rows, ``[T, K, H]``."""
    num_local_experts = len(dispatched[0].recv_count)
    owners = np.full(choices.shape, -1)
    rows = np.zeros((*choices.shape, x[source].shape[2]), x[source].dtype)
    for rank, received in enumerate(dispatched):
        if not _connected(masks, rank, source):
            continue
        for local_expert in range(num_local_experts):
            # row_of[t]: where the expert received token t, -1 if it did not.
            row_of = np.full(len(choices), -1)
            packed = int(received.layout_range[local_expert, source])
            places = np.arange(packed & 0xFFFFFFFF) + (packed >> 32)
            row_of[received.src_info[local_expert, places]] = places
            tokens, positions = np.nonzero(choices == rank * num_local_experts + local_expert)
            if (row_of[tokens] < 0).any():
                raise RoutingError(f"topk_idx of rank {source}", got="other choices", wanted="those dispatched")
            owners[tokens, positions] = rank
            rows[tokens, positions] = x[rank][local_expert, row_of[tokens]]
    return owners, rows


def _sum_of_choices(products: Array, is_added: Array) -> Array:
    """float32 ``[T, H]``: from +0, those of ``products [T, K, H]`` that ``is_added [T, K]`` names, k ascending."""
    a = np.zeros((len(products), products.shape[2]), np.float32)
    for k in range(products.shape[1]):
        tokens = np.flatnonzero(is_added[:, k])
        a[tokens] = a[tokens] + products[tokens, k]
    return a


def _connected(masks: Sequence[Array] | None, one: int, other: int) -> bool:
    return masks is None or not (masks[one][other] or masks[other][one])
