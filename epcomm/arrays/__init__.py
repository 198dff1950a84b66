"""Arrays of NumPy, PyTorch, JAX, CuPy and other DLPack producers, in and out, without a copy."""

from epcomm.arrays.exchange import export_array, framework_of, import_array
from epcomm.arrays.view import ArrayView, empty, require, wrong_device

__all__ = ["ArrayView", "empty", "export_array", "framework_of", "import_array", "require", "wrong_device"]
