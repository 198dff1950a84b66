"""epcomm: expert-parallel dispatch and combine for NumPy, CuPy, JAX and PyTorch, where pip install is all you have.

Importing this package touches no GPU, no MPI and no framework.
"""

from epcomm import errors
from epcomm.bootstrap import Communicator, LocalGroup, run_local
from epcomm.buffer import Buffer
from epcomm.config import Config
from epcomm.errors import EpcommError
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
