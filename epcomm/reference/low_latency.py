"""Low-latency dispatch and combine: rows grouped by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from epcomm.errors import CapacityError, RoutingError
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
    masks: Sequence[Array] | None = None,
) -> list[Array]:
    """Weighted sum of the expert outputs of every token.

    ``a = +0; for k ascending: a = fadd(a, fmul(w_k, float(x_k))); round to bfloat16``. Choices of -1, and
    those on a rank that ignores or is ignored, are skipped.

    With `use_logfmt` every x_k, also one that stays on its rank, is what comes back of it through `encode_logfmt`.
    Backends do that with a logarithm of their own: a product may be off by ``|w_k| logfmt_bound(x_k)``.

    Args:
        x: per rank bfloat16 ``[L, R * M, H]``, one output for every row of `dispatched`.
        topk_idx: per rank ``[T, K]``, as given to `low_latency_dispatch`.
        topk_weights: per rank float32 ``[T, K]``.
        dispatched: per rank, the result of `low_latency_dispatch`.
        use_logfmt: see above; H is a multiple of 128.
        masks: see `low_latency_dispatch`; may mask more ranks than the dispatch did.

    Returns:
        Per rank bfloat16 ``[T, H]``.

    Raises:
        ShapeError: lists or arrays whose lengths disagree, or `use_logfmt` with another H.
        RoutingError: a choice that is neither masked nor in `dispatched`.
    """
    num_ranks, num_local_experts = len(x), len(dispatched[0].recv_count)
    check_rows("topk_weights", topk_weights, [len(choices) for choices in topk_idx])
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
                outputs = x[rank][experts % num_local_experts, rows]
                if use_logfmt:
                    outputs = decode_logfmt(encode_logfmt(outputs), outputs.shape[1])
                product = weights[tokens, k, None].astype(np.float32) * outputs.astype(np.float32)
                a[tokens] = a[tokens] + product
        results.append(a.astype(ml_dtypes.bfloat16))
    return results


def _connected(masks: Sequence[Array] | None, one: int, other: int) -> bool:
    return masks is None or not (masks[one][other] or masks[other][one])
