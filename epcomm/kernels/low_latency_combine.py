"""``cuda_src/kernels/low_latency_combine.cu``: the experts' rows back to their tokens, weighted and summed."""

from __future__ import annotations

import struct

from epcomm.jit import Program
from epcomm.kernels.layout import MAX_RANKS
from epcomm.kernels.low_latency import MAX_EXPERTS, SLOT, THREADS

__all__ = [
    "DEPTH",
    "ENCODED_ROWS",
    "ENTRY",
    "FIELDS",
    "MAX_SHARED_BYTES",
    "PARTIAL_SUMS",
    "PROGRAMS",
    "ROWS",
    "shared_bytes",
]

ROWS, ENCODED_ROWS, PARTIAL_SUMS = 0, 1, 2  # payloads
PROGRAMS = {
    payload: Program("kernels/low_latency_combine.cu", (("LOW_LATENCY_PAYLOAD", str(payload)),))
    for payload in (ROWS, ENCODED_ROWS, PARTIAL_SUMS)
}
ENTRY = "epcomm_low_latency_combine"
DEPTH = 10  # columns of 16 bytes that a thread has on their way

# slot; buffer[32]; staging, staging_bytes; x, topk_idx, topk_weights, send_info, layout_range, messages, num_messages,
# out, wait_stats; row_bytes, wire_bytes, piece_bytes, num_pieces; is_pulled, num_tokens, num_topk, index_bytes,
# num_local_experts, max_tokens; by_local, by_pieces
FIELDS = struct.Struct(f"<{SLOT}{MAX_RANKS}Q11Q4I6i4I")


def shared_bytes(payload: int, num_experts: int) -> int:
    """Dynamic shared memory: what is on its way, and the first row at every expert."""
    if payload == ENCODED_ROWS:
        return 0
    return 16 * THREADS * DEPTH + (4 * num_experts if payload == ROWS else 0)


MAX_SHARED_BYTES = shared_bytes(ROWS, MAX_EXPERTS)
