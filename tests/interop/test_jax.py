"""JAX arrays through a Buffer, and the operations that JAX differentiates."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import epcomm
from epcomm import LocalGroup, run_local, testing
from epcomm.errors import ImmutableArray, InputError
from epcomm.testing import assert_bitwise

jax = pytest.importorskip("jax")
jnp = jax.numpy
interop = pytest.importorskip("epcomm.interop.jax")

NUM_RANKS, NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_EXPERTS = 2, 6, 128, 3, 8


@pytest.fixture(autouse=True)
def on_cpu():
    """Host arrays, also on a machine whose JAX prefers a GPU. In threads of ranks: `on_ranks`."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def on_ranks(body):
    """The results of ``body(comm)`` on two ranks."""

    def rank_main(comm):
        with jax.default_device(jax.devices("cpu")[0]):
            return body(comm)

    return run_local(NUM_RANKS, rank_main, timeout_s=240)


@pytest.fixture
def buffer():
    with epcomm.Buffer(LocalGroup(1).comms[0], low_latency_mode=True) as buffer:
        yield buffer


def inputs(rank=0, dtype=np.float32, xp=jnp):
    first = rank * NUM_TOKENS
    x = testing.token_data(NUM_TOKENS, HIDDEN, dtype, seed=1, first_token=first)
    topk_idx = testing.masked_routing(
        NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, seed=2, masked_fraction=0.2, first_token=first
    ).astype(np.int32)
    weights = testing.token_data(NUM_TOKENS, NUM_TOPK, np.float32, seed=3, first_token=first)
    return xp.asarray(x), xp.asarray(topk_idx), xp.asarray(weights)


def dispatch(buffer, x, topk_idx, topk_weights=None, **options):
    layout = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    return buffer.dispatch(
        x,
        None,
        layout.num_tokens_per_rank,
        layout.num_tokens_per_rdma_rank,
        layout.is_token_in_rank,
        layout.num_tokens_per_expert,
        topk_idx,
        topk_weights,
        **options,
    )


# -- arrays through a Buffer ----------------------------------------------------------------------------------------


def everything(comm, xp, framework_type):
    """All arrays that the operations return for inputs of a framework, as NumPy arrays."""
    buffer = epcomm.Buffer(comm, low_latency_mode=True)
    results = []
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x, topk_idx, weights = inputs(comm.rank, dtype, xp)
        layout = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
        results += [a for a in layout[:4] if a is not None]
        recv = dispatch(buffer, x, topk_idx, weights)
        results += recv[:3]
        results += buffer.combine(recv.recv_x, recv.handle, recv.recv_topk_weights, bias=x)[:2]
        results += [entry for entry in recv.handle if entry is not None]
        results.append(buffer.dispatch(x, handle=recv.handle).recv_x)
    x_fp8, scales = testing.per_token_cast_to_fp8(x)
    results += dispatch(buffer, (x_fp8, scales), topk_idx).recv_x
    for use_fp8 in (False, True):
        recv_x, recv_count, handle, _, _ = buffer.low_latency_dispatch(
            x, topk_idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=use_fp8
        )
        results.append(recv_count)
        for rows in recv_x if use_fp8 else (recv_x,):
            results += [rows[e, :count] for e, count in enumerate(recv_count.tolist())]
    expert_out = xp.asarray(np.ones((*handle.src_info.shape, HIDDEN), ml_dtypes.bfloat16))
    results.append(buffer.low_latency_combine(expert_out, topk_idx, weights, handle).combined_x)
    assert {type(a) for a in results} == {framework_type}
    return [np.asarray(a) for a in results]


def test_every_operation_gives_the_bits_of_a_numpy_run():
    array_type = type(jnp.zeros(1))
    of_jax = on_ranks(lambda comm: everything(comm, jnp, array_type))
    of_numpy = on_ranks(lambda comm: everything(comm, np, np.ndarray))
    for got, want in zip(of_jax, of_numpy, strict=True):
        assert len(got) == len(want)
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_bitwise(a, b, f"result {index}")


def test_int64_indices_come_back_as_int32(buffer):
    x, topk_idx, weights = inputs(xp=np)
    result = dispatch(buffer, jnp.asarray(x), topk_idx.astype(np.int64), weights)
    assert not jax.config.jax_enable_x64
    assert result.recv_topk_idx.dtype == jnp.int32
    assert np.array_equal(result.recv_topk_idx, topk_idx[(topk_idx >= 0).any(axis=1)])


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_tracers_raise_and_leave_the_buffer_usable(buffer, transform):
    x, topk_idx, _ = inputs()
    handle = dispatch(buffer, x, topk_idx).handle
    with pytest.raises(InputError, match=r"x: got a JAX tracer .*; call epcomm outside jax\.jit"):
        transform(lambda a: buffer.dispatch(a, handle=handle).recv_x)(x)
    buffer.dispatch(x, handle=handle)


