"""Arrays of CuPy, PyTorch, JAX and DLPack over device memory that epcomm owns, without a copy.

The memory is owned by any object; it goes when the last view goes. If the owner has `note_reader` and
`note_hidden_reader` (a `Block` of `epcomm.memory.blocks`), it is told which streams get to use the memory.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm import dlpack
from epcomm.arrays.exchange import export_array
from epcomm.arrays.streams import LEGACY, StreamRef, current_torch_stream, dlpack_stream, order
from epcomm.arrays.view import ArraySpec, ArrayView, array_spec, wrong_device
from epcomm.dlpack import DTYPES, DType
from epcomm.errors import DtypeError, InputError

__all__ = ["DeviceArray", "cupy_array", "device_array", "export_any", "to_device", "to_host"]

_IS_NATIVE = {dtype: dtype.kind in "biuf" and not dtype.name.startswith("float8") for dtype in DTYPES}


class DeviceArray(dlpack.Exporter):
    """Device memory for any consumer: DLPack, and the CUDA array interface where NumPy has the dtype.

    Args:
        view: the memory; its owner keeps it alive.
        stream: raw handle of the stream that fills it; None: the consumer is ordered by other means.
    """

    __slots__ = ("_stream", "_view")

    def __init__(self, view: ArrayView, stream: int | None) -> None:
        super().__init__(_numpy_over(view), view.dtype, view.device)
        self._view, self._stream = view, stream

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""
        return self._view.shape

    @property
    def dtype(self) -> DType:
        """NumPy dtype, those of ml_dtypes included."""
        return self._view.dtype

    def __repr__(self) -> str:
        return f"DeviceArray(shape={list(self.shape)}, dtype={self.dtype}, cuda:{self._device[1]})"

    def __dlpack__(self, *, stream: object = None, **keywords: Any) -> Any:
        """A new capsule; the consumer's `stream` waits for the stream that fills the memory.

        Args:
            stream: as DLPack defines it: None and 1 the legacy default stream, -1 for no ordering, else a handle.
            **keywords: as for `epcomm.dlpack.Exporter`.
        """
        consumer = dlpack_stream(stream)
        if consumer is None:
            _hidden(self._view.owner)
        else:
            _hand_over(self._view, self._stream, consumer)
        return super().__dlpack__(**keywords)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        view = self._view
        if not _IS_NATIVE[view.dtype]:
            # Then it has none, and consumers go on to DLPack.
            raise AttributeError(f"the CUDA array interface has no {view.dtype}; use DLPack")
        _hidden(view.owner)  # the consumer orders its stream behind ours, and does not say which one it is
        return {
            "data": (view.ptr, False),
            "shape": view.shape,
            "strides": _byte_strides(view.spec),
            "typestr": view.dtype.str,
            "version": 3,
            "stream": None if self._stream is None else self._stream or LEGACY,
        }


def export_any(array: NDArray[Any] | ArrayView, framework: str, stream: StreamRef | None) -> Any:
    """`export_array` for host memory, `device_array` for GPU memory that `stream` fills."""
    if isinstance(array, np.ndarray):
        return export_array(array, framework)
    return device_array(framework, array, None if stream is None else stream.ptr)


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


def to_device(values: NDArray[Any], device: int, stream: int) -> ArrayView:
    """A copy in GPU memory. Blocks the host until `stream` has come here.

    Args:
        values: contiguous.
        device: CUDA device number.
        stream: raw handle of a stream of that device.
    """
    import cupy

    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(device):
        memory = cupy.cuda.alloc(max(values.nbytes, 1))
        runtime.memcpyAsync(memory.ptr, values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice, stream or LEGACY)
        runtime.streamSynchronize(stream or LEGACY)
    return ArrayView(array_spec("", values.shape, None, values.dtype, (dlpack.CUDA, device)), memory.ptr, memory)


def device_array(framework: str, view: ArrayView, stream: int | None) -> Any:
    """An array of `framework` over device memory. Does not block; not collective.

    The stream that the framework will use waits for `stream`: the current one of CuPy and PyTorch, the one that JAX and
    other consumers ask for. PyTorch and CuPy share every dtype (CuPy's kernels do not know the 8-bit floats). JAX
    copies 64-bit dtypes without ``jax_enable_x64``, and takes it for granted that the memory is never written again.

    Args:
        framework: as `framework_of` names it.
        view: the memory, without gaps in some order of the axes; its owner lives until the last array over it is gone.
        stream: raw handle of the stream that fills the memory. None: the caller orders CuPy and PyTorch by other means
            (an event that is waited for later); JAX and other consumers then get no ordering either.

    Raises:
        DtypeError: a dtype that epcomm does not carry.
        DeviceError: "numpy", whose arrays are never in device memory.
        InputError: an unknown framework, or one that this process has not imported.
    """
    if view.dtype not in DTYPES:
        raise DtypeError("device_array", got=f"dtype {view.dtype}", wanted=f"one of {', '.join(map(str, DTYPES))}")
    if framework == "cupy":
        consumer = _module(framework).cuda.get_current_stream(view.device[1])
        _hand_over(view, stream, consumer.ptr, consumer)  # CuPy destroys a stream with its object
        return cupy_array(view)
    if framework == "torch":
        torch = _module(framework)
        _hand_over(view, stream, current_torch_stream(torch, view.device[1]))
        # The capsule itself, as the ordering is done: `torch.from_dlpack` of an object would ask for it again.
        exporter = dlpack.Exporter(_numpy_over(view), view.dtype, view.device)
        return torch.utils.dlpack.from_dlpack(exporter.__dlpack__())
    if framework == "numpy":
        raise wrong_device("device_array", view.device, "cpu")
    array = DeviceArray(view, stream)
    if framework == "jax":
        _hidden(view.owner)
        return _module(framework).dlpack.from_dlpack(array)
    if framework == "dlpack":
        return array
    raise _unknown(framework)


def cupy_array(view: ArrayView) -> Any:
    """`device_array` for CuPy, whose current stream needs no ordering and is known to the owner as a reader."""
    (array, pointer, memory), spec = _cupy_classes(), view.spec
    # NOTE: with the device given, CuPy asks the driver nothing about the address.
    owned = memory(view.ptr, spec.num_bytes, view.owner, spec.device[1])
    return array(spec.shape, spec.dtype, pointer(owned, 0), None if spec.contiguous else _byte_strides(spec))


@functools.cache
def _cupy_classes() -> tuple[Any, Any, Any]:
    cupy = sys.modules["cupy"]
    return cupy.ndarray, cupy.cuda.MemoryPointer, cupy.cuda.UnownedMemory


@functools.lru_cache(maxsize=1024)
def _byte_strides(spec: ArraySpec) -> tuple[int, ...] | None:
    """None: row-major without gaps."""
    return None if spec.contiguous else tuple([step * spec.dtype.itemsize for step in spec.strides])


def _numpy_over(view: ArrayView) -> NDArray[Any]:
    strides = None if view.contiguous else view.strides
    return dlpack.ndarray_over(view.ptr, view.shape, view.dtype, owner=view.owner, strides=strides)


def _hand_over(view: ArrayView, stream: int | None, consumer: int, keep: object = None) -> None:
    """Work in `consumer` may use the memory once `stream` has come here; `keep` keeps `consumer` alive."""
    if stream is not None and stream != consumer:
        order(stream, consumer, view.device[1])
    note = getattr(view.owner, "note_reader", None)
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
