"""Arrays of NumPy, PyTorch, JAX, CuPy and other DLPack producers, in and out, without a copy."""

from epcomm.arrays.device import cupy_array, device_array, export_any, to_device, to_host
from epcomm.arrays.exchange import export_array, framework_of, framework_or_none, import_array
from epcomm.arrays.streams import StreamRef
from epcomm.arrays.view import ArraySpec, ArrayView, Place, array_spec, empty, require, wrong_device

__all__ = [
    "ArraySpec",
    "ArrayView",
    "Place",
    "StreamRef",
    "array_spec",
    "cupy_array",
    "device_array",
    "empty",
    "export_any",
    "export_array",
    "framework_of",
    "framework_or_none",
    "import_array",
    "require",
    "to_device",
    "to_host",
    "wrong_device",
]
