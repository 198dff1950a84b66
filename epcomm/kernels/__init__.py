"""Every kernel: its program, its argument struct and its launch shape. Nothing here touches a GPU."""

from epcomm.jit import Program
from epcomm.kernels import (
    barrier,
    combine,
    dispatch,
    dispatch_layout,
    exchange,
    low_latency_combine,
    low_latency_dispatch,
    low_latency_service,
)

__all__ = ["LOW_LATENCY_PROGRAMS", "PROGRAMS"]

PROGRAMS: tuple[Program, ...] = (
    dispatch_layout.PROGRAM,
    exchange.PROGRAM,
    dispatch.PROGRAM,
    *combine.PROGRAMS.values(),
    barrier.PROGRAM,
)

# Only Buffers with low_latency_mode need these.
LOW_LATENCY_PROGRAMS: tuple[Program, ...] = (
    *low_latency_dispatch.PROGRAMS.values(),
    *low_latency_combine.PROGRAMS.values(),
    low_latency_service.PROGRAM,
)
