"""A training step through dispatch and combine with PyTorch's autograd, compared with the same layer on one rank.

epcomm run -n 4 -- python examples/07_torch_autograd.py
"""

import sys

import torch

import epcomm
import epcomm.interop.torch as ep

torch.set_num_threads(1)
NUM_TOKENS, HIDDEN, NUM_LOCAL, NUM_TOPK = 16, 32, 2, 2


def experts(weights, x, topk_idx, topk_weights):
    """Sum of the outputs of a row's experts, weighted; -1 is no expert."""
    y = torch.zeros_like(x)
    for e, weight in enumerate(weights):
        rows, choices = (topk_idx == e).nonzero(as_tuple=True)
        y = y.index_add(0, rows, torch.tanh(x[rows] @ weight) * topk_weights[rows, choices, None])
    return y


with epcomm.Buffer() as buffer:
    rank, num_ranks = buffer.rank, buffer.group_size
    num_experts = NUM_LOCAL * num_ranks
    shared = torch.Generator().manual_seed(0)  # the same on all ranks
    all_x = torch.randn(num_ranks * NUM_TOKENS, HIDDEN, generator=shared)
    gate = torch.randn(HIDDEN, num_experts, generator=shared).requires_grad_()
    weights = (torch.randn(num_experts, HIDDEN, HIDDEN, generator=shared) / 8).requires_grad_()

    def loss_of(x, layer):
        topk_weights, topk_idx = torch.topk(torch.softmax(x @ gate, dim=-1), NUM_TOPK)
        return (layer(x, topk_idx, topk_weights) ** 2).sum()

    def distributed(x, topk_idx, topk_weights):
        recv = ep.dispatch(buffer, x, topk_idx, topk_weights, num_experts)
        local = weights[rank * NUM_LOCAL : (rank + 1) * NUM_LOCAL]
        y = experts(local, recv.recv_x, recv.recv_topk_idx, recv.recv_topk_weights)
        return ep.combine(buffer, y, recv.handle).combined_x

    x = all_x[rank * NUM_TOKENS : (rank + 1) * NUM_TOKENS]
    loss_of(x, distributed).backward()  # collective, like the forward pass
    own_experts, own_gate = weights.grad[rank * NUM_LOCAL : (rank + 1) * NUM_LOCAL], gate.grad

    # The dense layer: the gradient of this rank's experts by all tokens, that of the gate by this rank's tokens.
    weights.grad = gate.grad = None
    loss_of(all_x, lambda *routed: experts(weights, *routed)).backward()
    error = (own_experts - weights.grad[rank * NUM_LOCAL : (rank + 1) * NUM_LOCAL]).abs().max().item()
    gate.grad = None
    loss_of(x, lambda *routed: experts(weights, *routed)).backward()
    error = max(error, (own_gate - gate.grad).abs().max().item())
    if not error < 1e-4:
        sys.exit(f"rank {rank}: gradients are off by {error}")
    if rank == 0:
        print(f"{num_ranks} ranks; check: largest difference of a gradient from the dense layer's {error:.1e}")
