"""The part of the DLPack ABI that epcomm needs, read and written through ctypes.

NumPy's own DLPack knows neither bfloat16 nor the 8-bit floats, so both directions go around it:

* `read` takes the capsule of another framework and says where its memory lies. The capsule is *held, not consumed*:
  it keeps its name, so that its own destructor, the producer's C code, calls the producer's deleter once, when the
  last reference goes.
* `Exporter` offers a NumPy array to another framework. NumPy makes the capsule from a view as integers of the same
  width, and the fields for dtype and device are overwritten in place.

So there is no ctypes callback and no ``__del__`` here: with those, an array that outlives the interpreter's teardown
(in a reference cycle, or as an attribute of a module) would end in freed Python code. Everything that runs late is C
code of NumPy or of the producer.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm.errors import DtypeError, InputError

__all__ = [
    "CPU",
    "CUDA",
    "CUDA_HOST",
    "DTYPES",
    "DType",
    "Exporter",
    "Tensor",
    "compact_strides",
    "ndarray_over",
    "read",
]

DType = np.dtype[Any]

# DLDeviceType. CUDA_HOST is pinned host memory, which the CPU reads like any other.
CPU, CUDA, CUDA_HOST = 1, 2, 3

# dtype -> (DLDataTypeCode, bits); every dtype that epcomm carries, under any framework.
DTYPES: dict[DType, tuple[int, int]] = {
    np.dtype(scalar): code
    for scalar, code in (
        (np.int8, (0, 8)),
        (np.int16, (0, 16)),
        (np.int32, (0, 32)),
        (np.int64, (0, 64)),
        (np.uint8, (1, 8)),
        (np.uint16, (1, 16)),
        (np.uint32, (1, 32)),
        (np.uint64, (1, 64)),
        (np.float16, (2, 16)),
        (np.float32, (2, 32)),
        (np.float64, (2, 64)),
        (ml_dtypes.bfloat16, (4, 16)),
        (np.bool_, (6, 8)),
        (ml_dtypes.float8_e4m3fn, (10, 8)),
        (ml_dtypes.float8_e5m2, (12, 8)),
        (ml_dtypes.float8_e8m0fnu, (14, 8)),
    )
}
_DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPES.items()}

# Integers of each width: what NumPy is shown instead of dtypes that its interfaces do not know.
_WORD: dict[int, DType] = {
    dtype.itemsize: dtype for dtype in map(np.dtype, (np.uint8, np.uint16, np.uint32, np.uint64))
}

_VERSION = (1, 0)
_FLAG_READ_ONLY, _FLAG_IS_COPIED = 1, 2
_NAME, _NAME_VERSIONED = b"dltensor", b"dltensor_versioned"


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor, the layout before DLPack 1.0 (JAX still makes it)."""

    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned; the version stays first in every future layout."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


# Prototypes of our own: setting argtypes on ctypes.pythonapi would change them for the whole process.
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Where the memory behind a capsule lies.

    Attributes:
        ptr: address of the first element; 0 is possible when there is none.
        shape: elements along each axis.
        strides: elements between neighbours along each axis.
        dtype: a dtype of `DTYPES`.
        device: DLPack device type and device number; ``(1, 0)`` is the CPU.
        readonly: the producer forbids writing, or handed over a copy, where writing would be lost.
        capsule: keeps the memory alive.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: tuple[int, int]
    readonly: bool
    capsule: object


def read(producer: Any, name: str) -> Tensor:
    """Ask `producer` for a DLPack capsule and read it; the memory stays the producer's.

    No stream is passed (DLPack's ``stream=None``): memory of a CUDA device is then ordered behind the producer's work
    on the legacy default stream only, and the caller orders any other stream itself. Not collective.

    Args:
        producer: an object with ``__dlpack__``. ``__dlpack_device__`` is for choosing a stream before asking; the
            capsule itself says where the memory is.
        name: what to call it in an error.

    Raises:
        DtypeError: a dtype outside `DTYPES`, or vector elements.
        InputError: the producer refuses, or speaks a DLPack version after 1.x.
    """
    try:
        try:
            capsule = producer.__dlpack__(max_version=_VERSION)
        except TypeError:  # a producer from before DLPack 1.0 does not have the keyword
            capsule = producer.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as error:
        raise InputError(
            name,
            got=f"{type(producer).__name__}, which refuses DLPack export ({error})",
            wanted="an array that can be shared without a copy",
            do="convert it to a NumPy, CuPy, JAX or PyTorch array",
        ) from error
    tensor, flags = _tensor_of(capsule, name)
    shape = tuple(tensor.shape[: tensor.ndim])
    code = tensor.dtype
    dtype = _DTYPE_OF_CODE.get((code.code, code.bits))
    if dtype is None or code.lanes != 1:
        raise DtypeError(
            name,
            got=f"DLPack type code {code.code}, {code.bits} bits, {code.lanes} lanes",
            wanted=f"one of {', '.join(str(known) for known in DTYPES)}",
            do="cast it, or view it as uint8",
        )
    return Tensor(
        ptr=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else compact_strides(shape),
        dtype=dtype,
        device=(tensor.device.type, tensor.device.id),
        readonly=bool(flags & (_FLAG_READ_ONLY | _FLAG_IS_COPIED)),
        capsule=capsule,
    )


