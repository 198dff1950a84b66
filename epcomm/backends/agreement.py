"""What ranks compare at the start of a call, on every backend: names and values, and the error when they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from epcomm.backends.protocol import DispatchRequest, LowLatencyCombineTerms, LowLatencyDispatchTerms
from epcomm.config import Config
from epcomm.errors import RankMismatch
from epcomm.numerics import ROW_DTYPES

__all__ = [
    "CACHED_DISPATCH",
    "COMBINE",
    "DISPATCH",
    "LOW_LATENCY_COMBINE",
    "LOW_LATENCY_DISPATCH",
    "check_agreed",
    "combine_payload",
    "dispatch_payload",
    "dispatch_values",
    "low_latency_combine_values",
    "low_latency_dispatch_values",
    "show",
    "values_with_handle",
]

_PAYLOAD = ("hidden", "dtype", "num_scales", "scales_itemsize")
_CONFIG = ("config nvl_send", "config nvl_recv", "config rdma_send", "config rdma_recv")
DISPATCH = (
    *_PAYLOAD,
    "num_topk",
    "num_experts",
    "topk_idx itemsize",
    "topk_weights",
    "num_worst_tokens",
    "expert_alignment",
    *_CONFIG,
)
CACHED_DISPATCH = (*_PAYLOAD, "handle of dispatch", *_CONFIG)
COMBINE = ("hidden", "dtype", "num_topk", "handle of dispatch", *_CONFIG)
_LOW_LATENCY = ("hidden", "num_topk", "num_experts", "num_max_dispatch_tokens_per_rank")
LOW_LATENCY_DISPATCH = (*_LOW_LATENCY, "use_fp8", "round_scale", "use_ue8m0")
LOW_LATENCY_COMBINE = (*_LOW_LATENCY, "use_logfmt", "pre_reduce", "return_recv_hook", "handle of dispatch")

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES)}


class _Looks(Protocol):
    """An array, or its `ArraySpec`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def _config_values(config: Config) -> tuple[int, int, int, int]:
    """The chunk sizes; ranks may differ in their number of SMs."""
    return (
        config.num_max_nvl_chunked_send_tokens,
        config.num_max_nvl_chunked_recv_tokens,
        config.num_max_rdma_chunked_send_tokens,
        config.num_max_rdma_chunked_recv_tokens,
    )


def dispatch_payload(x: _Looks, scales: _Looks | None) -> tuple[int, ...]:
    """What dispatches agree on about their rows."""
    num_scales, itemsize = (0, 0) if scales is None else (math.prod(scales.shape[1:]), scales.dtype.itemsize)
    return (x.shape[1], _DTYPE_CODES[x.dtype], num_scales, itemsize)


def combine_payload(hidden: int, dtype: np.dtype[Any], num_topk: int) -> tuple[int, ...]:
    """What combines agree on about their rows; 0 choices without weights."""
    return (hidden, _DTYPE_CODES[dtype], num_topk)


def dispatch_values(request: DispatchRequest) -> tuple[int, ...]:
    """Values of `DISPATCH`, of a dispatch without handle."""
    topk_idx = request.topk_idx
    return (
        *dispatch_payload(request.x, request.scales),
        0 if topk_idx is None else topk_idx.shape[1],
        request.num_experts,
        0 if topk_idx is None else topk_idx.dtype.itemsize,
        request.topk_weights is not None,
        request.num_worst_tokens,
        request.expert_alignment,
        *_config_values(request.config),
    )


def values_with_handle(payload: tuple[int, ...], dispatch_id: int, config: Config) -> tuple[int, ...]:
    """Values of `CACHED_DISPATCH`, with a `dispatch_payload`, or of `COMBINE`, with a `combine_payload`.

    Args:
        payload: see above.
        dispatch_id: of the dispatch that the handle is of.
        config: of the call.
    """
    return (*payload, dispatch_id, *_config_values(config))


def low_latency_dispatch_values(terms: LowLatencyDispatchTerms) -> tuple[int, ...]:
    """Values of `LOW_LATENCY_DISPATCH`."""
    return (
        terms.hidden,
        terms.num_topk,
        terms.num_experts,
        terms.num_max_dispatch_tokens_per_rank,
        terms.use_fp8,
        terms.round_scale,
        terms.use_ue8m0,
    )


def low_latency_combine_values(terms: LowLatencyCombineTerms) -> tuple[int, ...]:
    """Values of `LOW_LATENCY_COMBINE`, but for the last one, the `dispatch_id` of the handle."""
    return (
        terms.hidden,
        terms.num_topk,
        terms.num_experts,
        terms.num_max_dispatch_tokens_per_rank,
        terms.use_logfmt,
        terms.pre_reduce,
        terms.is_postponed,
    )


def show(name: str, value: int) -> str:
    """A value as a message shows it."""
    return ROW_DTYPES[value].name if name == "dtype" else str(value)


def check_agreed(what: str, names: Sequence[str], values: Sequence[Sequence[int]]) -> None:
    """Raise RankMismatch with the values that differ; ``values[rank]`` are those of `names`."""
    table = {}
    for index, name in enumerate(names):
        column = [row[index] for row in values]
        if len(set(column)) > 1:
            table[name] = [show(name, value) for value in column]
    if table:
        raise RankMismatch(f"{what}: ranks disagree", table)
