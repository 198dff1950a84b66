"""Arguments of dispatch and combine: user arrays in, requests for the backend out. Local; nothing is sent."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArraySpec, ArrayView, Place, import_array, require
from epcomm.backends import CombineRequest, DispatchRequest, Turn
from epcomm.buffer.arguments import (
    BOOL,
    FLOAT32,
    INT32,
    INTEGERS,
    MAX_TOPK,
    NUM_REMEMBERED,
    check_num_experts,
    check_rows,
    check_topk,
    check_topk_values,
    positive_argument,
)
from epcomm.config import Config
from epcomm.errors import DtypeError, HandleError, InputError, RoutingError, ShapeError
from epcomm.handle import DispatchHandle
from epcomm.numerics import COMBINE_DTYPES, ROW_DTYPES

__all__ = ["combine_request", "dispatch_handle", "dispatch_request"]


def dispatch_handle(handle: Any, buffer_id: int, turn: Turn) -> DispatchHandle:
    """Raise HandleError unless `handle` came from this Buffer's dispatch."""
    if not isinstance(handle, DispatchHandle):
        raise HandleError("handle", got=f"a {type(handle).__name__}", wanted="the handle that dispatch returned")
    if handle.buffer_id != buffer_id:
        raise HandleError(
            "handle", got="the handle of another Buffer", wanted="one that this Buffer's dispatch returned"
        )
    return handle.with_own_leaves(turn.stream)


