"""Run a case on a Buffer and compare everything that comes back, bit for bit, with the oracle.

All functions but the `assert_…` ones are collective: every rank calls them with the same case. `frames` is the
framework of the arrays that go in, by default NumPy on the host backend and CuPy on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.cases import Inputs, LowLatencyInputs
from helpers.frames import Frames, assign, down, frames_of, up_all

from epcomm import Buffer, DispatchResult, LayoutResult, LowLatencyDispatchResult, reference
from epcomm.errors import CapacityError
from epcomm.testing import assert_bitwise

__all__ = [
    "assert_combined",
    "assert_dispatched",
    "assert_layout",
    "assert_low_latency_combined",
    "assert_low_latency_dispatched",
    "assert_low_latency_received",
    "assert_low_latency_sums",
    "check_overflow",
    "combine",
    "dispatch",
    "low_latency_combine",
    "low_latency_dispatch",
    "low_latency_round_trip",
    "payload",
    "round_trip",
]


def payload(inputs: Inputs, rank: int) -> Any:
    """The first argument of dispatch, in NumPy."""
    return inputs.x[rank] if inputs.scales is None else (inputs.x[rank], inputs.scales[rank])


def dispatch(
    buffer: Buffer, inputs: Inputs, frames: Frames | None = None, **options: Any
) -> tuple[LayoutResult, DispatchResult]:
    """Layout and dispatch of a case, unchecked."""
    rank, case, frames = buffer.rank, inputs.case, frames or frames_of(buffer)
    topk_idx = frames.up(inputs.topk_idx[rank])
    layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts)
    result = buffer.dispatch(
        up_all(frames, payload(inputs, rank)),
        **layout.arguments(),
        topk_idx=topk_idx,
        topk_weights=None if inputs.topk_weights is None else frames.up(inputs.topk_weights[rank]),
        expert_alignment=case.expert_alignment,
        num_worst_tokens=inputs.num_worst_tokens,
        **options,
    )
    return layout, result


def combine(
    buffer: Buffer,
    inputs: Inputs,
    result: DispatchResult,
    num_biases: int = 0,
    with_weights: bool = False,
    x: Any = None,
    frames: Frames | None = None,
    **options: Any,
) -> Any:
    """Combine of a case's outputs (or of `x`, an array of `frames` that holds them), unchecked."""
    rank, frames = buffer.rank, frames or frames_of(buffer)
    bias: Any = up_all(frames, inputs.biases[rank][:num_biases])
    return buffer.combine(
        frames.up(inputs.outputs[rank]) if x is None else x,
        result.handle,
        topk_weights=frames.up(inputs.output_weights[rank]) if with_weights else None,
        bias=bias[0] if num_biases == 1 else bias or None,
        **options,
    )


def assert_layout(buffer: Buffer, inputs: Inputs, got: LayoutResult) -> None:
    topk_idx, per_node = inputs.topk_idx[buffer.rank], buffer.topology.ranks_per_node
    got = LayoutResult(*down(got[:4]), got.event)
    want = reference.get_dispatch_layout(topk_idx, inputs.num_experts, buffer.group_size, per_node)
    assert_bitwise(got.num_tokens_per_rank, want.num_tokens_per_rank, "num_tokens_per_rank")
    assert_bitwise(got.num_tokens_per_expert, want.num_tokens_per_expert, "num_tokens_per_expert")
    assert_bitwise(got.is_token_in_rank, want.is_token_in_rank, "is_token_in_rank")
    assert (got.num_tokens_per_rdma_rank is None) == (want.num_tokens_per_rdma_rank is None)
    if want.num_tokens_per_rdma_rank is not None:
        assert_bitwise(got.num_tokens_per_rdma_rank, want.num_tokens_per_rdma_rank, "num_tokens_per_rdma_rank")


def _assert_rows(got: Any, want: reference.Dispatched) -> None:
    got_x, got_scales = down(got) if isinstance(got, tuple) else (down(got), None)
    real = slice(want.num_recv_tokens)  # rows past these are padding, of undefined content
    assert got_x.shape == want.recv_x.shape
    assert_bitwise(got_x[real], want.recv_x[real], "recv_x")
    assert (got_scales is None) == (want.recv_scales is None)
    if want.recv_scales is not None:
        assert got_scales.shape == want.recv_scales.shape
        assert_bitwise(got_scales[real], want.recv_scales[real], "scales")


