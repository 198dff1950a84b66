"""What the parts of the oracle share: sizes and routing that make sense, and no warnings about NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from epcomm.errors import RoutingError, ShapeError

__all__ = ["Array", "check_routing", "check_rows", "divide", "ieee_754"]

Array: TypeAlias = NDArray[Any]

# NaN, Inf and overflow are results here, not events to warn about.
ieee_754 = np.errstate(all="ignore")


def divide(name: str, total: int, parts: int) -> int:
    if parts < 1 or total < 1 or total % parts:
        raise ShapeError(name, got=total, wanted=f"a positive multiple of {parts}")
    return total // parts


def check_rows(name: str, arrays: Sequence[Array], num_tokens: Sequence[int]) -> None:
    got = [len(array) for array in arrays]
    if got != list(num_tokens):
        raise ShapeError(name, got=f"{got} rows on the ranks", wanted=list(num_tokens), do="one row for each token")


def check_routing(topk_idx: Array, num_experts: int) -> None:
    """Every index is -1 or an expert, and no expert is twice in a row."""
    if topk_idx.ndim != 2:
        raise ShapeError("topk_idx", got=f"shape {topk_idx.shape}", wanted="[num_tokens, num_topk]")
    for token, choices in enumerate(topk_idx.tolist()):
        experts = [expert for expert in choices if expert != -1]
        if any(not 0 <= expert < num_experts for expert in experts):
            raise RoutingError(f"topk_idx[{token}]", got=choices, wanted=f"-1 or 0 .. {num_experts - 1}")
        if len(set(experts)) < len(experts):
            raise RoutingError(f"topk_idx[{token}]", got=choices, wanted="different experts")
