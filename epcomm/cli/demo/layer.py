"""The layer of the demo over all ranks: what an expert-parallel program does with a Buffer, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import Communicator
from epcomm.buffer import Buffer
from epcomm.cli.demo.arrays import Arrays
from epcomm.cli.demo.model import Expert, MoeLayer
from epcomm.handle import DispatchResult

__all__ = ["PHASES", "Forward", "PhaseTimer", "forward", "own_experts_sum"]

PHASES = ("gate", "layout", "dispatch", "experts", "combine")


class PhaseTimer:
    """Seconds of each phase; the ranks meet in a barrier before it, so that no phase pays for the one before."""

    def __init__(self, comm: Communicator, arrays: Arrays) -> None:
        self._comm, self._arrays = comm, arrays
        self.times_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block."""
        self._comm.barrier()
        start = time.perf_counter()
        yield
        self._arrays.finish()
        self.times_s[name] = time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Forward:
    """What one rank has after the layer; T tokens of its own, N received rows.

    Attributes:
        topk_idx, topk_weights: the gate's choice for its own tokens, ``[T, K]``, in host memory.
        dispatched: the received rows.
        output: bfloat16 ``[T, H]``, in host memory.
    """

    topk_idx: NDArray[np.int64]
    topk_weights: NDArray[np.float32]
    dispatched: DispatchResult
    output: NDArray[Any]


def forward(
    buffer: Buffer, arrays: Arrays, layer: MoeLayer, experts: Sequence[Expert], x: NDArray[Any], timer: PhaseTimer
) -> Forward:
    """One pass of the layer over this rank's tokens. Collective.

    Args:
        buffer: the ranks.
        arrays: where its arrays lie.
        layer: the layer; its gate is used.
        experts: those that this rank owns, with weights where rows are.
        x: bfloat16 ``[T, H]``, in host memory.
        timer: takes the time of every phase of `PHASES`.
    """
    with timer.phase("gate"):
        topk_idx, topk_weights = layer.gate(x)
        rows, indices, weights = arrays.put(x), arrays.put(topk_idx), arrays.put(topk_weights)
    with timer.phase("layout"):
        layout = buffer.get_dispatch_layout(indices, layer.config.num_experts)
    with timer.phase("dispatch"):
        dispatched = buffer.dispatch(
            rows,
            num_tokens_per_rank=layout.num_tokens_per_rank,
            num_tokens_per_rdma_rank=layout.num_tokens_per_rdma_rank,
            is_token_in_rank=layout.is_token_in_rank,
            num_tokens_per_expert=layout.num_tokens_per_expert,
            topk_idx=indices,
            topk_weights=weights,
        )
    with timer.phase("experts"):
        y = own_experts_sum(arrays, experts, dispatched)
    with timer.phase("combine"):
        combined = buffer.combine(y, dispatched.handle).combined_x
        output = layer.residual(x, arrays.get(combined))
    return Forward(topk_idx, topk_weights, dispatched, output)


def own_experts_sum(arrays: Arrays, experts: Sequence[Expert], dispatched: DispatchResult) -> Any:
    """bfloat16 ``[N, H]``: for every received row the weighted sum over the experts of this rank that it chose."""
    received, weights = arrays.widen(dispatched.recv_x), dispatched.recv_topk_weights
    total = arrays.xp.zeros(received.shape, np.float32)
    for index, expert in enumerate(experts):
        rows, choices = arrays.xp.nonzero(dispatched.recv_topk_idx == index)
        if len(rows):
            total[rows] += weights[rows, choices, None] * expert(received[rows], arrays.matmul)
    return arrays.narrow(total)
