"""Handles and results: DeepEP V1's positions, names, and that they do not change under anybody's hands."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import moe

from epcomm import Buffer, DispatchHandle, LowLatencyHandle, handle, run_local
from epcomm.testing import assert_bitwise


def handles(size, ranks_per_node=None):
    """What a small job leaves: by rank, inputs, dispatch result and low-latency result."""

    def program(comm):
        with Buffer(comm, low_latency_mode=True, ranks_per_node=ranks_per_node) as buffer:
            mine = moe.inputs(comm.rank, size)
            low = buffer.low_latency_dispatch(
                mine.x, mine.topk_idx, moe.MAX_TOKENS, moe.num_experts(size), use_fp8=False
            )
            return moe.send(buffer, mine), low

    return run_local(size, program)


@pytest.fixture(scope="module")
def one_node():
    return handles(3)


@pytest.fixture(scope="module")
def two_nodes():
    return handles(4, ranks_per_node=2)


def test_six_positions_on_one_node(one_node):
    for rank, (result, _) in enumerate(one_node):
        wanted = moe.oracle(3, 3, 0).dispatched[rank]
        prefix, absent, also_absent, src_idx, in_rank, head = result.handle
        assert len(result.handle) == 6
        assert_bitwise(prefix, wanted.rank_prefix_matrix)
        assert_bitwise(src_idx, wanted.recv_src_idx)
        assert (in_rank.dtype, in_rank.shape) == (np.bool_, (rank + 3, 3))
        assert absent is also_absent is head is None
        assert_bitwise(result.handle[0][:, rank], result.handle.recv_rank_prefix_sum)
        assert result.handle.num_recv_tokens == len(result.recv_x) == prefix[-1, rank]


def test_ten_positions_on_several_nodes(two_nodes):
    for rank, (result, _) in enumerate(two_nodes):
        wanted = moe.oracle(4, 2, 0).dispatched[rank]
        values = list(result.handle)
        assert len(result.handle) == len(values) == 10
        in_rank, node_prefix, rank_prefix = values[0], values[4], values[-4]
        assert (in_rank.dtype, in_rank.shape) == (np.bool_, (rank + 3, 4))
        assert [place for place, value in enumerate(values) if value is not None] == [0, 4, 6]
        # Rows received from ranks 0..i.
        assert_bitwise(rank_prefix, np.ascontiguousarray(wanted.rank_prefix_matrix[:, rank]))
        # Rows that this rank forwarded for nodes 0..i: those of the ranks with its own local index.
        rail = range(rank % 2, 4, 2)
        node = slice(rank - rank % 2, rank - rank % 2 + 2)
        into_node = [int(two_nodes[source][0].handle[0][:, node].any(axis=1).sum()) for source in rail]
        assert node_prefix.tolist() == np.cumsum(into_node).tolist()


def test_five_positions_of_low_latency(one_node):
    for rank, (_, result) in enumerate(one_node):
        wanted = moe.oracle(3, 3, 0).low_latency[rank]
        src_info, layout_range, max_tokens, hidden, num_experts = result.handle
        assert len(result.handle) == 5
        assert_bitwise(src_info, wanted.src_info)
        assert_bitwise(layout_range, wanted.layout_range)
        assert (max_tokens, hidden, num_experts) == (moe.MAX_TOKENS, moe.HIDDEN, moe.num_experts(3))


@pytest.mark.parametrize("mode", ["high_throughput", "low_latency"])
def test_indices_are_those_of_a_tuple(one_node, mode):
    got = one_node[0][mode == "low_latency"].handle
    size = len(got)
    for place in range(-size, size):
        one, other = got[place], tuple(got)[place]
        assert one is other is None or np.array_equal(one, other)
    for place in (size, -size - 1):
        with pytest.raises(IndexError):
            got[place]
    with pytest.raises(ValueError, match="unpack"):
        (_,) = got


@pytest.mark.parametrize("mode", ["high_throughput", "low_latency"])
def test_fields_are_frozen(one_node, mode):
    got = one_node[0][mode == "low_latency"].handle
    for field in dataclasses.fields(got):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(got, field.name, 1)
    with pytest.raises(TypeError):
        got[0] = 1
    assert got != dataclasses.replace(got)  # a handle is itself only: comparing arrays has no truth
    assert hash(got) == hash(got)


@pytest.mark.parametrize("mode", ["high_throughput", "low_latency"])
def test_a_handle_comes_back_from_a_pytree(one_node, mode):
    got = one_node[0][mode == "low_latency"].handle
    leaves, static = got.tree_flatten()
    assert {leaf.dtype for leaf in leaves if leaf is not None} <= {np.dtype(np.int32), np.dtype(np.bool_)}
    assert hash(static) == hash(got.tree_flatten()[1])  # JAX compares it to tell programs apart
    back = type(got).tree_unflatten(static, leaves)
    assert all(getattr(back, field.name) is getattr(got, field.name) for field in dataclasses.fields(got))
    assert got.with_own_leaves(None) is got
    lists = type(got).tree_unflatten(static, [None if leaf is None else leaf.tolist() for leaf in leaves])
    for field, leaf in zip(got._LEAVES, leaves, strict=True):
        assert leaf is None or np.array_equal(getattr(lists.with_own_leaves(None), field), leaf)


def test_a_handle_does_not_look_at_the_users_memory():
    """The mask may be overwritten before the handle is used again."""
    with Buffer() as buffer:
        mine = moe.inputs(0, 1)
        layout = moe.layout_arguments(buffer.get_dispatch_layout(mine.topk_idx, moe.num_experts(1)))
        result = buffer.dispatch(mine.x, **layout)
        combined = buffer.combine(result.recv_x, result.handle).combined_x
        layout["is_token_in_rank"][...] = False
        assert_bitwise(buffer.dispatch(mine.x, handle=result.handle).recv_x, result.recv_x)
        assert_bitwise(buffer.combine(result.recv_x, result.handle).combined_x, combined)


def test_results_unpack_like_tuples(one_node):
    result, low = one_node[1]
    recv_x, recv_topk_idx, recv_topk_weights, counts, got, event = result
    assert (recv_x is result.recv_x, recv_topk_idx is result.recv_topk_idx) == (True, True)
    assert recv_topk_weights is result.recv_topk_weights
    assert (counts, got, event) == (result.num_recv_tokens_per_expert_list, result.handle, result.event)
    recv_x, recv_count, got, event, hook = low
    assert (recv_count is low.recv_count, got is low.handle, event is low.event, hook is low.hook) == (True,) * 4
    assert isinstance(result.handle, DispatchHandle)
    assert isinstance(low.handle, LowLatencyHandle)
    names = {
        handle.LayoutResult: (
            "num_tokens_per_rank",
            "num_tokens_per_rdma_rank",
            "num_tokens_per_expert",
            "is_token_in_rank",
            "event",
        ),
        handle.CombineResult: ("combined_x", "combined_topk_weights", "event"),
        handle.LowLatencyCombineResult: ("combined_x", "event", "hook"),
    }
    assert {result: result._fields for result in names} == names