def dispatch_request(
    turn: Turn,
    x: Any,
    handle: Any,
    num_tokens_per_rank: Any,
    num_tokens_per_rdma_rank: Any,
    is_token_in_rank: Any,
    num_tokens_per_expert: Any,
    topk_idx: Any,
    topk_weights: Any,
    expert_alignment: int,
    num_worst_tokens: int,
    config: Any,
    *,
    buffer_id: int,
    num_ranks: int,
    num_nodes: int,
    default: Config,
    num_sms: int,
    check: bool,
) -> DispatchRequest:
    """The request of ``Buffer.dispatch``, whose arguments these are; the keywords describe the Buffer."""
    x, scales = x if isinstance(x, tuple) else (x, None)
    stream = turn.stream
    rows, scales = import_array(x, "x", stream=stream), _optional(turn, scales, "scales")
    _check_payload(turn.place, rows.spec, _spec(scales))
    expert_alignment, config = positive_argument(expert_alignment, "expert_alignment"), _config(config, default)
    payload, num_tokens = (turn.take(rows), None if scales is None else turn.take(scales)), rows.spec.shape[0]
    if handle is not None:
        _check_cached(topk_idx, topk_weights)
        handle = dispatch_handle(handle, buffer_id, turn)
        _check_handle(handle, num_tokens, num_worst_tokens)
        num_experts, num_rows, mask = handle.num_experts, handle.num_worst_tokens, handle.is_token_in_rank
        return DispatchRequest(*payload, num_experts, expert_alignment, num_rows, config, num_sms, handle, mask)
    if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
        raise InputError(
            "dispatch",
            got="neither a handle nor the whole layout",
            wanted="num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert",
            do="pass what get_dispatch_layout returned",
        )
    if not isinstance(num_worst_tokens, INTEGERS) or num_worst_tokens < 0:
        raise ShapeError("num_worst_tokens", got=repr(num_worst_tokens), wanted="0 or more rows")
    mask = import_array(is_token_in_rank, "is_token_in_rank", stream=stream)
    per_rank = import_array(num_tokens_per_rank, "num_tokens_per_rank", stream=stream)
    per_expert = import_array(num_tokens_per_expert, "num_tokens_per_expert", stream=stream)
    per_node = _optional(turn, num_tokens_per_rdma_rank, "num_tokens_per_rdma_rank")
    indices, weights = _optional(turn, topk_idx, "topk_idx"), _optional(turn, topk_weights, "topk_weights")
    _check_routing(
        turn.place,
        num_tokens,
        mask.spec,
        per_rank.spec,
        per_expert.spec,
        _spec(per_node),
        _spec(indices),
        _spec(weights),
        num_ranks,
        num_nodes,
    )
    num_experts = per_expert.shape[0]
    _check_layout(turn, mask, per_rank, per_node, num_nodes)
    if indices is not None and check:
        values = turn.checked_values(indices)
        check_topk_values(values, num_experts)
        chosen = np.bincount(values[values >= 0], minlength=num_experts)
        _check_counts("num_tokens_per_expert", turn.checked_values(per_expert), chosen.tolist())
    return DispatchRequest(
        *payload,
        num_experts,
        expert_alignment,
        int(num_worst_tokens),
        config,
        num_sms,
        None,
        is_token_in_rank=turn.take(mask),
        num_tokens_per_rank=turn.take(per_rank),
        num_tokens_per_expert=turn.take(per_expert),
        topk_idx=None if indices is None else turn.take(indices),
        topk_weights=None if weights is None else turn.take(weights),
    )


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _check_payload(place: Place, x: ArraySpec, scales: ArraySpec | None) -> None:
    check_rows(place, x, ROW_DTYPES)
    if scales is None:
        return
    require(scales, "scales", contiguous=False, place=place)
    num_tokens, shape = x.shape[0], scales.shape
    if scales.dtype.itemsize not in (1, 2, 4):
        raise DtypeError("scales", got=scales.dtype.name, wanted="elements of 1, 2 or 4 bytes")
    if len(shape) not in (1, 2) or shape[0] != num_tokens:
        raise ShapeError("scales", got=f"shape {list(shape)}", wanted=f"[{num_tokens}] or [{num_tokens}, num_scales]")


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _check_routing(
    place: Place,
    num_tokens: int,
    mask: ArraySpec,
    per_rank: ArraySpec,
    per_expert: ArraySpec,
    per_node: ArraySpec | None,
    topk_idx: ArraySpec | None,
    topk_weights: ArraySpec | None,
    num_ranks: int,
    num_nodes: int,
) -> None:
    require(mask, "is_token_in_rank", dtypes=(BOOL,), shape=(num_tokens, num_ranks), place=place)
    require(per_rank, "num_tokens_per_rank", dtypes=(INT32,), shape=(num_ranks,), place=place)
    require(per_expert, "num_tokens_per_expert", dtypes=(INT32,), shape=(None,), place=place)
    check_num_experts(per_expert.shape[0], num_ranks)
    if per_node is not None:
        require(per_node, "num_tokens_per_rdma_rank", dtypes=(INT32,), shape=(num_nodes,), place=place)
    if topk_idx is not None:
        check_topk(place, topk_idx, num_tokens)
    if topk_weights is not None:
        if topk_idx is None:
            raise InputError("topk_weights", got="weights without topk_idx", wanted="both or neither")
        require(topk_weights, "topk_weights", dtypes=(FLOAT32,), shape=topk_idx.shape, place=place)


def _check_cached(topk_idx: Any, topk_weights: Any) -> None:
    if topk_idx is not None or topk_weights is not None:
        raise InputError(
            "dispatch(handle=...)",
            got="topk_idx or topk_weights",
            wanted="neither: a handle stands for the routing of its dispatch",
            do="leave them out, or leave the handle out",
        )


def _check_handle(handle: DispatchHandle, num_tokens: int, num_worst_tokens: int) -> None:
    if num_tokens != handle.num_tokens:
        raise HandleError("x", got=f"{num_tokens} tokens", wanted=f"the {handle.num_tokens} of the handle")
    if num_worst_tokens not in (0, handle.num_worst_tokens):
        raise HandleError(
            "num_worst_tokens", got=str(num_worst_tokens), wanted=f"that of the handle, {handle.num_worst_tokens}"
        )