def test_whatever_would_write_raises_immutable_array(buffer):
    x, topk_idx, weights = inputs(dtype=ml_dtypes.bfloat16)
    zeros = {name: jnp.zeros(n, jnp.int32) for name, n in (("experts", NUM_EXPERTS), ("ranks", 1))}
    recv = dispatch(buffer, x, topk_idx)
    low = buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=False)

    def low_dispatch(**options):
        return buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_EXPERTS, **options)

    def low_combine(**options):
        return buffer.low_latency_combine(low.recv_x, topk_idx, weights, low.handle, **options)

    for call in (
        lambda: low_combine(out=jnp.zeros_like(x)),
        lambda: low_combine(zero_copy=True),
        lambda: low_combine(combine_wait_recv_cost_stats=zeros["ranks"]),
        lambda: low_dispatch(cumulative_local_expert_recv_stats=zeros["experts"]),
        lambda: low_dispatch(dispatch_wait_recv_cost_stats=zeros["ranks"]),
        lambda: low_dispatch(return_recv_hook=True),
        lambda: buffer.get_combine_buffer(recv.handle, jnp.float32),
        lambda: buffer.get_next_low_latency_combine_buffer(low.handle),
        lambda: buffer.low_latency_query_mask_buffer(zeros["ranks"]),
    ):
        with pytest.raises(ImmutableArray, match=r"got .*JAX.*; (wanted .*; )?\w+"):
            call()
    low_combine()


# -- handles as pytrees ---------------------------------------------------------------------------------------------


HANDLE_TRIPS = {
    "map_identity": lambda handle: jax.tree.map(lambda leaf: leaf, handle),
    "map_asarray": lambda handle: jax.tree.map(jnp.asarray, handle),
    "flatten_unflatten": lambda handle: jax.tree.unflatten(*reversed(jax.tree.flatten(handle))),
    "jit_identity": lambda handle: jax.jit(lambda h: h)(handle),
    "device_put": jax.device_put,
}


@pytest.mark.parametrize("trip", HANDLE_TRIPS.values(), ids=HANDLE_TRIPS)
@pytest.mark.parametrize("ranks_per_node", [2, 1], ids=["one_node", "two_nodes"])
def test_handle_works_after_a_trip_through_jax(trip, ranks_per_node):
    def rank_main(comm):
        buffer = epcomm.Buffer(comm, low_latency_mode=True, ranks_per_node=ranks_per_node)
        x, topk_idx, weights = inputs(comm.rank, ml_dtypes.bfloat16)
        recv = dispatch(buffer, x, topk_idx, weights)
        want = buffer.combine(recv.recv_x, recv.handle, recv.recv_topk_weights)
        handle = trip(recv.handle)
        assert type(handle) is epcomm.DispatchHandle
        assert len(jax.tree.leaves(handle)) == (3 if ranks_per_node == 2 else 5)
        assert_bitwise(buffer.dispatch(x, handle=handle).recv_x, recv.recv_x)
        got = buffer.combine(recv.recv_x, handle, recv.recv_topk_weights)
        assert_bitwise(got.combined_x, want.combined_x)
        assert_bitwise(got.combined_topk_weights, want.combined_topk_weights)
        for entry, original in zip(handle, recv.handle, strict=True):
            assert (entry is None) == (original is None)
            assert entry is None or np.array_equal(entry, original)

        low = buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=False)
        want = buffer.low_latency_combine(low.recv_x, topk_idx, weights, low.handle).combined_x
        got = buffer.low_latency_combine(low.recv_x, topk_idx, weights, trip(low.handle)).combined_x
        assert_bitwise(got, want)
        return True

    assert on_ranks(rank_main) == [True, True]


# -- gradients ------------------------------------------------------------------------------------------------------


def experts(x, topk_idx, topk_weights, scales):
    """Expert e is ``tanh(scales[e] * x)``; their weighted sum for every row."""
    outputs = jnp.tanh(x[:, None, :] * scales[jnp.maximum(topk_idx, 0)])
    return jnp.where((topk_idx >= 0)[..., None], outputs * topk_weights[..., None], 0).sum(axis=1)


def problem():
    """All ranks' inputs, the experts' scales, and the dense layer's loss."""
    x, topk_idx, weights = (jnp.concatenate(parts) for parts in zip(*map(inputs, range(NUM_RANKS)), strict=True))
    scales = jnp.asarray(testing.token_data(NUM_EXPERTS, HIDDEN, np.float32, seed=4))
    return x, topk_idx, weights, scales, lambda x, w, s: (experts(x, topk_idx, w, s) ** 2).sum()


def rank_loss(buffer, topk_idx):
    def loss(x, weights, scales):
        recv = interop.dispatch(buffer, x, topk_idx, weights, NUM_EXPERTS)
        y = jax.jit(experts)(recv.recv_x, recv.recv_topk_idx, recv.recv_topk_weights, scales)
        return (interop.combine(buffer, y, recv.handle).combined_x ** 2).sum()

    return loss


def own_slices(rank):
    tokens = slice(rank * NUM_TOKENS, (rank + 1) * NUM_TOKENS)
    num_local = NUM_EXPERTS // NUM_RANKS
    return tokens, tokens, slice(rank * num_local, (rank + 1) * num_local)


