"""epcomm: expert-parallel dispatch and combine for NumPy, CuPy, JAX and PyTorch, where pip install is all you have.

Importing this package touches no GPU, no MPI and no framework. Names are loaded when they are first used, so that
``epcomm run`` and ``epcomm doctor`` start even where NumPy cannot be imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from epcomm import errors
from epcomm.errors import EpcommError

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator, LocalGroup, run_local
    from epcomm.buffer import Buffer
    from epcomm.config import Config
    from epcomm.event import EventOverlap
    from epcomm.handle import (
        CombineResult,
        DispatchHandle,
        DispatchResult,
        LayoutResult,
        LowLatencyCombineResult,
        LowLatencyDispatchResult,
        LowLatencyHandle,
    )

__all__ = [
    "Buffer",
    "CombineResult",
    "Communicator",
    "Config",
    "DispatchHandle",
    "DispatchResult",
    "EpcommError",
    "EventOverlap",
    "LayoutResult",
    "LocalGroup",
    "LowLatencyCombineResult",
    "LowLatencyDispatchResult",
    "LowLatencyHandle",
    "errors",
    "run_local",
]

_MODULES = {
    "Buffer": "epcomm.buffer",
    "Communicator": "epcomm.bootstrap",
    "Config": "epcomm.config",
    "EventOverlap": "epcomm.event",
    "LocalGroup": "epcomm.bootstrap",
    "run_local": "epcomm.bootstrap",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'epcomm' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "epcomm.handle")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
