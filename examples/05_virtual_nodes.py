"""The two-hop path between nodes, on one machine: ranks_per_node makes nodes of consecutive ranks.

epcomm run -n 4 -- python examples/05_virtual_nodes.py
"""

import sys

import numpy as np

import epcomm
from epcomm import testing

NUM_TOKENS, HIDDEN, NUM_TOPK = 32, 64, 4


def run(buffer):
    """A dispatch and a combine: (received rows, sums, tokens sent to each node, rows sent to ranks)."""
    num_experts, first_token = 4 * buffer.group_size, buffer.rank * NUM_TOKENS
    x = testing.token_data(NUM_TOKENS, HIDDEN, np.float32, first_token=first_token)
    topk_idx = testing.uniform_routing(NUM_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first_token)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert, topk_idx)
    if per_node is not None:
        # V1's place for the rows received from ranks 0..i, when there are several nodes.
        if recv.handle[-4][-1] != len(recv.recv_x):
            sys.exit(f"rank {buffer.rank}: handle[-4] does not count the rows")
        per_node = per_node.tolist()
    return recv.recv_x, buffer.combine(recv.recv_x, recv.handle).combined_x, per_node, int(per_rank.sum())


with epcomm.Buffer() as one_node:
    num_ranks = one_node.group_size
    rows, sums, _, num_rows_sent = run(one_node)

with epcomm.Buffer(ranks_per_node=max(1, num_ranks // 2) if num_ranks % 2 == 0 else 1) as nodes:
    rows_of_nodes, sums_of_nodes, per_node, _ = run(nodes)
    topology = nodes.topology

if not np.array_equal(rows, rows_of_nodes):
    sys.exit(f"rank {topology.rank}: the rows or their order depend on the nodes")
# Each node rounds its own sum before the nodes are added, so float32 sums may differ in the last bits.
if not np.allclose(sums, sums_of_nodes, rtol=1e-6, atol=1e-6):
    sys.exit(f"rank {topology.rank}: the sums depend on the nodes by more than rounding")
if topology.rank == 0:
    print(f"{topology.num_nodes} nodes of {topology.ranks_per_node} ranks; check: same rows in the same order")
    print(f"rank 0 sent {num_rows_sent} rows to ranks, but of its tokens each node got only: {per_node}")
