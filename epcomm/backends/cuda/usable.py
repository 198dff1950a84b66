"""Whether this process can use the CUDA backend."""

from __future__ import annotations

import importlib.util

from epcomm.backends.cuda.placement import has_network
from epcomm.bootstrap import Topology
from epcomm.errors import MissingDependency, UnsupportedOption
from epcomm.jit import installed_nvshmem

__all__ = ["why_no_network", "why_not"]


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


def why_no_network(topology: Topology) -> str:
    """Empty if GPUs of these nodes can reach each other with what is installed here, else why not."""
    try:
        if has_network(topology):
            installed_nvshmem()
    except (UnsupportedOption, MissingDependency) as error:
        return str(error)
    return ""
