"""Arrays of CuPy, PyTorch, JAX and DLPack over device memory that epcomm owns, without a copy.

The memory is owned by any object; it goes when the last view goes. If the owner has `note_reader` and
`note_hidden_reader` (a `Block` of `epcomm.memory.blocks`), it is told which streams get to use the memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm import dlpack
from epcomm.arrays.exchange import export_array
from epcomm.arrays.streams import LEGACY, StreamRef, current_torch_stream, dlpack_stream, order
from epcomm.arrays.view import ArrayView, wrong_device
from epcomm.dlpack import CUDA, DTYPES, DType
from epcomm.errors import DtypeError, InputError

__all__ = ["DeviceArray", "device_array", "export_any", "to_host"]

_IS_NATIVE = {dtype: dtype.kind in "biuf" and not dtype.name.startswith("float8") for dtype in DTYPES}


class DeviceArray(dlpack.Exporter):
    """Device memory for any consumer: DLPack, and the CUDA array interface where NumPy has the dtype.

    Args:
        ptr: device address.
        shape: elements along each axis.
        dtype: a dtype of `epcomm.dlpack.DTYPES`.
        owner: keeps the memory alive.
        device: CUDA device number.
        stream: raw handle of the stream that fills the memory; None: the consumer is ordered by other means.
        strides: elements between neighbours along each axis; row-major, without gaps, if None.
    """

    __slots__ = ("_dtype", "_owner", "_ptr", "_shape", "_stream", "_strides")

    def __init__(
        self,
        ptr: int,
        shape: Sequence[int],
        dtype: DType,
        *,
        owner: object,
        device: int,
        stream: int | None,
        strides: Sequence[int] | None = None,
    ) -> None:
        memory = dlpack.ndarray_over(ptr, shape, dtype, owner=owner, strides=strides)
        super().__init__(memory, dtype, (CUDA, device))
        self._ptr, self._shape, self._dtype, self._owner, self._stream = ptr, tuple(shape), dtype, owner, stream
        self._strides = None if strides is None else tuple(step * dtype.itemsize for step in strides)

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""
        return self._shape

    @property
    def dtype(self) -> DType:
        """NumPy dtype, those of ml_dtypes included."""
        return self._dtype

    def __repr__(self) -> str:
        return f"DeviceArray(shape={list(self._shape)}, dtype={self._dtype}, cuda:{self._device[1]})"

    def __dlpack__(self, *, stream: object = None, **keywords: Any) -> Any:
        """A new capsule; the consumer's `stream` waits for the stream that fills the memory.

        Args:
            stream: as DLPack defines it: None and 1 the legacy default stream, -1 for no ordering, else a handle.
            **keywords: as for `epcomm.dlpack.Exporter`.
        """
        consumer = dlpack_stream(stream)
        if consumer is None:
            _hidden(self._owner)
        else:
            _hand_over(self._owner, self._stream, consumer, self._device[1])
        return super().__dlpack__(**keywords)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if not _IS_NATIVE[self._dtype]:
            # Then it has none, and consumers go on to DLPack.
            raise AttributeError(f"the CUDA array interface has no {self._dtype}; use DLPack")
        _hidden(self._owner)  # the consumer orders its stream behind ours, and does not say which one it is
        return {
            "data": (self._ptr, False),
            "shape": self._shape,
            "strides": self._strides,
            "typestr": self._dtype.str,
            "version": 3,
            "stream": None if self._stream is None else self._stream or LEGACY,
        }


def export_any(array: NDArray[Any] | ArrayView, framework: str, stream: StreamRef | None) -> Any:
    """`export_array` for host memory, `device_array` for GPU memory that `stream` fills."""
    if isinstance(array, np.ndarray):
        return export_array(array, framework)
    return device_array(
        framework,
        array.ptr,
        array.shape,
        array.dtype,
        owner=array.owner,
        device=array.device[1],
        stream=None if stream is None else stream.ptr,
        strides=None if array.contiguous else array.strides,
    )


def to_host(view: ArrayView, stream: int) -> NDArray[Any]:
    """A copy in host memory. Blocks the host until `stream` has come here.

    Args:
        view: GPU memory, any strides.
        stream: raw handle of the stream that has filled it, or waits for that.
    """
    import cupy

    runtime = cupy.cuda.runtime
    last = sum((extent - 1) * step for extent, step in zip(view.shape, view.strides, strict=True))
    extent = 0 if 0 in view.shape else 1 + last
    flat = np.empty(extent, view.dtype)
    if extent:
        with cupy.cuda.Device(view.device[1]):
            # First, so that the copy waits for nothing: it would hold up those of other threads, whose ranks may be
            # what a kernel of this stream is waiting for.
            runtime.streamSynchronize(stream or LEGACY)
            runtime.memcpyAsync(flat.ctypes.data, view.ptr, flat.nbytes, runtime.memcpyDeviceToHost, stream or LEGACY)
            runtime.streamSynchronize(stream or LEGACY)
    width = view.dtype.itemsize
    return np.lib.stride_tricks.as_strided(flat, view.shape, tuple(step * width for step in view.strides))


def device_array(
    framework: str,
    ptr: int,
    shape: Sequence[int],
    dtype: DType,
    *,
    owner: object,
    device: int,
    stream: int | None,
    strides: Sequence[int] | None = None,
) -> Any:
    """An array of `framework` over device memory. Does not block; not collective.

    The stream that the framework will use waits for `stream`: the current one of CuPy and PyTorch, the one that JAX and
    other consumers ask for. PyTorch and CuPy share every dtype (CuPy's kernels do not know the 8-bit floats). JAX
    copies 64-bit dtypes without ``jax_enable_x64``, and takes it for granted that the memory is never written again.

    Args:
        framework: as `framework_of` names it.
        ptr: device address of the first element.
        shape: elements along each axis.
        dtype: a dtype of `epcomm.dlpack.DTYPES`.
        owner: keeps the memory alive until the last view is gone.
        device: CUDA device number.
        stream: raw handle of the stream that fills the memory. None: the caller orders CuPy and PyTorch by other means
            (an event that is waited for later); JAX and other consumers then get no ordering either.
        strides: elements between neighbours along each axis, without gaps in some order of the axes; row-major if None.

    Raises:
        DtypeError: a dtype that epcomm does not carry.
        DeviceError: "numpy", whose arrays are never in device memory.
        InputError: an unknown framework, or one that this process has not imported.
    """
    if dtype not in DTYPES:
        raise DtypeError("device_array", got=f"dtype {dtype}", wanted=f"one of {', '.join(map(str, DTYPES))}")
    if framework == "cupy":
        cupy = _module(framework)
        cuda = cupy.cuda
        consumer = cuda.get_current_stream(device)
        _hand_over(owner, stream, consumer.ptr, device, consumer)  # CuPy destroys a stream with its object
        num_bytes = math.prod(shape) * dtype.itemsize
        # NOTE: with the device given, CuPy asks the driver nothing about the address.
        memory = cuda.MemoryPointer(cuda.UnownedMemory(ptr, num_bytes, owner, device), 0)
        return cupy.ndarray(
            shape, dtype, memory, None if strides is None else tuple(step * dtype.itemsize for step in strides)
        )
    if framework == "torch":
        torch = _module(framework)
        _hand_over(owner, stream, current_torch_stream(torch, device), device)
        # The capsule itself, as the ordering is done: `torch.from_dlpack` of an object would ask for it again.
        memory = dlpack.ndarray_over(ptr, shape, dtype, owner=owner, strides=strides)
        return torch.utils.dlpack.from_dlpack(dlpack.Exporter(memory, dtype, (CUDA, device)).__dlpack__())
    if framework == "numpy":
        raise wrong_device("device_array", (CUDA, device), "cpu")
    array = DeviceArray(ptr, shape, dtype, owner=owner, device=device, stream=stream, strides=strides)
    if framework == "jax":
        _hidden(owner)
        return _module(framework).dlpack.from_dlpack(array)
    if framework == "dlpack":
        return array
    raise _unknown(framework)


def _hand_over(owner: Any, stream: int | None, consumer: int, device: int, keep: object = None) -> None:
    """Work in `consumer` may use the memory of `owner` once `stream` has come here; `keep` keeps `consumer` alive."""
    if stream is not None and stream != consumer:
        order(stream, consumer, device)
    note = getattr(owner, "note_reader", None)
    if note is not None:
        note(consumer, keep)


def _hidden(owner: Any) -> None:
    note = getattr(owner, "note_hidden_reader", None)
    if note is not None:
        note()


def _module(framework: str) -> Any:
    module = sys.modules.get(framework)
    if module is None:
        raise InputError(
            "device_array", got=f"framework {framework!r}", wanted="one that is imported", do=f"import {framework}"
        )
    return module


def _unknown(framework: str) -> InputError:
    return InputError("device_array", got=f"framework {framework!r}", wanted="torch, jax, cupy or dlpack")
