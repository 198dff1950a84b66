"""Routing generators and row data, functions of the seed and of the global token index."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from epcomm.errors import DtypeError, RoutingError, ShapeError
from epcomm.testing.values import create_grouped_scores

__all__ = [
    "grouped_routing",
    "masked_routing",
    "one_hot_routing",
    "token_data",
    "uniform_routing",
    "zipf_routing",
]

Array: TypeAlias = NDArray[Any]

# Rows are hashed in pieces of about this many elements, which stay in the cache between the steps.
_BLOCK_ELEMENTS = 1 << 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(h: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, in place: every input bit reaches every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h ^= h >> np.uint64(shift)
        h *= np.uint64(factor)
    h ^= h >> np.uint64(31)
    return h


def _hashes(seed: int, first_token: int, num_tokens: int, num_columns: int) -> NDArray[np.uint64]:
    """uint64 ``[num_tokens, num_columns]``, a function of (seed, token, column) that looks random."""
    key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    tokens = np.arange(first_token, first_token + num_tokens, dtype=np.uint64)
    columns = np.arange(num_columns, dtype=np.uint64)
    return _mix(_mix(tokens * _GOLDEN + key)[:, None] + columns * _GOLDEN)


def _unit(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform in (0, 1]; never 0, so it has a logarithm and differs from a masked score."""
    return ((hashes >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def _topk(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """int64 ``[T, k]``, the columns with the largest scores of each row, largest first."""
    if not 0 < k <= scores.shape[1]:
        raise ShapeError("num_topk", got=k, wanted=f"1 .. {scores.shape[1]}, the number of experts (or groups)")
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1).astype(np.int64, copy=False)


def uniform_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int, first_token: int = 0
) -> NDArray[np.int64]:
    """Every set of experts equally likely.

    Args:
        num_tokens: T, may be 0.
        num_experts: E.
        num_topk: K, 1 .. E.
        seed: any integer.
        first_token: global index of the first token.

    Returns:
        topk_idx, int64 ``[T, K]``, different experts in every row.

    Raises:
        ShapeError: `num_topk` is not in 1 .. E.
    """
    return _topk(_unit(_hashes(seed, first_token, num_tokens, num_experts)), num_topk)


def zipf_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int, first_token: int = 0, exponent: float = 1.2
) -> NDArray[np.int64]:
    """Expert e drawn with weight ``1 / (e + 1) ** exponent``, without replacement.

    The popular experts are neighbours, so rank 0 gets most of the tokens: the least balanced placement.
    Arguments, result and errors as for `uniform_routing`.
    """
    weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    # Exponential race: with arrival times of rate w, the first K to arrive are K draws without replacement.
    arrival = -np.log(_unit(_hashes(seed, first_token, num_tokens, num_experts))) / weights
    return _topk(-arrival, num_topk)


def grouped_routing(
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    *,
    seed: int,
    num_groups: int,
    num_topk_groups: int,
    first_token: int = 0,
) -> NDArray[np.int64]:
    """Group-limited routing: the experts of a token lie in its `num_topk_groups` best groups.

    A group is ``E / num_groups`` neighbours, say the experts of one node; its score is that of its best
    expert. Other arguments and the result as for `uniform_routing`.

    Raises:
        ShapeError: E is not a multiple of `num_groups`, or the chosen groups have fewer than K experts.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError("num_experts", got=num_experts, wanted=f"a multiple of num_groups={num_groups}")
    if num_topk > num_topk_groups * (num_experts // num_groups):
        raise ShapeError(
            "num_topk", got=num_topk, wanted=f"at most {num_topk_groups} groups of {num_experts // num_groups} experts"
        )
    scores = _unit(_hashes(seed, first_token, num_tokens, num_experts))
    group_scores = scores.reshape(num_tokens, num_groups, num_experts // num_groups).max(axis=2)
    return _topk(create_grouped_scores(scores, _topk(group_scores, num_topk_groups), num_groups), num_topk)


def one_hot_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int = 0, first_token: int = 0, expert: int = 0
) -> NDArray[np.int64]:
    """One expert takes all: the first choice of every token is `expert`, the others are -1.

    `seed` and `first_token` change nothing; they are there so that generators can be exchanged.

    Raises:
        RoutingError: `expert` is not in 0 .. E - 1.
    """
    if not 0 <= expert < num_experts:
        raise RoutingError("expert", got=expert, wanted=f"0 .. {num_experts - 1}")
    topk_idx = np.full((num_tokens, num_topk), -1, np.int64)
    topk_idx[:, :1] = expert
    return topk_idx


def masked_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int, masked_fraction: float, first_token: int = 0
) -> NDArray[np.int64]:
    """`uniform_routing` with about `masked_fraction` (0 .. 1) of the entries set to -1.

    Some tokens lose all their choices.
    """
    topk_idx = uniform_routing(num_tokens, num_experts, num_topk, seed=seed, first_token=first_token)
    # ~seed: hashes that have nothing to do with those that chose the experts.
    topk_idx[_unit(_hashes(~seed, first_token, num_tokens, num_topk)) <= masked_fraction] = -1
    return topk_idx


def token_data(num_tokens: int, hidden: int, dtype: DTypeLike, *, seed: int = 0, first_token: int = 0) -> Array:
    """Rows that look random.

    Floats lie in [-4, 4], one element in 64 is -0; 8-bit integers take all their values.

    Args:
        num_tokens: T, may be 0.
        hidden: H, channels.
        dtype: bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8.
        seed: any integer.
        first_token: global index of the first token.

    Returns:
        ``[T, H]`` of `dtype`.

    Raises:
        DtypeError: another dtype.
    """
    dtype = np.dtype(dtype)
    names = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int8")
    if dtype.name not in names:
        raise DtypeError("dtype", got=dtype.name, wanted=f"one of {', '.join(names)}")
    x = np.empty((num_tokens, hidden), dtype)
    rows_per_block = max(1, _BLOCK_ELEMENTS // max(1, hidden))
    for begin in range(0, num_tokens, rows_per_block):
        block = x[begin : begin + rows_per_block]
        hashes = _hashes(seed, first_token + begin, *block.shape)
        if dtype.itemsize == 1 and dtype.kind in "iu":
            block.view(np.uint8)[...] = hashes >> np.uint64(56)
            continue
        values = (hashes >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-21) - np.float32(4)
        values[hashes & np.uint64(63) == 0] = -0.0
        block[...] = values.astype(dtype)
    return x
