"""``cuda_src/kernels/low_latency_combine.cu``: the experts' rows back to their tokens, weighted and summed."""

from __future__ import annotations

import struct

from epcomm.jit import Program
from epcomm.kernels.layout import MAX_RANKS
from epcomm.kernels.low_latency import SLOT

__all__ = ["ENTRY", "FIELDS", "PROGRAM"]

PROGRAM = Program("kernels/low_latency_combine.cu")
ENTRY = "epcomm_low_latency_combine"

# slot; buffer[32]; rows_offset, x, topk_idx, topk_weights, send_pos, layout_range, send_begin, out, wait_stats;
# row_bytes, push_bytes, sum_bytes; is_pulled, num_tokens, num_topk, index_bytes, num_local_experts, max_rows, unused
FIELDS = struct.Struct(f"<{SLOT}{MAX_RANKS}Q9Q3I7i")
