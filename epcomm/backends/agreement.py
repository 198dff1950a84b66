"""What ranks compare at the start of a call, on every backend: names and values, and the error when they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epcomm.backends.protocol import (
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
)
from epcomm.config import Config
from epcomm.errors import RankMismatch
from epcomm.numerics import ROW_DTYPES

__all__ = [
    "CACHED_DISPATCH",
    "COMBINE",
    "DISPATCH",
    "LOW_LATENCY_COMBINE",
    "LOW_LATENCY_DISPATCH",
    "cached_dispatch_values",
    "check_agreed",
    "combine_values",
    "dispatch_values",
    "low_latency_combine_values",
    "low_latency_dispatch_values",
    "show",
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
LOW_LATENCY_COMBINE = (*_LOW_LATENCY, "use_logfmt", "pre_reduce")

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES)}


def _config_values(config: Config) -> tuple[int, ...]:
    """The chunk sizes; ranks may differ in their number of SMs."""
    return (
        config.num_max_nvl_chunked_send_tokens,
        config.num_max_nvl_chunked_recv_tokens,
        config.num_max_rdma_chunked_send_tokens,
        config.num_max_rdma_chunked_recv_tokens,
    )


def _payload_values(request: DispatchRequest) -> tuple[int, ...]:
    x, scales = request.x, request.scales
    num_scales, itemsize = (0, 0) if scales is None else (math.prod(scales.shape[1:]), scales.dtype.itemsize)
    return (x.shape[1], _DTYPE_CODES[x.dtype], num_scales, itemsize)


def dispatch_values(request: DispatchRequest) -> tuple[int, ...]:
    """Values of `DISPATCH`, of a dispatch without handle."""
    topk_idx = request.topk_idx
    return (
        *_payload_values(request),
        0 if topk_idx is None else topk_idx.shape[1],
        request.num_experts,
        0 if topk_idx is None else topk_idx.dtype.itemsize,
        request.topk_weights is not None,
        request.num_worst_tokens,
        request.expert_alignment,
        *_config_values(request.config),
    )


def cached_dispatch_values(request: DispatchRequest, dispatch_id: int) -> tuple[int, ...]:
    """Values of `CACHED_DISPATCH`, of the dispatch that the handle is of."""
    return (*_payload_values(request), dispatch_id, *_config_values(request.config))


def combine_values(request: CombineRequest) -> tuple[int, ...]:
    """Values of `COMBINE`."""
    x, weights = request.x, request.topk_weights
    return (
        x.shape[1],
        _DTYPE_CODES[x.dtype],
        0 if weights is None else weights.shape[1],
        request.handle.dispatch_id,
        *_config_values(request.config),
    )


def low_latency_dispatch_values(request: LowLatencyDispatchRequest) -> tuple[int, ...]:
    """Values of `LOW_LATENCY_DISPATCH`."""
    return (
        request.x.shape[1],
        request.topk_idx.shape[1],
        request.num_experts,
        request.num_max_dispatch_tokens_per_rank,
        request.use_fp8,
        request.round_scale,
        request.use_ue8m0,
    )


def low_latency_combine_values(request: LowLatencyCombineRequest) -> tuple[int, ...]:
    """Values of `LOW_LATENCY_COMBINE`."""
    handle = request.handle
    return (
        handle.hidden,
        request.topk_idx.shape[1],
        handle.num_experts,
        handle.num_max_dispatch_tokens_per_rank,
        request.use_logfmt,
        request.pre_reduce,
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
