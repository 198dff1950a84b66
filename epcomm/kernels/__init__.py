"""Every kernel: its program, its argument struct and its launch shape. Nothing here touches a GPU."""

from epcomm.jit import Program
from epcomm.kernels import barrier, combine, dispatch, dispatch_layout, exchange

__all__ = ["PROGRAMS"]

PROGRAMS: tuple[Program, ...] = (
    dispatch_layout.PROGRAM,
    exchange.PROGRAM,
    dispatch.PROGRAM,
    *combine.PROGRAMS.values(),
    barrier.PROGRAM,
)
