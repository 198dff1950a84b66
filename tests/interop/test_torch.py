"""PyTorch tensors through a Buffer, and the operations that autograd records."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import epcomm
from epcomm import LocalGroup, run_local, testing
from epcomm.errors import InputError, LayoutError

torch = pytest.importorskip("torch")
interop = pytest.importorskip("epcomm.interop.torch")

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_EXPERTS = 6, 16, 3, 8


@pytest.fixture
def buffer():
    with epcomm.Buffer(LocalGroup(1).comms[0], low_latency_mode=True) as buffer:
        yield buffer


def inputs(dtype=torch.float32):
    x = torch.arange(NUM_TOKENS * HIDDEN).reshape(NUM_TOKENS, HIDDEN).to(dtype)
    topk_idx = torch.from_numpy(testing.uniform_routing(NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, seed=3))
    return x, topk_idx, torch.arange(NUM_TOKENS * NUM_TOPK, dtype=torch.float32).reshape(NUM_TOKENS, NUM_TOPK)


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


# -- tensors through a Buffer ---------------------------------------------------------------------------------------


def test_outputs_share_epcomms_memory(buffer):
    x, topk_idx, _ = inputs()
    result = dispatch(buffer, x, topk_idx)
    assert result.handle[3].data_ptr() == result.handle.recv_src_idx.ctypes.data
    before = buffer.stats["bytes_copied_to_windows"]
    rows = buffer.get_combine_buffer(result.handle, torch.float32)
    torch.mul(result.recv_x, 2, out=rows)
    combined = buffer.combine(rows, result.handle).combined_x
    assert buffer.stats["bytes_copied_to_windows"] == before
    assert torch.equal(combined, x * 2)


def test_input_that_requires_grad_is_taken_detached(buffer):
    x, topk_idx, topk_weights = inputs()
    x.requires_grad_()
    topk_weights.requires_grad_()
    result = dispatch(buffer, x, topk_idx, topk_weights)
    combined = buffer.combine(result.recv_x, result.handle, result.recv_topk_weights)
    outputs = [result.recv_x, result.recv_topk_weights, combined.combined_x, combined.combined_topk_weights]
    assert [(output.requires_grad, output.grad_fn) for output in outputs] == [(False, None)] * 4
    assert torch.equal(combined.combined_x, x.detach())


def test_fake_tensors_and_torch_func_wrappers_raise_and_leave_the_buffer_usable(buffer):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, topk_idx, _ = inputs()
    handle = dispatch(buffer, x, topk_idx).handle
    with FakeTensorMode():
        fake = torch.ones(NUM_TOKENS, HIDDEN)
    with pytest.raises(InputError, match=r"FakeTensor.*call epcomm outside torch.compile"):
        buffer.dispatch(fake, handle=handle)
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(InputError, match="wrapped by a torch"):
            transform(lambda t: buffer.dispatch(t, handle=handle).recv_x.sum())(torch.stack([x, x]))
    assert torch.equal(buffer.dispatch(x, handle=handle).recv_x, x)


def test_statistics_and_out_are_written_in_place(buffer):
    x, topk_idx, topk_weights = inputs(torch.bfloat16)
    counts = torch.ones(NUM_EXPERTS, dtype=torch.int32)
    waits, more_waits, out = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros_like(x)
    versions = [t._version for t in (counts, waits, more_waits, out)]
    recv_x, recv_count, handle, _, _ = buffer.low_latency_dispatch(
        x, topk_idx, NUM_TOKENS, NUM_EXPERTS, counts, waits, use_fp8=False
    )
    combined, _, _ = buffer.low_latency_combine(
        recv_x, topk_idx, torch.ones_like(topk_weights), handle, out=out, combine_wait_recv_cost_stats=more_waits
    )
    assert torch.equal(counts, 1 + torch.bincount(topk_idx.flatten(), minlength=NUM_EXPERTS).int())
    assert torch.equal(recv_count, counts - 1)
    assert combined is out
    assert torch.equal(out.float(), (x.float() * NUM_TOPK).bfloat16().float())
    assert all(t._version > v for t, v in zip((counts, waits, more_waits, out), versions, strict=True))


def test_out_that_autograd_records_raises(buffer):
    x, topk_idx, topk_weights = inputs(torch.bfloat16)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=False)
    out = torch.zeros_like(x).requires_grad_()
    with pytest.raises(InputError, match="out: got a tensor that requires grad, to be written in place"):
        buffer.low_latency_combine(recv_x, topk_idx, topk_weights, handle, out=out)


def test_results_follow_x_where_frameworks_are_mixed(buffer):
    x, topk_idx, topk_weights = inputs()
    result = dispatch(buffer, x, topk_idx.numpy(), topk_weights.numpy())
    assert all(type(t) is torch.Tensor for t in (result.recv_x, result.recv_topk_idx, result.recv_topk_weights))
    assert torch.equal(result.recv_topk_idx, topk_idx)
    combined = buffer.combine(result.recv_x.numpy(), result.handle)
    assert type(combined.combined_x) is np.ndarray
    assert np.array_equal(combined.combined_x, x.numpy())


# -- gradients ------------------------------------------------------------------------------------------------------


def two_rank_problem(tokens_per_rank):
    """Inputs of both ranks as one; some choices are -1, and token 0 has none at all."""
    num_tokens = sum(tokens_per_rank)
    x = torch.from_numpy(testing.token_data(num_tokens, HIDDEN, np.float32, seed=1)) / 4
    topk_idx = torch.from_numpy(testing.masked_routing(num_tokens, NUM_EXPERTS, NUM_TOPK, seed=2, masked_fraction=0.2))
    topk_idx[:1] = -1
    weights = torch.from_numpy(testing.token_data(num_tokens, NUM_TOPK, np.float32, seed=3))
    scales = torch.from_numpy(testing.token_data(NUM_EXPERTS, HIDDEN, np.float32, seed=4))
    return x, topk_idx, weights, scales


def experts(x, topk_idx, topk_weights, scales):
    """Expert e is ``tanh(scales[e] * x)``; their weighted sum for every row."""
    selected = (topk_idx >= 0)[..., None]
    outputs = torch.tanh(x[:, None, :] * scales[topk_idx.clamp(min=0)])
    return torch.where(selected, outputs * topk_weights[..., None], 0.0).sum(dim=1)


def dense_gradients(loss_of, problem):
    x, topk_idx, weights, scales = problem
    leaves = [t.clone().requires_grad_() for t in (x, weights, scales)]
    return torch.autograd.grad(loss_of(experts(leaves[0], topk_idx, *leaves[1:])), leaves, create_graph=True), leaves


def own_part(comm, tokens_per_rank, problem):
    """This rank's tokens and experts, as leaves."""
    x, topk_idx, weights, scales = problem
    first = sum(tokens_per_rank[: comm.rank])
    tokens = slice(first, first + tokens_per_rank[comm.rank])
    local = slice(comm.rank * NUM_EXPERTS // comm.size, (comm.rank + 1) * NUM_EXPERTS // comm.size)
    leaves = [t.clone().requires_grad_() for t in (x[tokens], weights[tokens], scales[local])]
    return leaves, topk_idx[tokens].contiguous(), (tokens, tokens, local)


def layer(buffer, x, topk_idx, weights, scales):
    recv = interop.dispatch(buffer, x, topk_idx, weights, NUM_EXPERTS)
    y = experts(recv.recv_x, recv.recv_topk_idx, recv.recv_topk_weights, scales)
    return interop.combine(buffer, y, recv.handle).combined_x


def squared(out):
    return (out**2).sum()


@pytest.mark.parametrize("tokens_per_rank", [(5, 7), (0, 9)], ids=["uneven", "no_tokens_on_rank_0"])
@pytest.mark.parametrize("ranks_per_node", [2, 1], ids=["one_node", "two_nodes"])
def test_gradients_of_a_layer_equal_the_dense_ones(tokens_per_rank, ranks_per_node):
    problem = two_rank_problem(tokens_per_rank)
    wanted, _ = dense_gradients(squared, problem)

    def rank_main(comm):
        buffer = epcomm.Buffer(comm, ranks_per_node=ranks_per_node)
        leaves, topk_idx, parts = own_part(comm, tokens_per_rank, problem)
        squared(layer(buffer, leaves[0], topk_idx, *leaves[1:])).backward()
        for leaf, want, part in zip(leaves, wanted, parts, strict=True):
            torch.testing.assert_close(leaf.grad, want[part].detach(), rtol=1e-5, atol=1e-5)
        return True

    assert run_local(2, rank_main) == [True, True]


def test_gradients_of_gradients():
    tokens_per_rank = (5, 7)
    problem = two_rank_problem(tokens_per_rank)
    first, dense_leaves = dense_gradients(squared, problem)
    wanted = torch.autograd.grad(sum(squared(g) for g in first[:2]), dense_leaves)

    def rank_main(comm):
        buffer = epcomm.Buffer(comm)
        leaves, topk_idx, parts = own_part(comm, tokens_per_rank, problem)
        out = squared(layer(buffer, leaves[0], topk_idx, *leaves[1:]))
        grads = torch.autograd.grad(out, leaves[:2], create_graph=True)
        second = torch.autograd.grad(sum(squared(g) for g in grads), leaves)
        for got, want, part in zip(second, wanted, parts, strict=True):
            torch.testing.assert_close(got, want[part], rtol=1e-4, atol=1e-4)
        return True

    assert run_local(2, rank_main) == [True, True]


def on_two_ranks(body):
    """``body(buffer, x, topk_idx, weights)`` on both ranks, with leaves; one token a rank has both ranks' experts."""

    @functools.wraps(body)
    def test():
        def rank_main(comm):
            x, _, weights = inputs()
            topk_idx = torch.tensor([[0, 4, -1], [1, 2, 3], [7, 6, 5], [-1, -1, -1], [3, -1, 4], [-1, 0, 1]])
            body(epcomm.Buffer(comm), x.requires_grad_(), topk_idx, weights.requires_grad_())
            return True

        assert run_local(2, rank_main) == [True, True]

    del test.__wrapped__  # pytest would ask for fixtures of these names
    return test


NUM_VISITED = torch.tensor([2.0, 1.0, 1.0, 0.0, 2.0, 1.0])[:, None]  # ranks of each token of `on_two_ranks`


@on_two_ranks
def test_gradient_of_dispatch_counts_the_ranks(buffer, x, topk_idx, weights):
    recv = interop.dispatch(buffer, x, topk_idx, weights, NUM_EXPERTS)
    assert recv.recv_x.requires_grad
    assert not recv.recv_topk_idx.requires_grad
    assert recv.num_recv_tokens_per_expert_list == [int((recv.recv_topk_idx == e).sum()) for e in range(4)]
    (recv.recv_x.sum() + 3 * recv.recv_topk_weights.sum()).backward()  # expanded gradients, without memory of their own
    assert torch.equal(x.grad, NUM_VISITED.expand(-1, HIDDEN))
    assert torch.equal(weights.grad, torch.where(topk_idx >= 0, 3.0, 0.0))


@on_two_ranks
def test_gradient_of_combine_reaches_rows_and_weights(buffer, x, topk_idx, weights):
    recv = interop.dispatch(buffer, x.detach(), topk_idx, weights.detach(), NUM_EXPERTS)
    assert not recv.recv_x.requires_grad
    rows, row_weights = recv.recv_x.requires_grad_(), recv.recv_topk_weights.requires_grad_()
    combined_x, combined_weights, _ = interop.combine(buffer, rows, recv.handle, row_weights)
    ((combined_x**2).sum() + (combined_weights * weights.detach()).sum()).backward()
    per_token = torch.cat([2 * x.detach() * NUM_VISITED, weights.detach()], dim=1)
    wanted = dispatch(buffer, torch.nn.functional.pad(per_token, (0, 1)), topk_idx).recv_x  # rows of 16 bytes
    assert torch.equal(rows.grad, wanted[:, :HIDDEN])
    assert torch.equal(row_weights.grad, wanted[:, HIDDEN:-1])


@on_two_ranks
def test_layer_without_weights_and_with_unused_outputs(buffer, x, topk_idx, weights):
    recv = interop.dispatch(buffer, x, topk_idx, None, NUM_EXPERTS)
    assert recv.recv_topk_weights is None
    combined_x, combined_weights, _ = interop.combine(buffer, recv.recv_x, recv.handle)
    assert combined_weights is None
    combined_x.sum().backward()
    assert torch.equal(x.grad, NUM_VISITED.expand(-1, HIDDEN))
    # A loss that only the weights enter: every rank's backward still makes the same calls.
    x.grad = None
    interop.dispatch(buffer, x, topk_idx, weights, NUM_EXPERTS).recv_topk_weights.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@on_two_ranks
def test_gradient_of_padding_is_zero(buffer, x, topk_idx, weights):
    recv = dispatch(buffer, x, topk_idx, weights, num_worst_tokens=40)
    rows = recv.recv_x.requires_grad_()
    interop.combine(buffer, rows, recv.handle).combined_x.sum().backward()
    num_rows = recv.handle.num_recv_tokens
    assert 0 < num_rows < 40
    assert torch.equal(rows.grad, (torch.arange(40) < num_rows).float()[:, None].expand(-1, HIDDEN))


@on_two_ranks
def test_no_graph_without_grad(buffer, x, topk_idx, weights):
    with torch.no_grad():
        recv = interop.dispatch(buffer, x, topk_idx, weights, NUM_EXPERTS)
        combined = interop.combine(buffer, recv.recv_x, recv.handle, recv.recv_topk_weights)
    assert not any(t.requires_grad for t in (recv.recv_x, recv.recv_topk_weights, *combined[:2]))
    assert torch.equal(combined.combined_x, x * NUM_VISITED)


def test_errors_of_the_buffer_come_through(buffer):
    x, topk_idx, topk_weights = inputs()
    with pytest.raises(LayoutError, match="x: got strides"):
        interop.dispatch(buffer, x.t().contiguous().t(), topk_idx, topk_weights, NUM_EXPERTS)
