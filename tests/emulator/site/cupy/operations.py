"""What computes with arrays, operators included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cupy.arrays import asarray, check_computable, empty, host, ndarray, now, submit

__all__ = ["allclose", "flatnonzero", "isnan", "matmul", "multiply", "nonzero", "where"]

_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}
_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNARY = {"neg": np.negative, "invert": np.invert, "abs": np.absolute}


def _kind(value: Any) -> Any:
    """What decides about dtypes: a dtype, or the class of a Python number."""
    if isinstance(value, ndarray | np.generic):
        check_computable(value.dtype)
        return value.dtype
    if isinstance(value, bool):
        return np.dtype(bool)
    if isinstance(value, int | float):
        return type(value)
    raise TypeError(f"Unsupported type {type(value)}")


def _elementwise(ufunc: np.ufunc, *values: Any, out: ndarray | None = None) -> ndarray:
    """A ufunc of NumPy on device arrays, in the current stream."""
    shape = np.broadcast_shapes(*(value.shape for value in values if isinstance(value, ndarray)))
    dtype = ufunc.resolve_dtypes((*map(_kind, values), None))[-1]
    result = empty(shape, dtype) if out is None else out
    if np.broadcast_shapes(shape, result.shape) != result.shape or not np.can_cast(dtype, result.dtype, "same_kind"):
        raise ValueError(f"{dtype} {shape} into {result.dtype} {result.shape}")

    def execute(out: NDArray[Any], *inputs: Any) -> None:
        with np.errstate(all="ignore"):
            ufunc(*inputs, out=out, casting="same_kind")

    submit(execute, result, *values)
    return result


def _binary(ufunc: np.ufunc) -> Callable[..., ndarray]:
    return lambda self, other: _elementwise(ufunc, self, other)


def _reflected(ufunc: np.ufunc) -> Callable[..., ndarray]:
    return lambda self, other: _elementwise(ufunc, other, self)


def _in_place(ufunc: np.ufunc) -> Callable[..., ndarray]:
    return lambda self, other: _elementwise(ufunc, self, other, out=self)


def _unary(ufunc: np.ufunc) -> Callable[..., ndarray]:
    return lambda self: _elementwise(ufunc, self)


def _array_ufunc(
    self: ndarray, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[ndarray, ...] = (), **keywords: Any
) -> Any:
    """NumPy's functions and scalars leave arrays of the device to this."""
    if method != "__call__" or keywords:
        return NotImplemented
    return _elementwise(ufunc, *inputs, out=out[0] if out else None)


def _add_operators() -> None:
    for name, ufunc in _BINARY.items():
        setattr(ndarray, f"__{name}__", _binary(ufunc))
        setattr(ndarray, f"__r{name}__", _reflected(ufunc))
        setattr(ndarray, f"__i{name}__", _in_place(ufunc))
    for name, ufunc in _COMPARISONS.items():
        setattr(ndarray, f"__{name}__", _binary(ufunc))
    for name, ufunc in _UNARY.items():
        setattr(ndarray, f"__{name}__", _unary(ufunc))
    ndarray.__matmul__ = matmul  # type: ignore[attr-defined]
    ndarray.__array_ufunc__ = _array_ufunc  # type: ignore[attr-defined]


def multiply(a: Any, b: Any, out: ndarray | None = None) -> ndarray:
    return _elementwise(np.multiply, a, b, out=out)


def isnan(array: ndarray) -> ndarray:
    return _elementwise(np.isnan, array)


def where(condition: ndarray, a: Any, b: Any) -> ndarray:
    arrays = [value for value in (condition, a, b) if isinstance(value, ndarray)]
    dtype = np.result_type(*(value.dtype if isinstance(value, ndarray) else value for value in (a, b)))
    result = empty(np.broadcast_shapes(*(array.shape for array in arrays)), dtype)
    submit(lambda out, *inputs: np.copyto(out, np.where(*inputs)), result, condition, a, b)
    return result


def nonzero(array: ndarray) -> tuple[ndarray, ...]:
    return tuple(asarray(indices) for indices in now(lambda: np.nonzero(host(array))))


def flatnonzero(array: ndarray) -> ndarray:
    return asarray(now(lambda: np.flatnonzero(host(array))))


def allclose(a: ndarray, b: ndarray, rtol: float = 1e-5, atol: float = 1e-8) -> ndarray:
    return asarray(now(lambda: np.allclose(host(a), host(b), rtol, atol)))


def matmul(a: ndarray, b: ndarray, out: ndarray | None = None) -> NoReturn:
    raise ImportError("CuPy's matrix product needs cuBLAS, which is not emulated")


_add_operators()
