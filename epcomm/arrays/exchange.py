"""Arrays of every framework, taken as `ArrayView`, and handed back as arrays of the caller's framework.

Nothing is copied on the way in, and no framework is imported: an array of PyTorch, JAX or CuPy can only exist in a
process that has imported it, so it is looked up in `sys.modules`. PyTorch, CuPy and NumPy arrays say where their
memory lies through attributes; JAX arrays and all others through a DLPack capsule.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from epcomm import dlpack
from epcomm.arrays.streams import LEGACY
from epcomm.arrays.view import ROW_ALIGNMENT, ArraySpec, ArrayView, array_spec, empty, wrong_device
from epcomm.dlpack import CPU, CUDA, DTYPES, DType
from epcomm.errors import DeviceError, DtypeError, ImmutableArray, InputError, LayoutError

__all__ = ["export_array", "framework_of", "framework_or_none", "import_array"]

_TORCH_DTYPES = {f"torch.{dtype.name}": dtype for dtype in DTYPES}  # the names are the same in both


@functools.lru_cache(maxsize=256)
def _framework_of_type(kind: type) -> str | None:
    """The framework whose array class `kind` is or inherits from, None if it is no array."""
    if issubclass(kind, np.ndarray):
        return "numpy"
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package == "torch" and base.__name__ == "Tensor":
            return "torch"
        if package == "cupy" and base.__name__ == "ndarray":
            return "cupy"
        # A tracer is no array, but whoever passes one means an array; `_import_jax` says what to do.
        if package in ("jax", "jaxlib") and base.__name__ in ("ArrayImpl", "Tracer", "PRNGKeyArray"):
            return "jax"
    return "dlpack" if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__") else None


def framework_of(x: object) -> str:
    """Name of the framework that `x` is an array of: "numpy", "torch", "jax", "cupy", or "dlpack" for any other.

    Raises:
        DtypeError: `x` is no array (a list, a number, None).
    """
    framework = framework_or_none(x)
    if framework is None:
        raise _no_array(x, "array")
    return framework


def framework_or_none(x: object) -> str | None:
    """As `framework_of`, None if `x` is no array."""
    return _framework_of_type(type(x))  # type: ignore[arg-type]


def _no_array(x: object, name: str) -> DtypeError:
    return DtypeError(
        name,
        got=f"a {type(x).__name__}",
        wanted="an array of NumPy, CuPy, JAX or PyTorch, or any DLPack array",
        do="make an array of it first",
    )


def import_array(x: Any, name: str, *, writable: bool = False, stream: int | None = None) -> ArrayView:
    """The memory of an array of any framework; never a copy.

    A tensor that requires grad is taken detached. A JAX array on the CPU is waited for; everything else does not block,
    and work queued on a GPU stream may still be writing the array. Not collective.

    Args:
        x: array of NumPy, PyTorch, JAX or CuPy, or any object with ``__dlpack__``; any shape and strides.
        name: what to call it in an error: the name of the argument.
        writable: the call will write into it. PyTorch's autograd is told, as by every other in-place operation.
        stream: raw handle of a CUDA stream that shall wait for the work that fills a CUDA array of JAX or of another
            DLPack producer. Arrays of PyTorch and CuPy are ordered by using the framework's current stream.

    Raises:
        DtypeError: no array, or a dtype that epcomm does not carry.
        LayoutError: strides that are no multiple of the element size.
        DeviceError: a device that is neither the CPU nor a CUDA GPU (PyTorch).
        ImmutableArray: `writable`, and a JAX array.
        InputError: `writable`, and read-only or recorded by autograd; or an array without plain memory: tracer, fake,
            wrapped, sparse, quantized, nested, conjugated, sharded, deleted, masked.
    """
    importer = _importer_of.get(type(x))
    if importer is None:
        framework = framework_or_none(x)
        if framework is None:
            raise _no_array(x, name)
        importer = _importer_of[type(x)] = _IMPORTERS[framework]
    return importer(x, name, writable, stream)


def _import_numpy(x: NDArray[Any], name: str, writable: bool, stream: int | None) -> ArrayView:
    kind = type(x)
    if kind is not np.ndarray:
        if isinstance(x, np.ma.MaskedArray):
            raise InputError(name, got="a masked array", wanted="a plain array", do="pass x.filled(value) or x.data")
        x = x.view(np.ndarray)
    dtype = x.dtype
    _check_dtype(name, dtype)
    if writable and not x.flags.writeable:
        raise _read_only(name)
    strides, ptr = _in_elements(name, x.strides, dtype.itemsize), x.ctypes.data
    spec = array_spec("numpy", x.shape, strides, dtype, (CPU, 0), not x.flags.writeable, ptr % ROW_ALIGNMENT)
    return ArrayView(spec, ptr, x)


def _import_torch(x: Any, name: str, writable: bool, stream: int | None) -> ArrayView:
    torch = sys.modules["torch"]
    _check_torch_kind(torch, x, name)
    dtype = _TORCH_DTYPES.get(str(x.dtype))
    if dtype is None:
        raise _wrong_dtype(name, x.dtype)
    device = x.device
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(name, got=f"a tensor on {device}", wanted="cpu or cuda", do="move the tensor")
    if writable:
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                name,
                got="a tensor that requires grad, to be written in place",
                wanted="a tensor that autograd does not record",
                do="pass x.detach(), or call under torch.no_grad()",
            )
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
    place, ptr = (CPU, 0) if device.type == "cpu" else (CUDA, device.index), x.data_ptr()
    spec = array_spec("torch", tuple(x.shape), x.stride(), dtype, place, False, ptr % ROW_ALIGNMENT)
    # The storage is the owner and not x, whose memory `x.data = …` and `x.set_(…)` would exchange.
    return ArrayView(spec, ptr, x.untyped_storage())


# What to do about a subclass, by name: importing torch's private modules only to name them would be worse.
_SUBCLASS_REMEDIES = {
    "FakeTensor": "call epcomm outside torch.compile, torch.export and FakeTensorMode",
    "FunctionalTensor": "call epcomm outside torch.compile and torch.export",
    "DTensor": "pass x.to_local()",
    "NestedTensor": "pass x.values() and keep the offsets",
}


def _check_torch_kind(torch: Any, x: Any, name: str) -> None:
    """Refuse tensors whose values are not simply the elements at their data pointer."""
    kind = type(x)
    problem = remedy = None
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        problem = f"a tensor subclass, {kind.__module__}.{kind.__qualname__}"
        remedy = _SUBCLASS_REMEDIES.get(kind.__name__, "pass the plain tensor inside, or x.as_subclass(torch.Tensor)")
    elif torch._C._functorch.is_functorch_wrapped_tensor(x):
        problem = "a tensor wrapped by a torch.func transform (vmap, grad, jvp, functionalize)"
        remedy = "call epcomm outside the transform"
    elif x.is_nested:
        problem, remedy = "a nested tensor", "pass torch.nested.to_padded_tensor(x, 0)"
    elif x.is_quantized:
        problem, remedy = "a quantized tensor", "pass x.int_repr() and the scales"
    elif x.layout is not torch.strided:
        problem, remedy = f"a tensor of layout {x.layout}", "pass x.to_dense()"
    elif x.is_conj() or x.is_neg():
        problem, remedy = "a lazily conjugated or negated view", "pass x.resolve_conj().resolve_neg()"
    if problem is not None:
        raise InputError(name, got=problem, wanted="a plain torch.Tensor", do=remedy)


def _import_jax(x: Any, name: str, writable: bool, stream: int | None) -> ArrayView:
    jax = sys.modules["jax"]
    if isinstance(x, jax.core.Tracer):
        raise InputError(
            name,
            got=f"a JAX tracer ({type(x).__name__})",
            wanted="a jax.Array that has values",
            do="call epcomm outside jax.jit, jax.vmap and jax.grad",
        )
    if not isinstance(x.dtype, np.dtype):
        raise DtypeError(name, got=f"a JAX array of {x.dtype}", wanted="numbers", do="pass jax.random.key_data(x)")
    if x.is_deleted():
        raise InputError(
            name,
            got="a JAX array that was deleted or donated",
            wanted="one that still has its memory",
            do="pass it before it is donated, or without donate_argnums",
        )
    num_devices = len(x.sharding.device_set)
    if num_devices > 1:
        raise InputError(
            name,
            got=f"a JAX array on {num_devices} devices",
            wanted="an array on one device",
            do="pass this rank's part, x.addressable_shards[0].data",
        )
    if writable:
        raise ImmutableArray(
            name,
            got="a JAX array, which never changes",
            wanted="an array that can be written",
            do="leave this argument out and use the array that the call returns",
        )
    _check_dtype(name, x.dtype)
    return _import_dlpack(x, name, False, stream, framework="jax")


def _import_cupy(x: Any, name: str, writable: bool, stream: int | None) -> ArrayView:
    data = x.data
    ptr = data.ptr
    return ArrayView(_cupy_spec(name, x.dtype, x.shape, x.strides, data.device_id, ptr % ROW_ALIGNMENT), ptr, x)


@functools.lru_cache(maxsize=4096)
def _cupy_spec(
    name: str, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...], device: int, misalignment: int
) -> ArraySpec:
    _check_dtype(name, dtype)
    in_elements = _in_elements(name, strides, dtype.itemsize)
    return array_spec("cupy", shape, in_elements, dtype, (CUDA, device), False, misalignment)


class _OnStream:
    """A DLPack producer that is asked for a capsule for one stream, whoever asks."""

    def __init__(self, producer: Any, stream: int) -> None:
        self._producer, self._stream = producer, stream or LEGACY

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._producer.__dlpack__(stream=self._stream, **keywords)


def _import_dlpack(x: Any, name: str, writable: bool, stream: int | None, framework: str = "dlpack") -> ArrayView:
    if stream is not None and x.__dlpack_device__()[0] == CUDA:
        x = _OnStream(x, stream)
    tensor = dlpack.read(x, name)
    readonly = tensor.readonly or framework == "jax"  # JAX's capsules have no field to say so
    if writable and readonly:
        raise _read_only(name)
    spec = array_spec(
        framework, tensor.shape, tensor.strides, tensor.dtype, tensor.device, readonly, tensor.ptr % ROW_ALIGNMENT
    )
    return ArrayView(spec, tensor.ptr, tensor.capsule)


_Importer: TypeAlias = Callable[[Any, str, bool, int | None], ArrayView]
_IMPORTERS: dict[str, _Importer] = {
    "numpy": _import_numpy,
    "torch": _import_torch,
    "jax": _import_jax,
    "cupy": _import_cupy,
    "dlpack": _import_dlpack,
}


_importer_of: dict[type, _Importer] = {}  # by class of array, as they come


def export_array(a: NDArray[Any], framework: str) -> Any:
    """An array of `framework` over the memory of `a`, which it keeps alive. Does not block; not collective.

    PyTorch shares any strides. JAX shares what it can represent and copies the rest: memory that does not start at a
    multiple of 64 bytes (`empty` does), gaps between elements, and 64-bit dtypes without ``jax_enable_x64``, which
    become 32-bit ones. A tensor does not require grad. JAX takes it for granted that the memory is never written again.

    Args:
        a: array in host memory, of a dtype that `import_array` takes.
        framework: as `framework_of` names it; "numpy" and "dlpack" give `a` itself.

    Raises:
        DtypeError: a dtype that epcomm does not carry.
        DeviceError: "cupy", whose arrays are never in host memory.
        InputError: an unknown framework, one that this process has not imported, or a read-only `a` for another
            framework, where anybody could write it.
    """
    if framework in ("numpy", "dlpack"):
        return a
    if framework == "cupy":
        raise wrong_device("export_array", (CPU, 0), "cuda")
    module = sys.modules.get(framework) if framework in ("torch", "jax") else None
    if module is None:
        raise InputError(
            "export_array",
            got=f"framework {framework!r}",
            wanted="numpy, torch, jax, cupy or dlpack",
            do=f"import {framework} first" if framework in ("torch", "jax") else "correct the name",
        )
    _check_dtype("export_array", a.dtype)
    if not a.flags.writeable:
        raise _read_only("export_array")
    if framework == "torch":
        return module.from_dlpack(dlpack.Exporter(a, a.dtype))
    if not _is_packed(a):
        packed = empty(a.shape, a.dtype)
        packed[...] = a
        a = packed
    return module.dlpack.from_dlpack(dlpack.Exporter(a, a.dtype))


def _is_packed(a: NDArray[Any]) -> bool:
    """Whether some order of the axes makes `a` row-major without gaps."""
    if a.flags.c_contiguous:
        return True
    order = sorted(range(a.ndim), key=lambda axis: -a.strides[axis])
    return a.transpose(order).flags.c_contiguous


def _in_elements(name: str, strides: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes as strides in elements."""
    for step in strides:
        if step % itemsize:
            raise LayoutError(
                name,
                got=f"strides of {list(strides)} bytes for elements of {itemsize} bytes",
                wanted="strides that are multiples of the element size",
                do="pass a contiguous copy of it",
            )
    return tuple([step // itemsize for step in strides])


def _check_dtype(name: str, dtype: DType) -> None:
    if dtype not in DTYPES:
        raise _wrong_dtype(name, dtype)


def _wrong_dtype(name: str, dtype: object) -> DtypeError:
    if isinstance(dtype, np.dtype) and dtype.newbyteorder("=") in DTYPES:
        return DtypeError(
            name,
            got=f"byte-swapped dtype {dtype.str}",
            wanted="the byte order of this machine",
            do='pass x.astype(x.dtype.newbyteorder("="))',
        )
    wanted = ", ".join(str(known) for known in DTYPES)
    return DtypeError(name, got=f"dtype {dtype}", wanted=f"one of {wanted}", do="cast it, or view it as uint8")


def _read_only(name: str) -> InputError:
    return InputError(name, got="a read-only array", wanted="one that may be written", do="pass a copy of it")