def _tensor_of(capsule: Any, name: str) -> tuple[_DLTensor, int]:
    """The DLTensor in either kind of capsule, and the flags."""
    if _capsule_is_valid(capsule, _NAME_VERSIONED):
        managed = _ManagedVersioned.from_address(_capsule_pointer(capsule, _NAME_VERSIONED))
        if managed.major > _VERSION[0]:  # only the version and the deleter may be relied on
            raise InputError(
                name,
                got=f"DLPack version {managed.major}.{managed.minor}",
                wanted="1.x",
                do="convert it to a NumPy, CuPy, JAX or PyTorch array",
            )
        return managed.tensor, managed.flags
    if _capsule_is_valid(capsule, _NAME):
        return _Managed.from_address(_capsule_pointer(capsule, _NAME)).tensor, 0
    raise InputError(name, got=f"{capsule!r} from __dlpack__", wanted="an unused DLPack capsule")


@functools.lru_cache(maxsize=1024)  # the same shapes come again and again
def compact_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major array without gaps."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class _Interface:
    """Carries ``__array_interface__`` and the owner; NumPy makes it the base of the array."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def ndarray_over(
    ptr: int,
    shape: Sequence[int],
    dtype: DType,
    *,
    owner: object,
    strides: Sequence[int] | None = None,
    readonly: bool = False,
) -> NDArray[Any]:
    """A NumPy array over memory that `owner` keeps alive.

    The memory is not touched, so `ptr` may be a device address, as long as nobody reads the array (`Exporter` does
    not).

    Args:
        ptr: address of the first element.
        shape: elements along each axis.
        dtype: a dtype of `DTYPES`.
        owner: freed after the array and all views of it.
        strides: elements between neighbours along each axis; None means row-major without gaps.
        readonly: make an array that cannot be written.
    """
    width = dtype.itemsize
    interface = {
        "data": (ptr, readonly),
        "shape": tuple(shape),
        "strides": None if strides is None else tuple(step * width for step in strides),
        "typestr": _WORD[width].str,
        "version": 3,
    }
    return np.asarray(_Interface(interface, owner)).view(dtype)


class Exporter:
    """Offers a NumPy array of any dtype of `DTYPES` to a DLPack consumer, without a copy.

    Args:
        array: the array, writable, any strides. A capsule taken from this object keeps it alive.
        dtype: what the consumer shall see; of the same width as the array's.
        device: what the consumer shall see; for a device other than the CPU `array` is an `ndarray_over` a device
            address, and the maker has ordered the consumer's stream behind the work that fills it.
    """

    __slots__ = ("_array", "_code", "_device")

    def __init__(self, array: NDArray[Any], dtype: DType, device: tuple[int, int] = (CPU, 0)) -> None:
        self._array = array.view(_WORD[dtype.itemsize])
        self._code = DTYPES[dtype]
        self._device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack device type and device number."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A new capsule, versioned if the consumer says that it understands DLPack 1.x.

        Raises:
            BufferError: the consumer asks for a copy, or for another device.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError("this array is shared where it is, and never copied")
        # A keyword left out asks NumPy for the unversioned capsule.
        versioned = max_version is not None and max_version[0] >= 1
        capsule = self._array.__dlpack__(max_version=_VERSION) if versioned else self._array.__dlpack__()
        tensor, _ = _tensor_of(capsule, "DLPack export")
        tensor.dtype.code, tensor.dtype.bits = self._code
        tensor.device.type, tensor.device.id = self._device
        return capsule