@pytest.mark.parametrize("ranks_per_node", [2, 1], ids=["one_node", "two_nodes"])
def test_gradients_of_a_layer_equal_the_dense_ones(ranks_per_node):
    x, topk_idx, weights, scales, dense_loss = problem()
    wanted = jax.jit(jax.grad(dense_loss, (0, 1, 2)))(x, weights, scales)

    def rank_main(comm):
        buffer = epcomm.Buffer(comm, ranks_per_node=ranks_per_node)
        parts = own_slices(comm.rank)
        own = [a[part] for a, part in zip((x, weights, scales), parts, strict=True)]
        value, grads = jax.value_and_grad(rank_loss(buffer, topk_idx[parts[0]]), (0, 1, 2))(*own)
        for got, want, part in zip(grads, wanted, parts, strict=True):
            np.testing.assert_allclose(got, want[part], rtol=1e-4, atol=1e-4)
        return float(value)

    np.testing.assert_allclose(sum(on_ranks(rank_main)), dense_loss(x, weights, scales), rtol=1e-5)


def test_gradients_of_gradients():
    x, topk_idx, weights, scales, dense_loss = problem()

    def of_squared_gradients(loss):
        return jax.grad(lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*args)), (0, 1, 2))

    wanted = jax.jit(of_squared_gradients(dense_loss))(x, weights, scales)

    def rank_main(comm):
        parts = own_slices(comm.rank)
        own = [a[part] for a, part in zip((x, weights, scales), parts, strict=True)]
        grads = of_squared_gradients(rank_loss(epcomm.Buffer(comm), topk_idx[parts[0]]))(*own)
        for got, want, part in zip(grads, wanted, parts, strict=True):
            np.testing.assert_allclose(got, want[part], rtol=1e-3, atol=1e-3 * float(abs(want).max()))
        return True

    assert on_ranks(rank_main) == [True, True]


def test_gradient_of_combine_reaches_weights_and_not_the_padding():
    def rank_main(comm):
        buffer = epcomm.Buffer(comm)
        x, topk_idx, weights = inputs(comm.rank)
        recv = dispatch(buffer, x, topk_idx, weights, num_worst_tokens=40)
        num_rows = recv.handle.num_recv_tokens

        def loss(rows, row_weights):
            combined_x, combined_weights, _ = interop.combine(buffer, rows, recv.handle, row_weights)
            return combined_x.sum() + (combined_weights * weights).sum()

        grad_x, grad_weights = jax.grad(loss, (0, 1))(recv.recv_x, recv.recv_topk_weights)
        assert np.array_equal(grad_x, np.broadcast_to(np.arange(40)[:, None] < num_rows, grad_x.shape))
        sent = jnp.pad(weights, ((0, 0), (0, 1)))  # rows of 16 bytes
        assert np.array_equal(grad_weights[:num_rows], dispatch(buffer, sent, topk_idx).recv_x[:, :NUM_TOPK])
        assert not grad_weights[num_rows:].any()
        return num_rows

    assert all(0 < num_rows < 40 for num_rows in on_ranks(rank_main))


def test_gradient_of_dispatch_counts_the_ranks_and_takes_no_weights():
    def rank_main(comm):
        buffer = epcomm.Buffer(comm)
        x, topk_idx, weights = inputs(comm.rank)

        def received(x, weights):
            recv = interop.dispatch(buffer, x, topk_idx, weights, NUM_EXPERTS)
            local = [int((recv.recv_topk_idx == e).sum()) for e in range(NUM_EXPERTS // NUM_RANKS)]
            assert recv.num_recv_tokens_per_expert_list == local
            return recv.recv_x.sum() + (0 if weights is None else 3 * recv.recv_topk_weights.sum())

        in_rank = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS).is_token_in_rank
        num_visited = np.broadcast_to(in_rank.sum(axis=1, keepdims=True), x.shape)
        grad_x, grad_weights = jax.grad(received, (0, 1))(x, weights)
        assert np.array_equal(grad_x, num_visited)
        assert np.array_equal(grad_weights, 3 * (topk_idx >= 0))
        assert np.array_equal(jax.grad(received)(x, None), num_visited)
        return sorted(set(in_rank.sum(axis=1).tolist()))

    assert set().union(*on_ranks(rank_main)) >= {1, 2}


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.checkpoint], ids=["jit", "vmap", "checkpoint"])
def test_tracing_transforms_raise(buffer, transform):
    x, topk_idx, weights = inputs()
    handle = dispatch(buffer, x, topk_idx).handle
    message = r": got a JAX tracer .*; call it outside jax\.jit, .*; jax\.grad and jax\.vjp are fine"
    with pytest.raises(InputError, match="dispatch" + message):
        jax.grad(transform(lambda a: interop.dispatch(buffer, a, topk_idx, weights, NUM_EXPERTS).recv_x.sum()))(x)
    with pytest.raises(InputError, match="combine" + message):
        transform(lambda a: interop.combine(buffer, a, handle).combined_x)(x)