def assert_dispatched(buffer: Buffer, inputs: Inputs, got: DispatchResult, is_cached: bool = False) -> None:
    """Everything that dispatch returns, its handle included."""
    rank, want = buffer.rank, inputs.dispatched[buffer.rank]
    real = slice(want.num_recv_tokens)
    _assert_rows(got.recv_x, want)
    if is_cached:
        assert got.recv_topk_idx is None
        assert got.recv_topk_weights is None
        assert got.num_recv_tokens_per_expert_list == []
    else:
        assert_bitwise(down(got.recv_topk_idx), want.recv_topk_idx, "recv_topk_idx")
        assert got.num_recv_tokens_per_expert_list == want.num_recv_tokens_per_expert_list
        assert (got.recv_topk_weights is None) == (want.recv_topk_weights is None)
        if want.recv_topk_weights is not None:
            assert got.recv_topk_weights.shape == want.recv_topk_weights.shape
            assert_bitwise(down(got.recv_topk_weights)[real], want.recv_topk_weights[real], "recv_topk_weights")
    handle, per_node = got.handle, buffer.topology.ranks_per_node
    assert handle.num_recv_tokens == want.num_recv_tokens
    if buffer.backend == "host":
        assert_bitwise(handle.recv_src_idx, want.recv_src_idx[real], "recv_src_idx")
    if buffer.topology.num_nodes == 1:
        assert_bitwise(down(handle[0]), want.rank_prefix_matrix, "handle[0]")
        src_idx = down(handle[3])
        # A GPU's host does not know how many rows of the worst case are real.
        assert len(src_idx) == (want.num_recv_tokens if buffer.backend == "host" else len(want.recv_x))
        assert_bitwise(src_idx[real], want.recv_src_idx[real], "handle[3]")
        assert_bitwise(down(handle[4]), reference_mask(buffer, inputs), "handle[4]")
    else:
        assert_bitwise(down(handle[-4]), np.ascontiguousarray(want.rank_prefix_matrix[:, rank]), "handle[-4]")
        assert_bitwise(down(handle[4]), np.cumsum(rows_over_rail(inputs, rank, per_node), dtype=np.int32), "handle[4]")


def reference_mask(buffer: Buffer, inputs: Inputs) -> np.ndarray[Any, Any]:
    """bool ``[T, R]``: where each token of this rank goes."""
    topk_idx, size = inputs.topk_idx[buffer.rank], buffer.group_size
    return reference.get_dispatch_layout(topk_idx, inputs.num_experts, size, size).is_token_in_rank


def rows_over_rail(inputs: Inputs, rank: int, ranks_per_node: int) -> np.ndarray[Any, Any]:
    """int ``[num_nodes]``: rows that `rank` has to forward from each node, every token once; dropped rows excluded."""
    num_ranks, node = len(inputs.x), rank // ranks_per_node
    arrived: list[set[int]] = [set() for _ in range(num_ranks)]
    for received in inputs.dispatched[node * ranks_per_node : (node + 1) * ranks_per_node]:
        real = slice(received.num_recv_tokens)
        for source, token in zip(received.recv_src_rank[real], received.recv_src_idx[real], strict=True):
            arrived[source].add(int(token))
    return np.array([len(tokens) for tokens in arrived[rank % ranks_per_node :: ranks_per_node]])


def assert_combined(buffer: Buffer, inputs: Inputs, got: Any, num_biases: int = 0, with_weights: bool = False) -> None:
    want_x, want_weights = inputs.combined(buffer.topology.ranks_per_node, num_biases, with_weights)[buffer.rank]
    assert_bitwise(down(got.combined_x), want_x, f"combined_x with {num_biases} biases")
    assert (got.combined_topk_weights is None) == (want_weights is None)
    if want_weights is not None:
        assert_bitwise(down(got.combined_topk_weights), want_weights, "combined_topk_weights")


def check_overflow(buffer: Buffer, inputs: Inputs) -> None:
    """Dropped rows are reported by the first `check` after the call, and by that one only.

    The caller has looked at the results: on a GPU the call has ended by then.
    """
    if inputs.is_overflowing(buffer.rank):
        with pytest.raises(CapacityError, match="num_worst_tokens"):
            buffer.check()
    buffer.check()


def round_trip(buffer: Buffer, inputs: Inputs, frames: Frames | None = None) -> None:
    """Layout, dispatch, combine, and the same with a cached handle, old rows and new rows."""
    frames = frames or frames_of(buffer)
    layout, result = dispatch(buffer, inputs, frames)
    assert_layout(buffer, inputs, layout)
    assert_dispatched(buffer, inputs, result)
    check_overflow(buffer, inputs)
    options = (inputs.case.num_biases, True)
    assert_combined(buffer, inputs, combine(buffer, inputs, result, *options, frames=frames), *options)
    for again in (inputs, inputs.with_rows(seed=1)):
        cached = buffer.dispatch(up_all(frames, payload(again, buffer.rank)), handle=result.handle)
        assert_dispatched(buffer, again, cached, is_cached=True)
        check_overflow(buffer, inputs)
    rows = rows_in_place(buffer, inputs, cached, frames)
    assert_combined(buffer, inputs, combine(buffer, inputs, cached, *options, x=rows, frames=frames), *options)


def rows_in_place(buffer: Buffer, inputs: Inputs, result: DispatchResult, frames: Frames) -> Any:
    """A case's outputs in memory from which combine need not copy them; anywhere if that cannot be had.

    That memory is as wide as the rows of the dispatch, which the outputs need not be, and not for JAX.
    """
    outputs = frames.up(inputs.outputs[buffer.rank])
    if frames.is_immutable:
        return outputs
    rows = buffer.get_combine_buffer(result.handle, inputs.case.combine_dtype)
    if rows.shape != outputs.shape:
        return outputs
    assign(rows, outputs)
    return rows


