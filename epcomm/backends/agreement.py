"""What ranks compare at the start of a call, on every backend: names and values, and the error when they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from epcomm.backends.protocol import DispatchRequest
from epcomm.config import Config
from epcomm.errors import RankMismatch
from epcomm.numerics import ROW_DTYPES

__all__ = [
    "CONFIG",
    "DISPATCH",
    "PAYLOAD",
    "check_agreed",
    "config_values",
    "dispatch_values",
    "payload_values",
    "show",
]

PAYLOAD = ("hidden", "dtype", "num_scales", "scales_itemsize")
CONFIG = ("config nvl_send", "config nvl_recv", "config rdma_send", "config rdma_recv")
DISPATCH = (
    *PAYLOAD,
    "num_topk",
    "num_experts",
    "topk_idx itemsize",
    "topk_weights",
    "num_worst_tokens",
    "expert_alignment",
    *CONFIG,
)


_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES)}


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Number of a row dtype."""
    return _DTYPE_CODES[dtype]


def config_values(config: Config) -> tuple[int, ...]:
    """The chunk sizes; ranks may differ in their number of SMs."""
    return (
        config.num_max_nvl_chunked_send_tokens,
        config.num_max_nvl_chunked_recv_tokens,
        config.num_max_rdma_chunked_send_tokens,
        config.num_max_rdma_chunked_recv_tokens,
    )


def payload_values(request: DispatchRequest) -> tuple[int, ...]:
    """Values of `PAYLOAD`."""
    x, scales = request.x, request.scales
    num_scales, itemsize = (0, 0) if scales is None else (math.prod(scales.shape[1:]), scales.dtype.itemsize)
    return (x.shape[1], dtype_code(x.dtype), num_scales, itemsize)


def dispatch_values(request: DispatchRequest) -> tuple[int, ...]:
    """Values of `DISPATCH`, of a dispatch without handle."""
    topk_idx = request.topk_idx
    return (
        *payload_values(request),
        0 if topk_idx is None else topk_idx.shape[1],
        request.num_experts,
        0 if topk_idx is None else topk_idx.dtype.itemsize,
        request.topk_weights is not None,
        request.num_worst_tokens,
        request.expert_alignment,
        *config_values(request.config),
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
