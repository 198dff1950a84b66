"""Arguments of dispatch and combine: user arrays in, requests for the backend out. Local; nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArrayView, import_array
from epcomm.backends import Array, CombineRequest, DispatchRequest, Turn
from epcomm.buffer.arguments import (
    BOOL,
    FLOAT32,
    INT32,
    MAX_TOPK,
    array_argument,
    bias_argument,
    check_num_experts,
    positive_argument,
    rows_argument,
    topk_indices,
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
    num_sms: Callable[[Any], int],
    check: bool,
) -> DispatchRequest:
    """The request of ``Buffer.dispatch``, whose arguments these are; the keywords describe the Buffer."""
    x, scales = x if isinstance(x, tuple) else (x, None)
    rows = rows_argument(turn, x, "x", ROW_DTYPES)
    num_tokens = rows.shape[0]
    common: dict[str, Any] = {
        "x": turn.take(rows),
        "scales": None if scales is None else _scales(turn, scales, num_tokens),
        "expert_alignment": positive_argument(expert_alignment, "expert_alignment"),
        "config": _config(config, default),
        "num_sms": num_sms(config),
    }
    if handle is not None:
        return _cached_request(turn, handle, num_tokens, topk_idx, topk_weights, num_worst_tokens, common, buffer_id)
    if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
        raise InputError(
            "dispatch",
            got="neither a handle nor the whole layout",
            wanted="num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert",
            do="pass what get_dispatch_layout returned",
        )
    if not isinstance(num_worst_tokens, int | np.integer) or num_worst_tokens < 0:
        raise ShapeError("num_worst_tokens", got=repr(num_worst_tokens), wanted="0 or more rows")
    mask = array_argument(turn, is_token_in_rank, "is_token_in_rank", (BOOL,), (num_tokens, num_ranks))
    per_rank = array_argument(turn, num_tokens_per_rank, "num_tokens_per_rank", (INT32,), (num_ranks,))
    per_expert = array_argument(turn, num_tokens_per_expert, "num_tokens_per_expert", (INT32,), (None,))
    num_experts = per_expert.shape[0]
    check_num_experts(num_experts, num_ranks)
    per_node = None
    if num_tokens_per_rdma_rank is not None:
        per_node = array_argument(turn, num_tokens_per_rdma_rank, "num_tokens_per_rdma_rank", (INT32,), (num_nodes,))
    _check_layout(turn, mask, per_rank, per_node, num_nodes)
    indices = weights = None
    if topk_idx is not None:
        indices = topk_indices(turn, topk_idx, num_tokens, num_experts, check)
        if check:
            values = turn.checked_values(indices)
            chosen = np.bincount(values[values >= 0], minlength=num_experts)
            _check_counts("num_tokens_per_expert", turn.checked_values(per_expert), chosen.tolist())
    if topk_weights is not None:
        if indices is None:
            raise InputError("topk_weights", got="weights without topk_idx", wanted="both or neither")
        weights = array_argument(turn, topk_weights, "topk_weights", (FLOAT32,), (num_tokens, indices.shape[1]))
    return DispatchRequest(
        topk_idx=None if indices is None else turn.take(indices),
        topk_weights=None if weights is None else turn.take(weights),
        is_token_in_rank=turn.take(mask),
        num_tokens_per_rank=turn.take(per_rank),
        num_tokens_per_expert=turn.take(per_expert),
        num_experts=num_experts,
        num_worst_tokens=int(num_worst_tokens),
        handle=None,
        **common,
    )


def _cached_request(
    turn: Turn,
    handle: Any,
    num_tokens: int,
    topk_idx: Any,
    topk_weights: Any,
    num_worst_tokens: int,
    common: dict[str, Any],
    buffer_id: int,
) -> DispatchRequest:
    if topk_idx is not None or topk_weights is not None:
        raise InputError(
            "dispatch(handle=...)",
            got="topk_idx or topk_weights",
            wanted="neither: a handle stands for the routing of its dispatch",
            do="leave them out, or leave the handle out",
        )
    handle = dispatch_handle(handle, buffer_id, turn)
    if num_tokens != handle.num_tokens:
        raise HandleError("x", got=f"{num_tokens} tokens", wanted=f"the {handle.num_tokens} of the handle")
    if num_worst_tokens not in (0, handle.num_worst_tokens):
        raise HandleError(
            "num_worst_tokens", got=str(num_worst_tokens), wanted=f"that of the handle, {handle.num_worst_tokens}"
        )
    return DispatchRequest(
        topk_idx=None,
        topk_weights=None,
        is_token_in_rank=handle.is_token_in_rank,
        num_tokens_per_rank=None,
        num_tokens_per_expert=None,
        num_experts=handle.num_experts,
        num_worst_tokens=handle.num_worst_tokens,
        handle=handle,
        **common,
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
    num_sms: Callable[[Any], int],
) -> CombineRequest:
    """The request of ``Buffer.combine``."""
    handle = dispatch_handle(handle, buffer_id, turn)
    rows = rows_argument(turn, x, "x", COMBINE_DTYPES)
    num_rows, hidden = rows.shape
    if num_rows != handle.num_rows:
        raise HandleError("x", got=f"{num_rows} rows", wanted=f"the {handle.num_rows} that the dispatch delivered")
    biases = tuple(b for b in (bias if isinstance(bias, tuple) else (bias,)) if b is not None)
    if len(biases) > 2:
        raise InputError("bias", got=f"{len(biases)} arrays", wanted="None, one array or two")
    shape = (handle.num_tokens, hidden)
    weights = None
    if topk_weights is not None:
        view = array_argument(turn, topk_weights, "topk_weights", (FLOAT32,), (handle.num_rows, None))
        if view.shape[1] > MAX_TOPK:
            raise ShapeError("topk_weights", got=f"{view.shape[1]} choices a row", wanted=f"at most {MAX_TOPK}")
        weights = turn.take(view)
    return CombineRequest(
        x=turn.take(rows),
        topk_weights=weights,
        biases=tuple(turn.take(bias_argument(turn, b, rows.dtype, shape)) for b in biases),
        config=_config(config, default),
        num_sms=num_sms(config),
        handle=handle,
    )


def _config(config: Any, default: Config) -> Config:
    if config is None:
        return default
    if not isinstance(config, Config):
        raise InputError("config", got=f"a {type(config).__name__}", wanted="an epcomm.Config or None")
    return config


def _scales(turn: Turn, scales: Any, num_tokens: int) -> Array:
    view = import_array(scales, "scales", stream=turn.stream)
    turn.check(view, "scales", contiguous=False)
    if view.dtype.itemsize not in (1, 2, 4):
        raise DtypeError("scales", got=view.dtype.name, wanted="elements of 1, 2 or 4 bytes")
    if len(view.shape) not in (1, 2) or view.shape[0] != num_tokens:
        raise ShapeError(
            "scales", got=f"shape {list(view.shape)}", wanted=f"[{num_tokens}] or [{num_tokens}, num_scales]"
        )
    return turn.take(view)


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
