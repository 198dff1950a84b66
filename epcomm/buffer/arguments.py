"""Checks that the arguments of all operations share. Local; nothing is sent.

The `Turn` of a call says on which device arrays must lie, and what the backend's requests hold of them.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArrayView, import_array
from epcomm.backends import Array, Turn
from epcomm.errors import DtypeError, ImmutableArray, RoutingError, ShapeError
from epcomm.numerics import COMBINE_DTYPES

__all__ = [
    "BOOL",
    "FLOAT32",
    "INT32",
    "MAX_TOPK",
    "array_argument",
    "bias_argument",
    "check_num_experts",
    "combine_dtype",
    "numpy_dtype",
    "positive_argument",
    "rows_argument",
    "topk_indices",
    "writable_argument",
    "writable_framework",
]

BOOL = np.dtype(np.bool_)
FLOAT32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)

MAX_TOPK = 32
_ROW_UNIT = 16  # bytes; rows move in units of this
_INDEX_DTYPES = (INT32, np.dtype(np.int64))


def rows_argument(turn: Turn, x: Any, name: str, dtypes: tuple[np.dtype[Any], ...], ndim: int = 2) -> ArrayView:
    view = import_array(x, name, stream=turn.stream)
    turn.check(view, name, dtypes=dtypes, ndim=ndim, aligned=True)
    row_bytes = view.shape[-1] * view.dtype.itemsize
    if row_bytes == 0 or row_bytes % _ROW_UNIT:
        raise ShapeError(
            name,
            got=f"hidden {view.shape[-1]} ({row_bytes} bytes a row)",
            wanted=f"rows of a multiple of {_ROW_UNIT} bytes",
            do="pad hidden",
        )
    return view


def array_argument(
    turn: Turn, x: Any, name: str, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int | None, ...]
) -> ArrayView:
    view = import_array(x, name, stream=turn.stream)
    turn.check(view, name, dtypes=dtypes, shape=shape)
    return view


def bias_argument(turn: Turn, bias: Any, dtype: np.dtype[Any], shape: tuple[int, int]) -> ArrayView:
    view = import_array(bias, "bias", stream=turn.stream)
    turn.check(view, "bias", dtypes=(dtype,), shape=shape, aligned=turn.stream is not None)
    return view


def writable_argument(
    turn: Turn, x: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], aligned: bool = False
) -> Array:
    """Memory that is written; `aligned`: by kernels, 16 bytes at a time."""
    view = import_array(x, name, writable=True, stream=turn.stream)
    turn.check(view, name, dtypes=(dtype,), shape=shape, aligned=aligned and turn.stream is not None)
    return turn.take(view)


def positive_argument(value: Any, name: str) -> int:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ShapeError(name, got=repr(value), wanted="an integer of at least 1")
    return int(value)


def check_num_experts(num_experts: int, num_ranks: int) -> None:
    """Raise ShapeError unless every rank owns the same number of experts, at least one."""
    if not isinstance(num_experts, int | np.integer) or num_experts < 1 or num_experts % num_ranks:
        raise ShapeError(
            "num_experts",
            got=repr(num_experts),
            wanted=f"a multiple of the {num_ranks} ranks",
            do="add experts that no token selects",
        )


def topk_indices(turn: Turn, topk_idx: Any, num_tokens: int | None, num_experts: int, check: bool) -> ArrayView:
    """Expert indices ``[T, num_topk]``; with `check`, also every value.

    Raises:
        RoutingError: with `check`: an index outside ``[-1, num_experts)``, or an expert twice in a row.
    """
    view = import_array(topk_idx, "topk_idx", stream=turn.stream)
    turn.check(view, "topk_idx", dtypes=_INDEX_DTYPES, shape=(num_tokens, None))
    if not 1 <= view.shape[1] <= MAX_TOPK:
        raise ShapeError("topk_idx", got=f"num_topk {view.shape[1]}", wanted=f"1 to {MAX_TOPK} choices a token")
    if check:
        _check_indices(turn.checked_values(view), num_experts)
    return view


def _check_indices(indices: NDArray[Any], num_experts: int) -> None:
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
