"""What an array is to epcomm: `ArraySpec`, `ArrayView`; what operations demand: `require`; host memory: `empty`."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from epcomm import dlpack
from epcomm.dlpack import CPU, CUDA, CUDA_HOST, DType
from epcomm.errors import DeviceError, DtypeError, LayoutError, ShapeError

__all__ = ["ROW_ALIGNMENT", "ArraySpec", "ArrayView", "Place", "array_spec", "empty", "require", "wrong_device"]

_ALIGNMENT = 64  # bytes; the alignment at which JAX on the CPU shares memory instead of copying it
ROW_ALIGNMENT = 16  # bytes; the unit of the vector and bulk copies

Place = Literal["cpu"] | int  # where a backend's arrays are: in host memory, or on the CUDA device of that number


@dataclass(frozen=True, slots=True, eq=False)
class ArraySpec:
    """What an array looks like, wherever it lies.

    `array_spec` makes them, and makes one for all arrays that look the same. So whatever depends on looks and options
    only, a check or the shape of a launch, is a cached function of specs, and found again at the price of a look-up.

    Attributes:
        framework: "numpy", "torch", "jax", "cupy", or "dlpack" for every other producer.
        shape: elements along each axis.
        strides: elements between neighbours along each axis.
        dtype: NumPy dtype, those of ml_dtypes included.
        device: DLPack device type and device number; ``(1, 0)`` is the CPU.
        readonly: the memory must not be written.
        misalignment: bytes from a multiple of 16 to the first element.
        contiguous: whether the elements lie in row-major order without gaps.
        num_bytes: of all elements.
    """

    framework: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: tuple[int, int]
    readonly: bool
    misalignment: int
    contiguous: bool
    num_bytes: int

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU can read the memory (pinned memory counts)."""
        return self.device[0] in (CPU, CUDA_HOST)


@functools.lru_cache(maxsize=4096)
def array_spec(
    framework: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: DType,
    device: tuple[int, int],
    readonly: bool = False,
    misalignment: int = 0,
) -> ArraySpec:
    """The `ArraySpec` of these attributes; without strides, of a row-major array without gaps."""
    compact = dlpack.compact_strides(shape)
    if strides is None:
        strides = compact
    contiguous = 0 in shape or all(
        extent == 1 or step == wanted for extent, step, wanted in zip(shape, strides, compact, strict=True)
    )
    num_bytes = math.prod(shape) * dtype.itemsize
    return ArraySpec(framework, shape, strides, dtype, device, readonly, misalignment, contiguous, num_bytes)


class ArrayView:
    """An array of any framework, by address.

    The attributes of its `spec` are its own, too.

    Args:
        spec: what it looks like.
        ptr: address of the first element; may be 0 when there is none.
        owner: keeps the memory alive.
    """

    __slots__ = ("owner", "ptr", "spec")

    def __init__(self, spec: ArraySpec, ptr: int, owner: object) -> None:
        self.spec, self.ptr, self.owner = spec, ptr, owner

    def __repr__(self) -> str:
        return f"ArrayView({self.spec}, ptr={self.ptr:#x})"

    @property
    def framework(self) -> str:
        return self.spec.framework

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.spec.strides

    @property
    def dtype(self) -> DType:
        return self.spec.dtype

    @property
    def device(self) -> tuple[int, int]:
        return self.spec.device

    @property
    def readonly(self) -> bool:
        return self.spec.readonly

    @property
    def contiguous(self) -> bool:
        return self.spec.contiguous

    @property
    def on_cpu(self) -> bool:
        return self.spec.on_cpu

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
    spec: ArraySpec,
    name: str,
    *,
    dtypes: Collection[DTypeLike] | None = None,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    contiguous: bool = True,
    aligned: bool = False,
    place: Place | None = "cpu",
) -> None:
    """Raise unless an array is what an operation takes; None always means "any".

    Args:
        spec: what it looks like.
        name: what to call it in an error: the name of the argument.
        dtypes: the dtypes to accept.
        ndim: number of axes.
        shape: extent of each axis, None for any.
        contiguous: row-major without gaps.
        aligned: starting at a multiple of 16 bytes, if there is any element.
        place: where the backend's arrays are.

    Raises:
        DeviceError, DtypeError, ShapeError, LayoutError, DeviceError: in this order, the first thing that is wrong; the
            second DeviceError is about the number of the CUDA device.
    """
    if place is not None and not (spec.on_cpu if place == "cpu" else spec.device[0] == CUDA):
        raise wrong_device(name, spec.device, "cpu" if place == "cpu" else "cuda")
    if dtypes is not None and spec.dtype not in dtypes:
        wanted = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise DtypeError(name, got=f"dtype {spec.dtype}", wanted=wanted, do="cast it first")
    if ndim is not None and len(spec.shape) != ndim:
        raise ShapeError(
            name, got=f"shape {list(spec.shape)}", wanted=f"{ndim} dimension{'s' * (ndim != 1)}", do="reshape it"
        )
    if shape is not None and (
        len(shape) != len(spec.shape) or any(w is not None and w != g for w, g in zip(shape, spec.shape, strict=True))
    ):
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ShapeError(name, got=f"shape {list(spec.shape)}", wanted=f"[{wanted}]", do="pass an array of that shape")
    if contiguous and not spec.contiguous:
        raise LayoutError(
            name,
            got=f"strides {list(spec.strides)} for shape {list(spec.shape)}",
            wanted="a row-major array without gaps",
            do="pass a contiguous copy of it",
        )
    if aligned and spec.misalignment and 0 not in spec.shape:
        raise LayoutError(
            name,
            got=f"memory {spec.misalignment} bytes past a multiple of {ROW_ALIGNMENT}",
            wanted=f"memory that starts at a multiple of {ROW_ALIGNMENT} bytes",
            do="pass a copy of it, not a slice that starts inside another array",
        )
    if isinstance(place, int) and spec.device[1] != place:
        raise DeviceError(
            name,
            got=f"an array on cuda:{spec.device[1]}",
            wanted=f"one on cuda:{place}, the device of this Buffer",
            do="move the array, or construct the Buffer with device=",
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
