"""``cuda_src/kernels/low_latency_service.cu``: masks, and a wait for a combine buffer."""

from __future__ import annotations

import struct

from epcomm.config import NUM_LOW_LATENCY_SLOTS
from epcomm.jit import Program

__all__ = ["ENTRY", "FIELDS", "PROGRAM", "THREADS"]

PROGRAM = Program("kernels/low_latency_service.cu")
ENTRY = "epcomm_low_latency_service"
THREADS = 32

# operation, leaves_late, set, clear; masks, sequences; resume[4]
FIELDS = struct.Struct(f"<4I2Q{2 * NUM_LOW_LATENCY_SLOTS}I")
