"""What an array looks like to epcomm: `ArrayView`; what operations demand of one: `require`; host memory: `empty`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from epcomm import dlpack
from epcomm.dlpack import CPU, CUDA, CUDA_HOST, DType
from epcomm.errors import DeviceError, DtypeError, LayoutError, ShapeError

__all__ = ["ArrayView", "empty", "require", "wrong_device"]

_ALIGNMENT = 64  # bytes; the alignment at which JAX on the CPU shares memory instead of copying it
_ROW_ALIGNMENT = 16  # bytes; the unit of the vector and bulk copies


@dataclass(slots=True, eq=False)  # not frozen: that triples the time to make one, and every call makes several
class ArrayView:
    """An array of any framework, by address.

    Attributes:
        framework: "numpy", "torch", "jax", "cupy", or "dlpack" for every other producer.
        ptr: address of the first element; may be 0 when there is none.
        shape: elements along each axis.
        strides: elements between neighbours along each axis.
        dtype: NumPy dtype, those of ml_dtypes included.
        device: DLPack device type and device number; ``(1, 0)`` is the CPU.
        readonly: the memory must not be written.
        owner: keeps the memory alive.
    """

    framework: str
    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: tuple[int, int]
    readonly: bool
    owner: object = field(repr=False)

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU can read the memory (pinned memory counts)."""
        return self.device[0] in (CPU, CUDA_HOST)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        if self.strides == dlpack.compact_strides(self.shape):
            return True
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent > 1 and stride != step:
                return 0 in self.shape
            step *= extent
        return True

    def numpy(self) -> NDArray[Any]:
        """The same memory as a NumPy array of `dtype`; it keeps the owner alive. Does not copy or block.

        Raises:
            DeviceError: the CPU cannot read the memory.
        """
        if not self.on_cpu:
            raise wrong_device("array", self.device, "cpu")
        if isinstance(self.owner, np.ndarray):
            return self.owner.view()  # of its own, so that the caller may reshape it in place
        return dlpack.ndarray_over(
            self.ptr, self.shape, self.dtype, owner=self.owner, strides=self.strides, readonly=self.readonly
        )


def require(
    view: ArrayView,
    name: str,
    *,
    dtypes: Collection[DTypeLike] | None = None,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    contiguous: bool = True,
    aligned: bool = False,
    device: str | None = "cpu",
) -> None:
    """Raise unless `view` is what an operation takes; None always means "any".

    Args:
        view: the array.
        name: what to call it in an error: the name of the argument.
        dtypes: the dtypes to accept.
        ndim: number of axes.
        shape: extent of each axis, None for any.
        contiguous: row-major without gaps.
        aligned: starting at a multiple of 16 bytes, if there is any element.
        device: "cpu" or "cuda": where the backend's arrays are.

    Raises:
        DeviceError, DtypeError, ShapeError, LayoutError: in this order, the first thing that is wrong.
    """
    if device is not None and not (view.on_cpu if device == "cpu" else view.device[0] == CUDA):
        raise wrong_device(name, view.device, device)
    if dtypes is not None and view.dtype not in dtypes:
        wanted = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise DtypeError(name, got=f"dtype {view.dtype}", wanted=wanted, do="cast it first")
    if ndim is not None and len(view.shape) != ndim:
        raise ShapeError(
            name, got=f"shape {list(view.shape)}", wanted=f"{ndim} dimension{'s' * (ndim != 1)}", do="reshape it"
        )
    if shape is not None and (
        len(shape) != len(view.shape) or any(w is not None and w != g for w, g in zip(shape, view.shape, strict=True))
    ):
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ShapeError(name, got=f"shape {list(view.shape)}", wanted=f"[{wanted}]", do="pass an array of that shape")
    if contiguous and not view.contiguous:
        raise LayoutError(
            name,
            got=f"strides {list(view.strides)} for shape {list(view.shape)}",
            wanted="a row-major array without gaps",
            do="pass a contiguous copy of it",
        )
    if aligned and view.ptr % _ROW_ALIGNMENT and 0 not in view.shape:
        raise LayoutError(
            name,
            got=f"memory {view.ptr % _ROW_ALIGNMENT} bytes past a multiple of {_ROW_ALIGNMENT}",
            wanted=f"memory that starts at a multiple of {_ROW_ALIGNMENT} bytes",
            do="pass a copy of it, not a slice that starts inside another array",
        )


def empty(shape: int | Sequence[int], dtype: DTypeLike, *, fill: Any = None) -> NDArray[Any]:
    """A new row-major NumPy array that starts at a multiple of 64 bytes.

    Args:
        shape: elements along each axis.
        dtype: NumPy dtype, those of ml_dtypes included.
        fill: value of every element; None leaves them undefined.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    num_bytes = dtype.itemsize * math.prod(shape)
    # Zero bytes come from the system, page by page at first use, instead of being written here.
    zeroed = fill is not None and not any(np.asarray(fill, dtype).tobytes())
    block = (np.zeros if zeroed else np.empty)(num_bytes + _ALIGNMENT, np.uint8)
    array: NDArray[Any] = np.ndarray(shape, dtype, buffer=block, offset=-block.ctypes.data % _ALIGNMENT)
    if fill is not None and not zeroed:
        array.fill(fill)
    return array


def wrong_device(name: str, device: tuple[int, int], wanted: str) -> DeviceError:
    """The error for an array that the backend cannot use; `wanted` is "cpu" or "cuda"."""
    got = {CPU: "a CPU array", CUDA: f"an array on cuda:{device[1]}"}.get(device[0], f"DLPack device {device}")
    if wanted == "cpu":
        do = "host backend takes CPU arrays; pass backend='cuda' or move the array"
    else:
        do = "cuda backend takes CUDA arrays; pass backend='host' or move the array"
    return DeviceError(name, got=got, wanted=f"an array on {wanted}", do=do)
