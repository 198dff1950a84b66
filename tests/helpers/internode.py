"""Bodies of tests over several nodes, for either backend. Collective, all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from helpers import checks
from helpers.cases import Case, Inputs, column_major_scales
from helpers.frames import down, frames_of

from epcomm import Buffer, reference
from epcomm.bootstrap import Communicator

MakeBuffer = Callable[[Communicator, int], Buffer]  # ranks, and how many form a node


def rows_to_nodes(inputs: Inputs, rank: int, ranks_per_node: int) -> np.ndarray[Any, Any]:
    """int ``[num_nodes]``: tokens of `rank` that have a choice on each node; what has to cross at least."""
    num_ranks = len(inputs.x)
    layout = reference.get_dispatch_layout(inputs.topk_idx[rank], inputs.num_experts, num_ranks, ranks_per_node)
    assert layout.num_tokens_per_rdma_rank is not None
    return layout.num_tokens_per_rdma_rank


def explicit_names_of_the_operations(buffer: Buffer, inputs: Inputs) -> None:
    rank, up = buffer.rank, frames_of(buffer).up
    topk_idx = up(inputs.topk_idx[rank])
    layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts)
    result = buffer.internode_dispatch(
        up(inputs.x[rank]), **layout.arguments(), topk_idx=topk_idx, topk_weights=up(inputs.topk_weights[rank])
    )
    checks.assert_dispatched(buffer, inputs, result)
    checks.assert_combined(buffer, inputs, buffer.internode_combine(up(inputs.outputs[rank]), result.handle))


def two_levels_round_twice(comm: Communicator, make_buffer: MakeBuffer, inputs: Inputs) -> None:
    """The case tells the two reductions apart: on one node the sums have other bits."""
    one_level, two_levels = (inputs.combined(per_node, 0, False) for per_node in (4, 2))
    assert any(
        (a.view(np.uint16) != b.view(np.uint16)).any() for (a, _), (b, _) in zip(one_level, two_levels, strict=True)
    )
    for ranks_per_node in (4, 2):
        with make_buffer(comm, ranks_per_node) as buffer:
            _, result = checks.dispatch(buffer, inputs)
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result))
            comm.barrier()


def worst_case_combine_after_cached(buffer: Buffer, inputs: Inputs) -> None:
    """Dropped rows are dropped at the forwarder, in the cached dispatch and in both combines."""
    _, result = checks.dispatch(buffer, inputs)
    cached = buffer.dispatch(frames_of(buffer).up(inputs.x[buffer.rank]), handle=result.handle)
    for handed_out in (result, cached, result):
        got = checks.combine(buffer, inputs, handed_out, 2, with_weights=True)
        checks.assert_combined(buffer, inputs, got, 2, with_weights=True)


def random_case(draw: random.Random, num_ranks: int, seed: int) -> Case:
    """Tokens, hidden, experts, choices and all options change from call to call."""
    return Case(
        f"random shape {seed}",
        tokens=tuple(draw.choice((0, 1, 5, 40, 130)) for _ in range(num_ranks)),
        hidden=8 * draw.randint(1, 300),
        experts_per_rank=draw.randint(1, 6),
        num_topk=draw.randint(1, 8),
        expert_alignment=draw.choice((1, 4)),
        has_weights=draw.random() < 0.5,
        topk_dtype=draw.choice((np.int32, np.int64)),
        worst=draw.choice(("", "", "exact", "room", "overflow")),
        num_biases=draw.randint(0, 2),
        scales=draw.choice((None, column_major_scales)),
    )


def calls_of_changing_shape(
    buffers: list[Buffer], num_calls: int, seed: int = 17, before: Callable[[], None] = lambda: None
) -> None:
    """Nothing is cleaned in between; `before` runs before every call."""
    draw, num_ranks = random.Random(seed), buffers[0].group_size  # the same on every rank
    for number in range(num_calls):
        buffer, inputs = draw.choice(buffers), random_case(draw, num_ranks, number).inputs(num_ranks, number)
        before()
        _, result = checks.dispatch(buffer, inputs)
        checks.assert_dispatched(buffer, inputs, result)
        checks.check_overflow(buffer, inputs)
        if draw.random() < 0.7:  # so that dispatches and combines do not alternate
            before()
            options = (inputs.case.num_biases, True)
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, *options), *options)


def every_row_crosses_once_for_each_node(buffer: Buffer, inputs: Inputs) -> None:
    """What `stats` has counted is what has to cross at least, no more rows than one for each rank."""
    rank, per_node = buffer.rank, buffer.topology.ranks_per_node
    to_nodes = np.delete(rows_to_nodes(inputs, rank, per_node), buffer.topology.node)
    before = buffer.stats
    for number in range(1, 4):
        _, result = checks.dispatch(buffer, inputs)
        combined = checks.combine(buffer, inputs, result)
        down((result.recv_x, combined.combined_x))  # the calls have ended
        now = buffer.stats
        for name in ("rows_to_other_nodes", "rows_from_other_nodes"):
            assert now[name] - before[name] == number * to_nodes.sum(), name
    direct = reference.get_dispatch_layout(inputs.topk_idx[rank], inputs.num_experts, buffer.group_size)
    is_far = np.arange(buffer.group_size) // per_node != buffer.topology.node
    assert direct.num_tokens_per_rank[is_far].sum() >= to_nodes.sum()
