"""`ndarray`: an array in device memory. What computes runs in the current stream, like a kernel; nothing is done here.

NumPy does the arithmetic, on the same bytes, when the stream comes to it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import numpy as np
from emulated_gpu import queues
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import NDArray

from cupy.cuda import runtime
from cupy.cuda.devices import Device
from cupy.cuda.memory import MemoryPointer, UnownedMemory, alloc
from cupy.cuda.streams import get_current_stream
from epcomm import dlpack

__all__ = [
    "arange",
    "asarray",
    "asnumpy",
    "check_computable",
    "copyto",
    "empty",
    "from_dlpack",
    "full",
    "host",
    "ndarray",
    "now",
    "ones",
    "submit",
    "zeros",
]


@runtime.raising
def submit(operation: Callable[..., None], *values: Any) -> None:
    """Have the current stream call, or record, an operation with `host` of the values.

    As with a kernel the arrays may go at once, since their memory is freed behind it; but a graph keeps them.
    """
    queue = queues.find(get_current_stream().ptr)
    call = functools.partial(operation, *map(host, values))
    queue.submit(call if queue.capture is None else functools.partial(_call_and_keep, call, values))


def _call_and_keep(call: Callable[[], None], kept: object) -> None:
    call()


def now(compute: Callable[[], Any]) -> Any:
    """The result of a computation whose shape depends on values, once the current stream has come here."""
    get_current_stream().synchronize()
    return compute()


def host(value: Any) -> Any:
    """The memory of a device array as NumPy's, for operations; scalars as they are."""
    return value._host() if isinstance(value, ndarray) else value


