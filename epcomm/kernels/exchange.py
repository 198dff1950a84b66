"""``cuda_src/kernels/exchange.cu``: counts of all ranks to all ranks."""

from __future__ import annotations

import struct

from epcomm.jit import Program
from epcomm.kernels.layout import NUM_AGREED

__all__ = ["ANY_CAPACITY", "ENTRY", "FIELDS", "PROGRAM", "STATUS_COUNTS", "THREADS"]

PROGRAM = Program("kernels/exchange.cu")
ENTRY = "epcomm_exchange"
THREADS = 1024
STATUS_COUNTS = 2  # num_tokens_per_rank contradicts is_token_in_rank
ANY_CAPACITY = 0xFFFFFFFF

# is_token_in_rank, tokens_per_rank, tokens_per_expert, send_pos, rank_prefix, node_counts;
# num_tokens, num_local_experts, status, tag, is_awaited, capacity; agreed; num_nodes, unused
FIELDS = struct.Struct(f"<6Q2i4I{NUM_AGREED}IiI")
