"""Whether this process can use the CUDA backend."""

from __future__ import annotations

import importlib.util

__all__ = ["why_not"]


def why_not() -> str:
    """Empty if there is a GPU, CuPy and cuda-bindings, else what is missing. Local; does not block."""
    for package in ("cupy", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"no {package} (pip install 'epcomm[cuda13]')"
    import cupy

    if not cupy.cuda.is_available():  # never raises, even without a driver
        return "no GPU"
    return ""
