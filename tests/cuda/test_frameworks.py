"""The cases with arrays of PyTorch and of JAX, and what is theirs alone."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import checks, moe
from helpers.calls import TIMEOUT_S, raises
from helpers.cases import CASES, PLACING_CASES
from helpers.frames import CUPY, JAX, TORCH, down
from helpers.gpu import has_gpu, need_gpu

from epcomm import Buffer, reference
from epcomm.errors import ImmutableArray
from epcomm.testing import assert_bitwise

need_gpu()
pytestmark = pytest.mark.gpu

# int64 needs JAX_ENABLE_X64; and JAX would take three quarters of the GPU for each rank.
ENVIRONMENT = {"JAX_ENABLE_X64": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
UNIFORM = next(case for case in CASES if case.name == "uniform")

two_ranks = pytest.mark.ranks(2, env=ENVIRONMENT, timeout=180)
both = pytest.mark.parametrize("frames", [TORCH, JAX], ids=lambda frames: frames.name)
placing_cases = pytest.mark.parametrize("case", PLACING_CASES, ids=lambda case: case.name)


def need(frames) -> None:
    if not has_gpu(frames.name):
        pytest.skip(f"{frames.name} has no GPU")


@pytest.fixture(scope="module", params=[64 << 20, 0], ids=["arena", "window"])
def buffer(request):
    with Buffer(num_nvl_bytes=request.param, backend="cuda", timeout_s=TIMEOUT_S) as shared:
        yield shared


@two_ranks
@both
@placing_cases
def test_case(buffer, frames, case):
    need(frames)
    checks.round_trip(buffer, case.inputs(2), frames)


@pytest.mark.slow
@two_ranks
@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_case(buffer, frames, case):
    need(frames)
    checks.round_trip(buffer, case.inputs(2), frames)


@two_ranks
@both
def test_results_are_of_the_framework_of_the_input(buffer, frames):
    """Frameworks may take turns, and every one gets its own arrays back."""
    need(frames)
    inputs = UNIFORM.inputs(2)
    for one in (frames, CUPY, frames):
        kind = type(one.up(inputs.x[0]))
        layout, result = checks.dispatch(buffer, inputs, one)
        combined = checks.combine(buffer, inputs, result, frames=one)
        arrays = [*layout[2:4], result.recv_x, result.recv_topk_idx, result.recv_topk_weights, combined.combined_x]
        assert {type(array) for array in [layout[0], *arrays]} == {kind}
        assert type(result.handle[0]) is kind
        checks.assert_dispatched(buffer, inputs, result)


@two_ranks
def test_torch_in_its_own_stream(buffer):
    """Inputs are written, and outputs read, in a side stream, without a word to the Buffer."""
    need(TORCH)
    import torch

    side = torch.cuda.Stream()
    for seed in range(5):
        inputs = UNIFORM.inputs(2, seed)
        with torch.cuda.stream(side):
            moe_like = TORCH.up(inputs.x[buffer.rank])
            x = torch.empty_like(moe_like)
            torch.cuda._sleep(2_000_000)
            x.copy_(moe_like)
            topk_idx = TORCH.up(inputs.topk_idx[buffer.rank])
            layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts)
            result = buffer.dispatch(x, **layout.arguments(), topk_idx=topk_idx)
            assert_bitwise(down(result.recv_x), inputs.dispatched[buffer.rank].recv_x)


@two_ranks
def test_torch_gradients_do_not_travel(buffer):
    need(TORCH)
    inputs = UNIFORM.inputs(2)
    mine = TORCH.up(inputs.x[buffer.rank]).requires_grad_()
    topk_idx = TORCH.up(inputs.topk_idx[buffer.rank])
    layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts)
    result = buffer.dispatch(mine, **layout.arguments(), topk_idx=topk_idx)
    assert not result.recv_x.requires_grad
    assert_bitwise(down(result.recv_x), inputs.dispatched[buffer.rank].recv_x)


@two_ranks
def test_jax_computes_with_results(buffer):
    """XLA's own stream waits for the rows, and the Buffer for what XLA makes of them."""
    need(JAX)
    import jax.numpy as jnp

    for seed in range(5):
        inputs = UNIFORM.inputs(2, seed)
        _, result = checks.dispatch(buffer, inputs, JAX)
        doubled = result.recv_x.astype(jnp.float32) * 2
        want = inputs.dispatched[buffer.rank].recv_x.astype(np.float32) * 2
        assert_bitwise(down(doubled), want)
        made = (doubled / 2).astype(jnp.bfloat16)
        combined = buffer.combine(made, result.handle)
        outputs = [received.recv_x for received in inputs.dispatched]
        sums = reference.combine(outputs, inputs.topk_idx, inputs.num_experts)
        assert_bitwise(down(combined.combined_x), sums[buffer.rank][0])


@two_ranks
def test_jax_arrays_never_change(buffer):
    need(JAX)
    _, result = checks.dispatch(buffer, UNIFORM.inputs(2), JAX)
    with raises(ImmutableArray, "^get_combine_buffer: got a JAX handle"):
        buffer.get_combine_buffer(result.handle, "bfloat16")
    buffer.combine(result.recv_x, result.handle)
    moe.assert_works(buffer, frames=JAX)


@two_ranks
def test_a_jax_handle_comes_back_from_a_pytree(buffer):
    need(JAX)
    import jax

    inputs = UNIFORM.inputs(2)
    _, result = checks.dispatch(buffer, inputs, JAX)
    leaves, tree = jax.tree_util.tree_flatten(result.handle)
    handle = jax.tree_util.tree_unflatten(tree, [leaf + 0 if leaf.dtype != bool else leaf for leaf in leaves])
    cached = buffer.dispatch(JAX.up(inputs.x[buffer.rank]), handle=handle)
    checks.assert_dispatched(buffer, inputs, cached._replace(handle=result.handle), is_cached=True)
    combined = buffer.combine(JAX.up(inputs.outputs[buffer.rank]), handle)
    checks.assert_combined(buffer, inputs, combined)
