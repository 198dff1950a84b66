"""PyTorch: `dispatch` and `combine` that autograd records, and the ranks of a process group as a communicator.

The two operations are each other's gradient: what dispatch copies to several ranks, its backward sums with combine;
what combine sums, its backward copies with a cached dispatch. ::

    recv = epcomm.interop.torch.dispatch(buffer, x, topk_idx, topk_weights, num_experts)
    y = experts(recv.recv_x, recv.recv_topk_idx, recv.recv_topk_weights)
    out = epcomm.interop.torch.combine(buffer, y, recv.handle).combined_x

Backward passes are collective as well: all ranks have to run them, in the same order. Ranks that build the same graph
do. Gradients of gradients work too.
"""

from __future__ import annotations

from typing import Any

import torch

from epcomm.buffer import Buffer
from epcomm.config import Config
from epcomm.handle import CombineResult, DispatchHandle, DispatchResult
from epcomm.interop.process_group import ProcessGroupCommunicator

__all__ = ["ProcessGroupCommunicator", "combine", "dispatch"]


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
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
        As ``Buffer.dispatch``. `recv_x` and `recv_topk_weights` require grad when an input does.

    Raises:
        As ``Buffer.dispatch``.
    """
    return DispatchResult(*_Dispatch.apply(buffer, x, topk_idx, topk_weights, num_experts, expert_alignment, config))


def combine(
    buffer: Buffer,
    x: torch.Tensor,
    handle: DispatchHandle,
    topk_weights: torch.Tensor | None = None,
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
        As ``Buffer.combine``. `combined_x` and `combined_topk_weights` require grad when an input does.

    Raises:
        As ``Buffer.combine``.
    """
    return CombineResult(*_Combine.apply(buffer, x, topk_weights, handle, config))


# What backward does must not depend on which inputs require grad or which outputs were used, for that could differ by
# rank. autograd hands zeros for the gradients of outputs that were not used.


class _Dispatch(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        buffer: Buffer,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        num_experts: int,
        alignment: int,
        config: Any,
    ) -> tuple[Any, ...]:
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
        ctx.buffer, ctx.handle = buffer, result.handle
        ctx.save_for_backward(result.recv_topk_idx)
        ctx.mark_non_differentiable(result.recv_topk_idx)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, grad_x: Any, _idx: Any, grad_weights: Any, *_: Any) -> tuple[Any, ...]:
        if grad_weights is not None:
            # The zeros that stand for other ranks' experts are constants.
            grad_weights = grad_weights.masked_fill(ctx.saved_tensors[0] < 0, 0.0)
        grads = _Combine.apply(ctx.buffer, grad_x.contiguous(), grad_weights, ctx.handle, None)
        return None, grads[0], None, grads[1], None, None, None


class _Combine(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, buffer: Buffer, x: Any, topk_weights: Any, handle: Any, config: Any) -> tuple[Any, ...]:
        ctx.buffer, ctx.handle = buffer, handle
        return tuple(buffer.combine(x, handle, topk_weights, config=config))

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_weights: Any, *_: Any) -> tuple[Any, ...]:
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        grads = _Redispatch.apply(ctx.buffer, grad_x.contiguous(), grad_weights, ctx.handle)
        return None, grads[0], grads[1], None, None


class _Redispatch(torch.autograd.Function):  # type: ignore[misc]
    """Cached dispatch, to which the weights' gradients are one more row of scales."""

    @staticmethod
    def forward(ctx: Any, buffer: Buffer, x: Any, weights: Any, handle: DispatchHandle) -> tuple[Any, Any]:
        ctx.buffer, ctx.handle = buffer, handle
        recv = buffer.dispatch(x if weights is None else (x, weights), handle=handle).recv_x
        rows, weights = recv if isinstance(recv, tuple) else (recv, None)
        for received in (rows, weights):
            if received is not None:
                received[handle.num_recv_tokens :].zero_()  # num_worst_tokens' padding is undefined
        return rows, weights

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_weights: Any) -> tuple[Any, ...]:
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        grads = _Combine.apply(ctx.buffer, grad_x.contiguous(), grad_weights, ctx.handle, None)
        return None, grads[0], grads[1], None
