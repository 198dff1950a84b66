"""Every kernel: its program, its argument struct and its launch shape. Nothing here touches a GPU."""

from dataclasses import replace

from epcomm.jit import Program
from epcomm.kernels import (
    barrier,
    combine,
    dispatch,
    dispatch_layout,
    exchange,
    internode_combine,
    internode_dispatch,
    link_probe,
    low_latency_combine,
    low_latency_dispatch,
    low_latency_service,
    network_probe,
)

__all__ = [
    "BENCH_PROGRAMS",
    "INTERNODE_PROGRAMS",
    "LOW_LATENCY_PROGRAMS",
    "NVSHMEM_PROGRAMS",
    "PROGRAMS",
    "over_network",
    "programs_of",
]

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

# No Buffer needs these.
BENCH_PROGRAMS: tuple[Program, ...] = (link_probe.PROGRAM,)


def over_network(program: Program) -> Program:
    """The same for ranks that are reached through NVSHMEM; of a program that tells no rank anything, that program."""
    if program == dispatch_layout.PROGRAM:
        return program
    return replace(program, defines=(*program.defines, ("KERNEL_NVSHMEM", "1")), nvshmem=True)


# Linked with NVSHMEM.
NVSHMEM_PROGRAMS: tuple[Program, ...] = (
    network_probe.PROGRAM,
    *map(over_network, (exchange.PROGRAM, barrier.PROGRAM, *INTERNODE_PROGRAMS, *LOW_LATENCY_PROGRAMS)),
)


def programs_of(num_nodes: int, low_latency_mode: bool, has_network: bool) -> tuple[Program, ...]:
    """The programs of a Buffer; `has_network`: other nodes are reached through NVSHMEM."""
    programs = PROGRAMS if num_nodes == 1 else (*_COMMON_PROGRAMS, *INTERNODE_PROGRAMS)
    if low_latency_mode:
        programs = (*programs, *LOW_LATENCY_PROGRAMS)
    return tuple(map(over_network, programs)) if has_network else programs
