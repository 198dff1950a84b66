"""JAX: `dispatch` and `combine` with gradients, on arrays that have values.

The two operations are each other's gradient: what dispatch copies to several ranks, its backward sums with combine;
what combine sums, its backward copies with a cached dispatch. ::

    recv = epcomm.interop.jax.dispatch(buffer, x, topk_idx, topk_weights, num_experts)
    y = experts(recv.recv_x, recv.recv_topk_idx, recv.recv_topk_weights)
    out = epcomm.interop.jax.combine(buffer, y, recv.handle).combined_x

They work in functions given to ``jax.grad``, ``jax.vjp`` and ``jax.value_and_grad``, also nested, as long as nothing
around the call is traced: how many rows arrive is only known when they do, and under ``jax.jit`` shapes are fixed and
calls may be reordered differently on different ranks. What is between the calls may be jitted. Backward passes are
collective as well: all ranks have to run them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from epcomm.buffer import Buffer
from epcomm.config import Config
from epcomm.errors import InputError
from epcomm.event import EventOverlap
from epcomm.handle import CombineResult, DispatchHandle, DispatchResult, register_pytrees

__all__ = ["combine", "dispatch"]

register_pytrees()


def dispatch(
    buffer: Buffer,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    num_experts: int,
    *,
    expert_alignment: int = 1,
    config: Config | None = None,
) -> DispatchResult:
    """``Buffer.dispatch``, layout included, with gradients for `x` and `topk_weights`.

    Collective, and so is its backward. Blocks the host.

    Args:
        buffer: the same one for all its calls.
        x: ``[T, hidden]`` bfloat16, float16 or float32.
        topk_idx: int32 or int64 ``[T, K]``; -1 selects nothing.
        topk_weights: float32 ``[T, K]`` or None; the same choice on all ranks.
        num_experts: experts of all ranks.
        expert_alignment, config: as in ``Buffer.dispatch``.

    Returns:
        As ``Buffer.dispatch``.

    Raises:
        InputError: under ``jax.jit``, ``jax.vmap``, ``jax.checkpoint`` or control flow of ``jax.lax``.
        Others as ``Buffer.dispatch``.
    """
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle = _dispatch(
        buffer, x, topk_idx, topk_weights, num_experts, expert_alignment, config
    )
    return DispatchResult(
        recv_x, recv_topk_idx, recv_topk_weights, [int(count) for count in counts], handle, EventOverlap()
    )


def combine(
    buffer: Buffer,
    x: jax.Array,
    handle: DispatchHandle,
    topk_weights: jax.Array | None = None,
    *,
    config: Config | None = None,
) -> CombineResult:
    """``Buffer.combine`` with gradients for `x` and `topk_weights`.

    Collective, and so is its backward. Blocks the host.

    Args:
        buffer: the one that made the handle.
        x: ``[N, hidden]`` bfloat16, float16 or float32, one row for every received row.
        handle: what `dispatch` or ``Buffer.dispatch`` returned.
        topk_weights: float32 ``[N, K]`` or None; the same choice on all ranks.
        config: as in ``Buffer.combine``.

    Returns:
        As ``Buffer.combine``.

    Raises:
        InputError: under ``jax.jit``, ``jax.vmap``, ``jax.checkpoint`` or control flow of ``jax.lax``.
        Others as ``Buffer.combine``.
    """
    combined_x, combined_topk_weights = _combine(buffer, config, x, topk_weights, handle)
    return CombineResult(combined_x, combined_topk_weights, EventOverlap())


def _require_values(operation: str, *arrays: Any) -> None:
    """Raise on tracers. What jax.grad traces comes to a custom_vjp function as plain arrays, and passes."""
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.core.Tracer):
            raise InputError(
                operation,
                got=f"a JAX tracer ({type(leaf).__name__})",
                wanted="arrays that have values",
                do="call it outside jax.jit, jax.vmap, jax.checkpoint and jax.lax control flow; "
                "jax.grad and jax.vjp are fine",
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5, 6))
def _dispatch(
    buffer: Buffer, x: Any, topk_idx: Any, topk_weights: Any, num_experts: int, alignment: int, config: Config | None
) -> tuple[Any, ...]:
    """The arrays of a DispatchResult; the handle is a pytree of arrays, too."""
    _require_values("dispatch", x, topk_idx, topk_weights)
    layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    result = buffer.dispatch(
        x,
        num_tokens_per_rank=layout.num_tokens_per_rank,
        num_tokens_per_rdma_rank=layout.num_tokens_per_rdma_rank,
        is_token_in_rank=layout.is_token_in_rank,
        num_tokens_per_expert=layout.num_tokens_per_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        expert_alignment=alignment,
        config=config,
    )
    counts = np.array(result.num_recv_tokens_per_expert_list, np.int32)
    return result.recv_x, result.recv_topk_idx, result.recv_topk_weights, counts, result.handle


def _dispatch_forward(*args: Any) -> tuple[Any, Any]:
    out = _dispatch(*args)
    return out, (out[1], out[4])


def _dispatch_backward(
    buffer: Buffer, _num_experts: int, _alignment: int, _config: Any, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    recv_topk_idx, handle = residuals
    grad_x, _, grad_weights, _, _ = cotangents
    if grad_weights is not None:
        # The zeros that stand for other ranks' experts are constants.
        grad_weights = jnp.where(recv_topk_idx >= 0, grad_weights, 0)
    grad_x, grad_weights = _combine(buffer, None, grad_x, grad_weights, handle)
    return grad_x, None, grad_weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(buffer: Buffer, config: Config | None, x: Any, topk_weights: Any, handle: DispatchHandle) -> Any:
    _require_values("combine", x, topk_weights, handle)
    result = buffer.combine(x, handle, topk_weights, config=config)
    return result.combined_x, result.combined_topk_weights


def _combine_forward(*args: Any) -> tuple[Any, Any]:
    return _combine(*args), args[-1]


def _combine_backward(
    buffer: Buffer, _config: Any, handle: DispatchHandle, cotangents: tuple[Any, Any]
) -> tuple[Any, ...]:
    return (*_redispatch(buffer, *cotangents, handle), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _redispatch(buffer: Buffer, x: Any, weights: Any, handle: DispatchHandle) -> Any:
    """Cached dispatch, to which the weights' gradients are one more row of scales."""
    _require_values("combine's backward", x, weights, handle)
    recv = buffer.dispatch(x if weights is None else (x, weights), handle=handle).recv_x
    num_rows = handle.num_recv_tokens
    # num_worst_tokens' padding is undefined.
    cleared = [a if len(a) == num_rows else a.at[num_rows:].set(0) for a in (recv if weights is not None else (recv,))]
    return cleared[0], cleared[1] if weights is not None else None


def _redispatch_forward(*args: Any) -> tuple[Any, Any]:
    return _redispatch(*args), args[-1]


def _redispatch_backward(buffer: Buffer, handle: DispatchHandle, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    return (*_combine(buffer, None, *cotangents, handle), None)


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_combine.defvjp(_combine_forward, _combine_backward)
_redispatch.defvjp(_redispatch_forward, _redispatch_backward)