def low_latency_dispatch(buffer: Buffer, inputs: LowLatencyInputs, **options: Any) -> LowLatencyDispatchResult:
    """Low-latency dispatch of a case, unchecked."""
    case, rank, up = inputs.case, buffer.rank, frames_of(buffer).up
    return buffer.low_latency_dispatch(
        up(inputs.x[rank]), up(inputs.topk_idx[rank]), case.max_tokens, inputs.num_experts, **case.options, **options
    )


def low_latency_combine(
    buffer: Buffer, inputs: LowLatencyInputs, result: LowLatencyDispatchResult, x: Any = None, **options: Any
) -> Any:
    """Low-latency combine of a case's outputs (or of `x`, which holds them), unchecked."""
    rank, up = buffer.rank, frames_of(buffer).up
    outputs = up(inputs.outputs[rank]) if x is None else x
    options = {"topk_idx": up(inputs.topk_idx[rank]), **inputs.case.combine_options, **options}
    return buffer.low_latency_combine(
        outputs, topk_weights=up(inputs.topk_weights[rank]), handle=result.handle, **options
    )


def assert_low_latency_dispatched(
    buffer: Buffer, inputs: LowLatencyInputs, got: LowLatencyDispatchResult, masks: list[Any] | None = None
) -> None:
    """Everything that low_latency_dispatch returns, its handle included."""
    assert_low_latency_received(inputs.dispatched(masks)[buffer.rank], inputs, got)


def assert_low_latency_received(
    want: reference.LowLatencyDispatched, inputs: LowLatencyInputs, got: LowLatencyDispatchResult
) -> None:
    """`assert_low_latency_dispatched` for one rank's part of the oracle."""
    assert_bitwise(down(got.recv_count), want.recv_count, "recv_count")
    src_info, layout_range, *sizes = got.handle
    src_info, layout_range = down(src_info), down(layout_range)
    assert_bitwise(src_info, want.src_info, "handle[0]")
    assert_bitwise(layout_range, want.layout_range, "handle[1]")
    assert sizes == [inputs.case.max_tokens, inputs.case.hidden, inputs.num_experts]
    recv_x, scales = down(got.recv_x if isinstance(got.recv_x, tuple) else (got.recv_x, None))
    assert recv_x.shape == want.recv_x.shape
    for expert, count in enumerate(want.recv_count):
        assert_bitwise(recv_x[expert, :count], want.recv_x[expert, :count], f"recv_x of expert {expert}")
    assert (scales is None) == (want.recv_scales is None)
    if want.recv_scales is not None:
        assert scales.shape == want.recv_scales.shape
        # The row dimension is the fastest one in memory.
        assert got.recv_x[1].strides[1] == scales.itemsize
        for expert, count in enumerate(want.recv_count):
            assert_bitwise(scales[expert, :count], want.recv_scales[expert, :count], f"scales of expert {expert}")


def low_latency_round_trip(buffer: Buffer, inputs: LowLatencyInputs, **options: Any) -> None:
    """Low-latency dispatch and combine."""
    result = low_latency_dispatch(buffer, inputs, **options)
    assert_low_latency_dispatched(buffer, inputs, result)
    combined = low_latency_combine(buffer, inputs, result, **options)
    assert_low_latency_combined(buffer, inputs, combined.combined_x)


def assert_low_latency_combined(
    buffer: Buffer,
    inputs: LowLatencyInputs,
    got: Any,
    masks: list[Any] | None = None,
    at_dispatch: list[Any] | None = None,
    what: str = "combined_x",
) -> None:
    """The sums of a combine: the oracle's bits, or with LogFMT nearly all of them, and all within its bound."""
    assert_low_latency_sums(inputs, buffer.rank, down(got), masks, at_dispatch, what)


def assert_low_latency_sums(
    inputs: LowLatencyInputs,
    rank: int,
    got: np.ndarray[Any, Any],
    masks: list[Any] | None = None,
    at_dispatch: list[Any] | None = None,
    what: str = "combined_x",
) -> None:
    """`assert_low_latency_combined` for sums in NumPy."""
    want = inputs.combined(masks, at_dispatch)[rank]
    if "use_logfmt" not in inputs.case.combine:
        assert_bitwise(got, want, what)
        return
    plain, bound = inputs.combined_in_logfmt(masks, at_dispatch)[rank]
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    with np.errstate(invalid="ignore"):
        is_equal = (got == want) | (np.isnan(got) & np.isnan(want))
        is_near = np.abs(got.astype(np.float64) - plain.astype(np.float64)) <= bound
    is_bounded = np.isfinite(plain) & np.isfinite(bound)
    assert (is_near | ~is_bounded).all(), f"{what}: {np.argwhere(~is_near & is_bounded)[:4]}"
    assert (is_equal | np.isfinite(want)).all(), f"{what}: NaN or Inf"
    # A logarithm between two codes is rare, and not always seen in the sum.
    assert is_equal.size < 100 or is_equal.mean() > 0.97, f"{what}: {is_equal.mean()}"
