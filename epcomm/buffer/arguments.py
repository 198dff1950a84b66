"""Checks that the arguments of all operations share. Local; nothing is sent.

The `Turn` of a call says where arrays must lie, and what the backend's requests hold of them. What can be wrong about
an array, but for its values, its `ArraySpec` tells: the checks of an operation are a cached function of specs and
sizes, and cost a call that looks like an earlier one a look-up.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArraySpec, Place, require
from epcomm.errors import DtypeError, ImmutableArray, RoutingError, ShapeError
from epcomm.numerics import COMBINE_DTYPES

__all__ = [
    "BOOL",
    "FLOAT32",
    "INT32",
    "INTEGERS",
    "MAX_TOPK",
    "NUM_REMEMBERED",
    "check_num_experts",
    "check_rows",
    "check_topk",
    "check_topk_values",
    "combine_dtype",
    "numpy_dtype",
    "positive_argument",
    "writable_framework",
]

BOOL = np.dtype(np.bool_)
FLOAT32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)

INTEGERS = (int, np.integer)
MAX_TOPK = 32
NUM_REMEMBERED = 1024  # results that a cached check keeps
_ROW_UNIT = 16  # bytes; rows move in units of this
_INDEX_DTYPES = (INT32, np.dtype(np.int64))


def check_rows(place: Place, x: ArraySpec, dtypes: tuple[np.dtype[Any], ...], ndim: int = 2) -> None:
    require(x, "x", dtypes=dtypes, ndim=ndim, aligned=True, place=place)
    row_bytes = x.shape[-1] * x.dtype.itemsize
    if row_bytes == 0 or row_bytes % _ROW_UNIT:
        raise ShapeError(
            "x",
            got=f"hidden {x.shape[-1]} ({row_bytes} bytes a row)",
            wanted=f"rows of a multiple of {_ROW_UNIT} bytes",
            do="pad hidden",
        )


def check_topk(place: Place, topk_idx: ArraySpec, num_tokens: int | None) -> None:
    """Expert indices are ``[T, num_topk]``."""
    require(topk_idx, "topk_idx", dtypes=_INDEX_DTYPES, shape=(num_tokens, None), place=place)
    num_topk = topk_idx.shape[1]
    if not 1 <= num_topk <= MAX_TOPK:
        raise ShapeError("topk_idx", got=f"num_topk {num_topk}", wanted=f"1 to {MAX_TOPK} choices a token")


def positive_argument(value: Any, name: str) -> int:
    if not isinstance(value, INTEGERS) or value < 1:
        raise ShapeError(name, got=repr(value), wanted="an integer of at least 1")
    return int(value)


def check_num_experts(num_experts: int, num_ranks: int) -> None:
    """Raise ShapeError unless every rank owns the same number of experts, at least one."""
    if not isinstance(num_experts, INTEGERS) or num_experts < 1 or num_experts % num_ranks:
        raise ShapeError(
            "num_experts",
            got=repr(num_experts),
            wanted=f"a multiple of the {num_ranks} ranks",
            do="add experts that no token selects",
        )


def check_topk_values(indices: NDArray[Any], num_experts: int) -> None:
    """Raise RoutingError for an index outside ``[-1, num_experts)``, or an expert twice in a row."""
    bad = np.argwhere((indices < -1) | (indices >= num_experts))
    if len(bad):
        token, choice = bad[0]
        raise RoutingError(
            f"topk_idx[{token}, {choice}]",
            got=str(indices[token, choice]),
            wanted=f"-1 or an expert below {num_experts}",
        )
    ordered = np.sort(indices, axis=1)
    twice = np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
    if len(twice):
        token, choice = twice[0]
        raise RoutingError(
            f"topk_idx[{token}]",
            got=f"expert {ordered[token, choice]} more than once",
            wanted="different experts, or -1",
        )


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype of a dtype of NumPy, ml_dtypes, JAX or torch, or of its name."""
    name = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    try:
        return np.dtype(getattr(ml_dtypes, name, name) if isinstance(name, str) else name)
    except TypeError as error:
        raise DtypeError("dtype", got=repr(dtype), wanted="a dtype of NumPy, ml_dtypes or torch") from error


def combine_dtype(dtype: Any) -> np.dtype[Any]:
    """`numpy_dtype`, if combine can sum it."""
    element = numpy_dtype(dtype)
    if element not in COMBINE_DTYPES:
        raise DtypeError("dtype", got=element.name, wanted=" or ".join(d.name for d in COMBINE_DTYPES))
    return element


def writable_framework(framework: str, what: str, do: str) -> None:
    """Raise ImmutableArray where memory would be handed out in a framework whose arrays never change."""
    if framework == "jax":
        raise ImmutableArray(what, got="a JAX handle", wanted="a framework with writable arrays", do=do)
