"""Every kernel: its program, its argument struct and its launch shape. Nothing here touches a GPU."""

from epcomm.jit import Program
from epcomm.kernels import (
    barrier,
    combine,
    dispatch,
    dispatch_layout,
    exchange,
    internode_combine,
    internode_dispatch,
    low_latency_combine,
    low_latency_dispatch,
    low_latency_service,
    network_probe,
)

__all__ = ["INTERNODE_PROGRAMS", "LOW_LATENCY_PROGRAMS", "NVSHMEM_PROGRAMS", "PROGRAMS", "programs_of"]

_COMMON_PROGRAMS = (dispatch_layout.PROGRAM, exchange.PROGRAM, barrier.PROGRAM)
PROGRAMS: tuple[Program, ...] = (*_COMMON_PROGRAMS, dispatch.PROGRAM, *combine.PROGRAMS.values())

# Only Buffers on several nodes need these, and of those above the common ones.
INTERNODE_PROGRAMS: tuple[Program, ...] = (internode_dispatch.PROGRAM, *internode_combine.PROGRAMS.values())

# Only Buffers with low_latency_mode need these.
LOW_LATENCY_PROGRAMS: tuple[Program, ...] = (
    *low_latency_dispatch.PROGRAMS.values(),
    *low_latency_combine.PROGRAMS.values(),
    low_latency_service.PROGRAM,
)

# Linked with NVSHMEM.
NVSHMEM_PROGRAMS: tuple[Program, ...] = (network_probe.PROGRAM,)


def programs_of(num_nodes: int, low_latency_mode: bool) -> tuple[Program, ...]:
    """The programs of a Buffer."""
    programs = PROGRAMS if num_nodes == 1 else (*_COMMON_PROGRAMS, *INTERNODE_PROGRAMS)
    return (*programs, *LOW_LATENCY_PROGRAMS) if low_latency_mode else programs
