"""A small MoE exchange made from the global token index, and the proof that a Buffer still works.

Rank r has ``r + 3`` tokens, so shapes differ by rank and any rank can compute what every other one holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from helpers.frames import Frames, down, frames_of
from numpy.typing import NDArray

from epcomm import Buffer, DispatchResult, LayoutResult, reference
from epcomm.testing import assert_bitwise, masked_routing, token_data

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN = 128
NUM_TOPK = 3
NUM_LOCAL_EXPERTS = 4
MAX_TOKENS = 16


@dataclass(frozen=True)
class Inputs:
    """What one rank brings."""

    x: NDArray[Any]  # bfloat16 [T, HIDDEN]
    topk_idx: NDArray[np.int64]  # [T, NUM_TOPK]
    topk_weights: NDArray[np.float32]  # [T, NUM_TOPK]


def num_experts(size: int) -> int:
    return NUM_LOCAL_EXPERTS * size


@functools.cache
def inputs(rank: int, size: int, seed: int = 0) -> Inputs:
    """The tokens of `rank` in a job of `size` ranks; read-only, because all tests share them."""
    num_tokens, first_token = rank + 3, sum(r + 3 for r in range(rank))
    place: dict[str, int] = {"seed": seed, "first_token": first_token}
    weights = token_data(num_tokens, NUM_TOPK, np.float32, **place)
    topk_idx = masked_routing(num_tokens, num_experts(size), NUM_TOPK, masked_fraction=0.2, **place)
    made = Inputs(token_data(num_tokens, HIDDEN, BFLOAT16, **place), topk_idx, weights)
    for array in vars(made).values():
        array.flags.writeable = False
    return made


@dataclass(frozen=True)
class Oracle:
    """What all ranks must hold after the calls of `assert_works`."""

    dispatched: list[reference.Dispatched]
    combined: list[tuple[NDArray[Any], NDArray[Any] | None]]
    low_latency: list[reference.LowLatencyDispatched]
    low_latency_combined: list[NDArray[Any]]


@functools.cache
def oracle(size: int, ranks_per_node: int, seed: int) -> Oracle:
    everyone = [inputs(rank, size, seed) for rank in range(size)]
    x, topk_idx, weights = ([getattr(one, name) for one in everyone] for name in ("x", "topk_idx", "topk_weights"))
    experts = num_experts(size)
    dispatched = reference.dispatch(x, topk_idx, experts, topk_weights=weights)
    combined = reference.combine(
        [one.recv_x for one in dispatched],
        topk_idx,
        experts,
        ranks_per_node=ranks_per_node,
        topk_weights=[one.recv_topk_weights for one in dispatched],
    )
    low_latency = reference.low_latency_dispatch(x, topk_idx, MAX_TOKENS, experts, use_fp8=False)
    sums = reference.low_latency_combine([one.recv_x for one in low_latency], topk_idx, weights, low_latency)
    return Oracle(dispatched, combined, low_latency, sums)


def layout_arguments(layout: LayoutResult) -> dict[str, Any]:
    """The keywords of ``Buffer.dispatch`` that stand for a layout."""
    return dict(zip(LayoutResult._fields[:4], layout[:4], strict=True))


def send(buffer: Buffer, mine: Inputs, frames: Frames | None = None) -> DispatchResult:
    """A dispatch with indices and weights."""
    up = (frames or frames_of(buffer)).up
    topk_idx = up(mine.topk_idx)
    layout = layout_arguments(buffer.get_dispatch_layout(topk_idx, num_experts(buffer.group_size)))
    return buffer.dispatch(up(mine.x), topk_idx=topk_idx, topk_weights=up(mine.topk_weights), **layout)


def assert_works(buffer: Buffer, seed: int = 0, frames: Frames | None = None) -> None:
    """All operations give the oracle's bits, twice: once in each slot. Collective."""
    for number in range(2):
        assert_throughput_works(buffer, seed + number, frames)
        if buffer.low_latency_mode:
            assert_low_latency_works(buffer, seed + number)


def assert_throughput_works(buffer: Buffer, seed: int, frames: Frames | None = None) -> None:
    """Dispatch, cached dispatch and combine. Collective."""
    mine, frames = inputs(buffer.rank, buffer.group_size, seed), frames or frames_of(buffer)
    wanted = _oracle_of(buffer, seed)
    dispatched, (combined_x, combined_weights) = wanted.dispatched[buffer.rank], wanted.combined[buffer.rank]
    got = send(buffer, mine, frames)
    assert_bitwise(down(got.recv_x), dispatched.recv_x, "recv_x")
    assert_bitwise(down(got.recv_topk_idx), dispatched.recv_topk_idx, "recv_topk_idx")
    assert_bitwise(down(got.recv_topk_weights), dispatched.recv_topk_weights, "recv_topk_weights")
    again = buffer.dispatch(frames.up(mine.x), handle=got.handle)
    assert_bitwise(down(again.recv_x), dispatched.recv_x, "recv_x of the cached dispatch")
    combined = buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights)
    assert_bitwise(down(combined.combined_x), combined_x, "combined_x")
    assert_bitwise(down(combined.combined_topk_weights), combined_weights, "combined_topk_weights")


def assert_low_latency_works(buffer: Buffer, seed: int) -> None:
    """Low-latency dispatch and combine. Collective."""
    mine, wanted = inputs(buffer.rank, buffer.group_size, seed), _oracle_of(buffer, seed)
    dispatched, up = wanted.low_latency[buffer.rank], frames_of(buffer).up
    topk_idx, num = up(mine.topk_idx), num_experts(buffer.group_size)
    got = buffer.low_latency_dispatch(up(mine.x), topk_idx, MAX_TOKENS, num, use_fp8=False)
    assert_bitwise(down(got.recv_count), dispatched.recv_count, "recv_count")
    recv_x = down(got.recv_x)
    for expert, count in enumerate(dispatched.recv_count):
        assert_bitwise(recv_x[expert, :count], dispatched.recv_x[expert, :count], f"recv_x of expert {expert}")
    combined, _, _ = buffer.low_latency_combine(got.recv_x, topk_idx, up(mine.topk_weights), got.handle)
    assert_bitwise(down(combined), wanted.low_latency_combined[buffer.rank], "low-latency combined_x")


def _oracle_of(buffer: Buffer, seed: int) -> Oracle:
    return oracle(buffer.group_size, buffer.topology.ranks_per_node, seed)
