"""The machines that run a Buffer's operations, behind one protocol."""

from epcomm.backends.protocol import (
    Array,
    Backend,
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyCombineTerms,
    LowLatencyDispatchOutcome,
    LowLatencyDispatchRequest,
    LowLatencyDispatchTerms,
    Rejectable,
    Turn,
)

__all__ = [
    "Array",
    "Backend",
    "CombineRequest",
    "DispatchRequest",
    "LowLatencyCombineRequest",
    "LowLatencyCombineTerms",
    "LowLatencyDispatchOutcome",
    "LowLatencyDispatchRequest",
    "LowLatencyDispatchTerms",
    "Rejectable",
    "Turn",
]
