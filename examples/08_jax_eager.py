"""Gradients through dispatch and combine with JAX, and a handle that travels through JAX as a pytree.

epcomm run -n 4 -- python examples/08_jax_eager.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import epcomm
import epcomm.interop.jax as ep
from epcomm import testing

NUM_TOKENS, HIDDEN, NUM_LOCAL, NUM_TOPK = 8, 32, 2, 2


@jax.jit
def experts(scales, x, topk_idx, topk_weights):
    """Expert e is tanh(scales[e] * x). What is between the calls may be jitted; the calls themselves may not."""
    outputs = jnp.tanh(x[:, None, :] * scales[jnp.maximum(topk_idx, 0)])
    return jnp.where((topk_idx >= 0)[..., None], outputs * topk_weights[..., None], 0).sum(axis=1)


with jax.default_device(jax.devices("cpu")[0]), epcomm.Buffer() as buffer:
    rank, num_experts = buffer.rank, NUM_LOCAL * buffer.group_size
    own = slice(rank * NUM_TOKENS, (rank + 1) * NUM_TOKENS)
    num_tokens = NUM_TOKENS * buffer.group_size
    all_x = jnp.asarray(testing.token_data(num_tokens, HIDDEN, np.float32))
    all_idx = jnp.asarray(testing.uniform_routing(num_tokens, num_experts, NUM_TOPK, seed=0).astype(np.int32))
    all_weights = jnp.asarray(testing.token_data(num_tokens, NUM_TOPK, np.float32, seed=1))
    scales = jnp.asarray(testing.token_data(num_experts, HIDDEN, np.float32, seed=2))

    def loss(x, topk_weights):
        recv = ep.dispatch(buffer, x, all_idx[own], topk_weights, num_experts)
        local = scales[rank * NUM_LOCAL : (rank + 1) * NUM_LOCAL]
        y = experts(local, recv.recv_x, recv.recv_topk_idx, recv.recv_topk_weights)
        return (ep.combine(buffer, y, recv.handle).combined_x ** 2).sum()

    def dense_loss(x, topk_weights):
        return (experts(scales, x, all_idx, topk_weights) ** 2).sum()

    grads = jax.grad(loss, argnums=(0, 1))(all_x[own], all_weights[own])  # collective, backward pass included
    wanted = jax.grad(dense_loss, argnums=(0, 1))(all_x, all_weights)
    error = max(float(jnp.abs(got - want[own]).max()) for got, want in zip(grads, wanted, strict=True))
    if not error < 1e-3:
        sys.exit(f"rank {rank}: gradients are off by {error}")

    recv = ep.dispatch(buffer, all_x[own], all_idx[own], None, num_experts)
    handle = jax.tree.map(jnp.asarray, recv.handle)  # arrays are leaves, sizes are static
    if not jnp.array_equal(buffer.dispatch(all_x[own], handle=handle).recv_x, recv.recv_x):
        sys.exit(f"rank {rank}: the handle did not survive")
    if rank == 0:
        print(f"{buffer.group_size} ranks; check: largest difference of a gradient from the dense layer's {error:.1e}")
