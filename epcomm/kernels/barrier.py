"""``cuda_src/kernels/barrier.cu``: all ranks reach a point of their streams."""

from __future__ import annotations

import struct

from epcomm.jit import Program

__all__ = ["ENTRY", "FIELDS", "PROGRAM", "THREADS"]

PROGRAM = Program("kernels/barrier.cu")
ENTRY = "epcomm_barrier"
THREADS = 32
FIELDS = struct.Struct("<")
