"""The machines that run a Buffer's operations, behind one protocol."""

from epcomm.backends.protocol import (
    Backend,
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Rejectable,
)

__all__ = [
    "Backend",
    "CombineRequest",
    "DispatchRequest",
    "LowLatencyCombineRequest",
    "LowLatencyDispatchRequest",
    "Rejectable",
]
