"""Arguments of dispatch and combine: user arrays in, requests for the backend out. Local; nothing is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import import_array, require
from epcomm.backends import CombineRequest, DispatchRequest
from epcomm.buffer.arguments import (
    FLOAT32,
    INT32,
    array_argument,
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


def dispatch_handle(handle: Any, buffer_id: int) -> DispatchHandle:
    """Raise HandleError unless `handle` came from this Buffer's dispatch."""
    if not isinstance(handle, DispatchHandle):
        raise HandleError("handle", got=f"a {type(handle).__name__}", wanted="the handle that dispatch returned")
    if handle.buffer_id != buffer_id:
        raise HandleError(
            "handle", got="the handle of another Buffer", wanted="one that this Buffer's dispatch returned"
        )
    return handle.with_numpy_leaves()


def dispatch_request(
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
    check: bool,
) -> DispatchRequest:
    """The request of ``Buffer.dispatch``, whose arguments these are; the keywords describe the Buffer."""
    x, scales = x if isinstance(x, tuple) else (x, None)
    rows = rows_argument(x, "x", ROW_DTYPES).numpy()
    num_tokens = len(rows)
    common: dict[str, Any] = {
        "x": rows,
        "scales": None if scales is None else _scales(scales, num_tokens),
        "expert_alignment": positive_argument(expert_alignment, "expert_alignment"),
        "config": _config(config, default),
    }
    if handle is not None:
        return _cached_request(handle, topk_idx, topk_weights, num_worst_tokens, common, buffer_id)
    if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
        raise InputError(
            "dispatch",
            got="neither a handle nor the whole layout",
            wanted="num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert",
            do="pass what get_dispatch_layout returned",
        )
    if not isinstance(num_worst_tokens, int | np.integer) or num_worst_tokens < 0:
        raise ShapeError("num_worst_tokens", got=repr(num_worst_tokens), wanted="0 or more rows")
    mask = array_argument(is_token_in_rank, "is_token_in_rank", (np.dtype(np.bool_),), (num_tokens, num_ranks))
    per_rank = array_argument(num_tokens_per_rank, "num_tokens_per_rank", (INT32,), (num_ranks,))
    per_expert = array_argument(num_tokens_per_expert, "num_tokens_per_expert", (INT32,), (None,))
    num_experts = len(per_expert)
    check_num_experts(num_experts, num_ranks)
    _check_counts("num_tokens_per_rank", per_rank, _column_counts(mask))
    if num_tokens_per_rdma_rank is not None:
        per_node = array_argument(num_tokens_per_rdma_rank, "num_tokens_per_rdma_rank", (INT32,), (num_nodes,))
        in_node = mask.reshape(num_tokens, num_nodes, num_ranks // num_nodes).any(axis=2)
        _check_counts("num_tokens_per_rdma_rank", per_node, _column_counts(np.asarray(in_node)))
    indices = weights = None
    if topk_idx is not None:
        indices = topk_indices(topk_idx, num_tokens, num_experts, check).numpy()
        if check:
            chosen = np.bincount(indices[indices >= 0], minlength=num_experts)
            _check_counts("num_tokens_per_expert", per_expert, chosen.tolist())
    if topk_weights is not None:
        if indices is None:
            raise InputError("topk_weights", got="weights without topk_idx", wanted="both or neither")
        weights = array_argument(topk_weights, "topk_weights", (FLOAT32,), (num_tokens, indices.shape[1]))
    return DispatchRequest(
        topk_idx=indices,
        topk_weights=weights,
        is_token_in_rank=mask,
        num_tokens_per_expert=per_expert,
        num_experts=num_experts,
        num_worst_tokens=int(num_worst_tokens),
        handle=None,
        **common,
    )


def _cached_request(
    handle: Any, topk_idx: Any, topk_weights: Any, num_worst_tokens: int, common: dict[str, Any], buffer_id: int
) -> DispatchRequest:
    if topk_idx is not None or topk_weights is not None:
        raise InputError(
            "dispatch(handle=...)",
            got="topk_idx or topk_weights",
            wanted="neither: a handle stands for the routing of its dispatch",
            do="leave them out, or leave the handle out",
        )
    handle = dispatch_handle(handle, buffer_id)
    if len(common["x"]) != handle.num_tokens:
        raise HandleError("x", got=f"{len(common['x'])} tokens", wanted=f"the {handle.num_tokens} of the handle")
    if num_worst_tokens not in (0, handle.num_worst_tokens):
        raise HandleError(
            "num_worst_tokens", got=str(num_worst_tokens), wanted=f"that of the handle, {handle.num_worst_tokens}"
        )
    return DispatchRequest(
        topk_idx=None,
        topk_weights=None,
        is_token_in_rank=handle.is_token_in_rank,
        num_tokens_per_expert=None,
        num_experts=handle.num_experts,
        num_worst_tokens=handle.num_worst_tokens,
        handle=handle,
        **common,
    )


def combine_request(
    x: Any, handle: Any, topk_weights: Any, bias: Any, config: Any, *, buffer_id: int, default: Config
) -> CombineRequest:
    """The request of ``Buffer.combine``."""
    handle = dispatch_handle(handle, buffer_id)
    rows = rows_argument(x, "x", COMBINE_DTYPES).numpy()
    if len(rows) != handle.num_rows:
        raise HandleError("x", got=f"{len(rows)} rows", wanted=f"the {handle.num_rows} that the dispatch delivered")
    biases = tuple(b for b in (bias if isinstance(bias, tuple) else (bias,)) if b is not None)
    if len(biases) > 2:
        raise InputError("bias", got=f"{len(biases)} arrays", wanted="None, one array or two")
    shape = (handle.num_tokens, rows.shape[1])
    return CombineRequest(
        x=rows,
        topk_weights=None
        if topk_weights is None
        else array_argument(topk_weights, "topk_weights", (FLOAT32,), (handle.num_rows, None)),
        biases=tuple(array_argument(b, "bias", (rows.dtype,), shape) for b in biases),
        config=_config(config, default),
        handle=handle,
    )


def _config(config: Any, default: Config) -> Config:
    if config is None:
        return default
    if not isinstance(config, Config):
        raise InputError("config", got=f"a {type(config).__name__}", wanted="an epcomm.Config or None")
    return config


def _scales(scales: Any, num_tokens: int) -> NDArray[Any]:
    view = import_array(scales, "scales")
    require(view, "scales", contiguous=False)
    if view.dtype.itemsize not in (1, 2, 4):
        raise DtypeError("scales", got=view.dtype.name, wanted="elements of 1, 2 or 4 bytes")
    if len(view.shape) not in (1, 2) or view.shape[0] != num_tokens:
        raise ShapeError(
            "scales", got=f"shape {list(view.shape)}", wanted=f"[{num_tokens}] or [{num_tokens}, num_scales]"
        )
    return view.numpy()


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