class ndarray:
    """CuPy's array.

    Args:
        shape: elements along each axis.
        dtype: any of NumPy's or ml_dtypes'; the latter cannot be computed with.
        memptr: where it is; None: in new memory.
        strides: bytes from one element to the next along each axis; None: row-major without gaps.
    """

    __array_priority__ = 100.0
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None, strides: Any = None
    ) -> None:
        self.shape: tuple[int, ...] = (int(shape),) if np.ndim(shape) == 0 else tuple(map(int, shape))
        self.dtype = np.dtype(dtype)
        compact = tuple(step * self.dtype.itemsize for step in dlpack.compact_strides(self.shape))
        self.strides: tuple[int, ...] = compact if strides is None else tuple(strides)
        self.data = alloc(self.nbytes) if memptr is None else memptr

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def device(self) -> Device:
        return self.data.device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.data.ptr, False),
            "strides": self.strides,
            "version": 3,
            "stream": get_current_stream().ptr or queues.LEGACY,
        }

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.data.device_id

    def __dlpack__(self, *, stream: int | None = None, **keywords: Any) -> Any:
        mine = get_current_stream()
        if stream != -1 and (stream or queues.LEGACY) != (mine.ptr or queues.LEGACY):
            runtime.streamWaitEvent(stream or queues.LEGACY, mine.record().ptr)
        steps = [step // self.itemsize for step in self.strides]
        memory = dlpack.ndarray_over(self.data.ptr, self.shape, self.dtype, owner=self, strides=steps)
        return dlpack.Exporter(memory, self.dtype, self.__dlpack_device__()).__dlpack__(**keywords)

    def _host(self) -> NDArray[Any]:
        """Its memory, which the result does not keep alive."""
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        ends = [(extent - 1) * step for extent, step in zip(self.shape, self.strides, strict=True)]
        first, last = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
        buffer = (ctypes.c_uint8 * (last - first + self.itemsize)).from_address(self.data.ptr + first)
        return np.ndarray(self.shape, self.dtype, buffer, -first, self.strides)

    def _over(self, view: Callable[[NDArray[Any]], NDArray[Any]]) -> ndarray:
        """A view, as NumPy makes it of an array of this shape."""
        # Any memory serves to find out where the elements of the view lie.
        model = np.lib.stride_tricks.as_strided(np.empty(1, self.dtype), self.shape, self.strides)
        part = view(model)
        offset = part.__array_interface__["data"][0] - model.__array_interface__["data"][0]
        return ndarray(part.shape, part.dtype, self.data + (offset if part.size else 0), part.strides)

    # -- to and from the host -----------------------------------------------------------------------------------

    def get(self) -> NDArray[Any]:
        """A copy in host memory; blocks the host."""
        found: list[NDArray[Any]] = []
        submit(lambda mine: found.append(mine.copy()), self)
        get_current_stream().synchronize()
        return found[0]

    def set(self, array: NDArray[Any]) -> None:
        """Copy from host memory, which the caller may change at once."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape} into {self.dtype} {self.shape}")
        self._assign(array.copy())

    def _assign(self, value: Any) -> None:
        submit(lambda mine, given: np.copyto(mine, given, casting="unsafe"), self, value)

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __index__(self) -> int:
        return int(self.get().__index__())

    def __len__(self) -> int:
        return self.shape[0]

    def tolist(self) -> Any:
        return self.get().tolist()

    def __repr__(self) -> str:
        return repr(self.get())

    # -- views and copies ---------------------------------------------------------------------------------------

    def view(self, dtype: Any) -> ndarray:
        return self._over(lambda model: model.view(dtype))

    def reshape(self, *shape: Any) -> ndarray:
        if self.strides != ndarray(self.shape, self.dtype, self.data).strides:
            raise NotImplementedError("a reshape of an array with gaps, which would be a copy")
        return self._over(lambda model: model.reshape(*shape))

    def copy(self) -> ndarray:
        return self.astype(self.dtype)

    def astype(self, dtype: Any) -> ndarray:
        result = empty(self.shape, dtype)
        result._assign(self)
        return result

    def fill(self, value: Any) -> None:
        self._assign(value)

    def __getitem__(self, key: Any) -> ndarray:
        if _is_basic(key):
            # CuPy has no scalars of its own: an element is an array without axes.
            return self._over(lambda model: np.asarray(model[(*_as_tuple(key), ...)]))
        keys = _on_host(key)
        return now(lambda: asarray(self._host()[keys]))

    def __setitem__(self, key: Any, value: Any) -> None:
        keys = _on_host(key)
        submit(lambda mine, given: mine.__setitem__(keys, given), self, value)

    # -- reductions ---------------------------------------------------------------------------------------------

    def _reduced(self, name: str, axis: Any, keepdims: bool = False) -> ndarray:
        check_computable(self.dtype)
        axes = range(self.ndim) if axis is None else normalize_axis_tuple(axis, self.ndim)
        extents = [(1 if number in axes else extent) for number, extent in enumerate(self.shape)]
        shape = [extent for number, extent in enumerate(extents) if keepdims or number not in axes]
        dtype = getattr(np.ones(1, self.dtype), name)().dtype
        result = empty(tuple(shape), dtype)
        submit(lambda out, mine: np.copyto(out, getattr(mine, name)(axis=axis, keepdims=keepdims)), result, self)
        return result

    def sum(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._reduced("sum", axis, keepdims)

    def min(self, axis: Any = None) -> ndarray:
        return self._reduced("min", axis)

    def max(self, axis: Any = None) -> ndarray:
        return self._reduced("max", axis)

    def any(self, axis: Any = None) -> ndarray:
        return self._reduced("any", axis)

    def all(self, axis: Any = None) -> ndarray:
        return self._reduced("all", axis)


def check_computable(dtype: np.dtype[Any]) -> None:
    """CuPy's kernels do not know the dtypes of ml_dtypes."""
    if dtype.type.__module__ != "numpy":
        raise TypeError(f"CuPy does not compute with {dtype}")


def _as_tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _on_host(key: Any) -> tuple[Any, ...]:
    return tuple(part.get() if isinstance(part, ndarray) else part for part in _as_tuple(key))


def _is_basic(key: Any) -> bool:
    """Whether the result is a view."""
    return all(
        part is None or (isinstance(part, slice | EllipsisType | int | np.integer) and not isinstance(part, bool))
        for part in _as_tuple(key)
    )


# -- made from nothing, and from other arrays ---------------------------------------------------------------------


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(shape, dtype)


def full(shape: Any, fill_value: Any, dtype: Any = None) -> ndarray:
    array = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype)
    array.fill(fill_value)
    return array


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def arange(*limits: Any, dtype: Any = None) -> ndarray:
    return asarray(np.arange(*limits, dtype=dtype))


def asarray(array: Any, dtype: Any = None) -> ndarray:
    if isinstance(array, ndarray):
        return array if dtype in (None, array.dtype) else array.astype(dtype)
    values = np.asarray(array, dtype)
    result = empty(values.shape, values.dtype)
    result.set(values)
    return result


def asnumpy(array: Any) -> NDArray[Any]:
    return array.get() if isinstance(array, ndarray) else np.asarray(array)


def copyto(to: ndarray, source: Any) -> None:
    to._assign(source)


class _OnStream:
    """A DLPack producer that is asked for a capsule for one stream."""

    def __init__(self, producer: Any, stream: int) -> None:
        self._producer, self._stream = producer, stream

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._producer.__dlpack__(stream=self._stream, **keywords)


def from_dlpack(producer: Any) -> ndarray:
    tensor = dlpack.read(_OnStream(producer, get_current_stream().ptr or queues.LEGACY), "from_dlpack")
    if tensor.device[0] != dlpack.CUDA:
        raise TypeError("CPU arrays cannot be directly imported to CuPy")
    width = tensor.dtype.itemsize
    memory = UnownedMemory(tensor.ptr, 0, tensor.capsule, tensor.device[1])
    strides = tuple(step * width for step in tensor.strides)
    return ndarray(tensor.shape, tensor.dtype, MemoryPointer(memory, 0), strides)