def combine_request(
    turn: Turn,
    x: Any,
    handle: Any,
    topk_weights: Any,
    bias: Any,
    config: Any,
    *,
    buffer_id: int,
    default: Config,
    num_sms: int,
) -> CombineRequest:
    """The request of ``Buffer.combine``."""
    handle = dispatch_handle(handle, buffer_id, turn)
    rows, weights = import_array(x, "x", stream=turn.stream), _optional(turn, topk_weights, "topk_weights")
    biases: tuple[ArrayView, ...] = ()
    if bias is not None:
        given = bias if isinstance(bias, tuple) else (bias,)
        biases = tuple([import_array(one, "bias", stream=turn.stream) for one in given if one is not None])
    specs = tuple([view.spec for view in biases]) if biases else ()
    _check_combine(turn.place, rows.spec, _spec(weights), specs, handle.num_rows, handle.num_tokens)
    return CombineRequest(
        turn.take(rows),
        None if weights is None else turn.take(weights),
        tuple([turn.take(view) for view in biases]) if biases else (),
        _config(config, default),
        num_sms,
        handle,
    )


@functools.lru_cache(maxsize=NUM_REMEMBERED)
def _check_combine(
    place: Place,
    x: ArraySpec,
    topk_weights: ArraySpec | None,
    biases: tuple[ArraySpec, ...],
    num_rows: int,
    num_tokens: int,
) -> None:
    check_rows(place, x, COMBINE_DTYPES)
    got, hidden = x.shape
    if got != num_rows:
        raise HandleError("x", got=f"{got} rows", wanted=f"the {num_rows} that the dispatch delivered")
    if len(biases) > 2:
        raise InputError("bias", got=f"{len(biases)} arrays", wanted="None, one array or two")
    if topk_weights is not None:
        require(topk_weights, "topk_weights", dtypes=(FLOAT32,), shape=(num_rows, None), place=place)
        num_topk = topk_weights.shape[1]
        if num_topk > MAX_TOPK:
            raise ShapeError("topk_weights", got=f"{num_topk} choices a row", wanted=f"at most {MAX_TOPK}")
    for bias in biases:
        is_aligned = place != "cpu"
        require(bias, "bias", dtypes=(x.dtype,), shape=(num_tokens, hidden), aligned=is_aligned, place=place)


def _optional(turn: Turn, x: Any, name: str) -> ArrayView | None:
    return None if x is None else import_array(x, name, stream=turn.stream)


def _spec(view: ArrayView | None) -> ArraySpec | None:
    return None if view is None else view.spec


def _config(config: Any, default: Config) -> Config:
    if config is None:
        return default
    if not isinstance(config, Config):
        raise InputError("config", got=f"a {type(config).__name__}", wanted="an epcomm.Config or None")
    return config


def _check_layout(
    turn: Turn, mask_view: ArrayView, per_rank: ArrayView, per_node: ArrayView | None, num_nodes: int
) -> None:
    """The counts are those of the mask; on a GPU the kernel that counts compares them."""
    mask, counts = turn.values(mask_view), turn.values(per_rank)
    if mask is None or counts is None:
        return
    _check_counts("num_tokens_per_rank", counts, _column_counts(mask))
    if per_node is not None:
        in_node = np.logical_or.reduce(mask.reshape(len(mask), num_nodes, mask.shape[1] // num_nodes), axis=2)
        _check_counts("num_tokens_per_rdma_rank", per_node.numpy(), _column_counts(in_node))


def _column_counts(mask: NDArray[np.bool_]) -> list[int]:
    """Set entries of each column; for few columns in half the time of ``mask.sum(axis=0)``."""
    return [int(np.count_nonzero(column)) for column in mask.T]


def _check_counts(name: str, got: NDArray[Any], wanted: list[int]) -> None:
    if got.tolist() != wanted:
        raise RoutingError(
            name,
            got=str(got.tolist()[:16]),
            wanted=str(wanted[:16]),
            do="pass what get_dispatch_layout returned for this topk_idx",
        )
