"""``cuda_src/kernels/low_latency_service.cu``: a wait until a combine buffer is free, and the masks."""

from __future__ import annotations

import struct

from epcomm.jit import Program

__all__ = ["ENTRY", "FIELDS", "PROGRAM", "THREADS"]

PROGRAM = Program("kernels/low_latency_service.cu")
ENTRY = "epcomm_low_latency_service"
THREADS = 32

# operation, leaves_late, set, clear; masks
FIELDS = struct.Struct("<4IQ")
