"""``cuda_src/kernels/low_latency_dispatch.cu``: tokens to their experts, grouped by expert on arrival."""

from __future__ import annotations

import functools
import struct

from epcomm.jit import Program
from epcomm.kernels.low_latency import SLOT

__all__ = [
    "ENTRY",
    "EXACT",
    "EXPONENTS",
    "FIELDS",
    "MAX_SHARED_BYTES",
    "POWER_OF_TWO",
    "PROGRAMS",
    "num_words",
    "shared_bytes",
]

PROGRAMS = {
    use_fp8: Program("kernels/low_latency_dispatch.cu", (("LOW_LATENCY_FP8", str(int(use_fp8))),))
    for use_fp8 in (False, True)
}
ENTRY = "epcomm_low_latency_dispatch"
EXACT, POWER_OF_TWO, EXPONENTS = 0, 1, 2  # scales
MAX_SHARED_BYTES = 72 * 1024

# slot; row_lane_bytes, cell_lane_bytes, row_stride, staging; x, topk_idx, send_info; recv_x, recv_scales, recv_count,
# src_info, layout_range, messages, num_messages; expert_stats, wait_stats; by_topk, by_local, by_pieces; scales,
# piece_bytes, num_pieces, num_words; hidden, num_tokens, num_topk, index_bytes, num_local_experts, max_tokens
FIELDS = struct.Struct(f"<{SLOT}16Q6I4I6i")


def shared_bytes(num_local_experts: int, num_ranks: int, num_topk: int, words: int) -> int:
    """Dynamic shared memory: who has chosen what, of 32 tokens a word, and the first row of every source anywhere."""
    rows = num_local_experts * num_ranks + num_ranks
    return 4 * (rows * (words + 1) + 32 * words * num_topk + num_local_experts * (num_ranks + 1))


@functools.lru_cache(maxsize=256)
def num_words(num_tokens: int, num_local_experts: int, num_ranks: int, num_topk: int) -> int:
    """Words of 32 tokens that are looked at together: all of them, if they fit shared memory."""
    fixed = shared_bytes(num_local_experts, num_ranks, num_topk, 0)
    each = shared_bytes(num_local_experts, num_ranks, num_topk, 1) - fixed
    return max(1, min(-(-num_tokens // 32), (MAX_SHARED_BYTES - fixed) // each))
