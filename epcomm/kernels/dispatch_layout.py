"""``cuda_src/kernels/dispatch_layout.cu``: destinations of a rank's tokens."""

from __future__ import annotations

import struct

from epcomm.jit import Program

__all__ = ["ENTRY", "FIELDS", "MAX_BLOCKS", "PROGRAM", "THREADS", "num_blocks"]

PROGRAM = Program("kernels/dispatch_layout.cu")
ENTRY = "epcomm_dispatch_layout"
THREADS = 256
MAX_BLOCKS = 64

# topk_idx, tokens_per_rank, tokens_per_node, tokens_per_expert, is_token_in_rank, partial, ticket;
# num_tokens, num_topk, index_bytes, num_experts, num_ranks, ranks_per_node
FIELDS = struct.Struct("<7Q6i")
assert FIELDS.size == 80


def num_blocks(num_tokens: int) -> int:
    """Blocks of a launch: a thread a token, until there are many."""
    return max(1, min(MAX_BLOCKS, -(-num_tokens // THREADS)))
