"""``cuda_src/kernels/low_latency_dispatch.cu``: tokens to their experts, grouped by expert on arrival."""

from __future__ import annotations

import struct

from epcomm.jit import Program
from epcomm.kernels.low_latency import SLOT

__all__ = [
    "BF16",
    "ENTRY",
    "FIELDS",
    "FP8",
    "FP8_EXPONENTS",
    "FP8_POWER_OF_TWO",
    "MAX_SHARED_BYTES",
    "MAX_TOKENS",
    "PROGRAM",
    "shared_bytes",
]

PROGRAM = Program("kernels/low_latency_dispatch.cu")
ENTRY = "epcomm_low_latency_dispatch"
BF16, FP8, FP8_POWER_OF_TWO, FP8_EXPONENTS = 0, 1, 2, 3
MAX_TOKENS = 32 * 4096  # of a rank: the choices of one expert have to fit shared memory
MAX_SHARED_BYTES = 64 * 1024  # two blocks have to fit an SM

# slot; lane_bytes, rows_offset, row_stride; x, topk_idx, send_pos; recv_x, recv_scales, recv_count, src_info,
# layout_range, send_begin; expert_stats, wait_stats; cast, send_vectors, receive_bytes; hidden, num_tokens, num_topk,
# index_bytes, num_local_experts, max_tokens, unused
FIELDS = struct.Struct(f"<{SLOT}14Q3I7i")


def shared_bytes(num_local_experts: int, num_ranks: int) -> int:
    """Dynamic shared memory: the first row of every source at every expert."""
    return 4 * num_local_experts * (num_ranks + 1)
