"""Generated cases: whatever the shapes, the routing and the options are, every rank gets the bits of the oracle.

Ranks are threads of this process. One draw is one case for all of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import checks
from helpers.cases import (
    BF16,
    FP8,
    Case,
    Inputs,
    LowLatencyCase,
    LowLatencyInputs,
    byte_scales,
    column_major_scales,
    strided_scales,
    vector_scales,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epcomm import Buffer, run_local
from epcomm.testing import assert_bitwise, grouped_routing, masked_routing, uniform_routing, zipf_routing

# Nodes x local ranks: 1 to 6 ranks on one node and on several.
SHAPES = [(1, n) for n in range(1, 6)] + [(2, 1), (3, 1), (5, 1), (2, 2), (4, 1), (3, 2), (2, 3)]
COMBINE_DTYPES = [BF16, np.dtype(np.float16), np.dtype(np.float32)]
ROW_DTYPES = [*COMBINE_DTYPES, FP8, np.dtype(np.uint8), np.dtype(np.int8)]
SCALES = [None, None, byte_scales, column_major_scales, strided_scales, vector_scales]
FORMATS = [(), ("use_fp8",), ("use_fp8", "round_scale"), ("use_fp8", "round_scale", "use_ue8m0")]


def half_masked(*sizes: int, seed: int) -> np.ndarray[Any, Any]:
    return masked_routing(*sizes, seed=seed, masked_fraction=0.5)


def one_group(num_tokens: int, num_experts: int, num_topk: int, *, seed: int) -> np.ndarray[Any, Any]:
    """All choices of a token are neighbours: few ranks, many experts there."""
    groups = next(n for n in range(num_experts, 0, -1) if num_experts % n == 0 and num_experts // n >= num_topk)
    return grouped_routing(num_tokens, num_experts, num_topk, seed=seed, num_groups=groups, num_topk_groups=1)


ROUTING = [uniform_routing, zipf_routing, half_masked, one_group]


def reproducible(num_cases: int) -> Any:
    """The same cases in every run, as many as asked for, whatever the speed of the machine."""
    return settings(
        max_examples=num_cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def throughput_cases(draw: Any) -> tuple[int, Inputs]:
    """(ranks per node, inputs)."""
    num_nodes, per_node = draw(st.sampled_from(SHAPES))
    num_ranks = num_nodes * per_node
    dtype = draw(st.sampled_from(ROW_DTYPES))
    unit = 32 // dtype.itemsize  # rows of 16 bytes; twice that, as the outputs of 1-byte rows are half as wide
    case = Case(
        "generated",
        tokens=tuple(draw(st.lists(st.integers(0, 12), min_size=num_ranks, max_size=num_ranks))),
        hidden=unit * draw(st.integers(1, 6)),
        dtype=dtype,
        combine_dtype=dtype if dtype in COMBINE_DTYPES else draw(st.sampled_from([BF16, np.dtype(np.float32)])),
        experts_per_rank=draw(st.integers(1, 5)),
        num_topk=draw(st.integers(1, 8)),
        routing=draw(st.sampled_from(ROUTING)),
        topk_dtype=draw(st.sampled_from([np.int32, np.int64])),
        has_weights=draw(st.booleans()),
        scales=draw(st.sampled_from(SCALES)),
        is_special=draw(st.booleans()),
        num_biases=draw(st.integers(0, 2)),
        expert_alignment=draw(st.sampled_from([1, 1, 2, 16, 128])),
        worst=draw(st.sampled_from(["", "", "exact", "room", "overflow"])),
    )
    return per_node, case.inputs(num_ranks, draw(st.integers(0, 1 << 16)))


@st.composite
def low_latency_cases(draw: Any) -> tuple[int, LowLatencyInputs]:
    """(number of ranks, inputs)."""
    num_ranks, max_tokens = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    cast = draw(st.sampled_from(FORMATS))
    case = LowLatencyCase(
        "generated",
        tokens=tuple(draw(st.lists(st.integers(0, max_tokens), min_size=num_ranks, max_size=num_ranks))),
        max_tokens=max_tokens,
        hidden=draw(st.integers(1, 6)) * (128 if cast else 8),
        experts_per_rank=draw(st.integers(1, 4)),
        num_topk=draw(st.integers(1, 8)),
        routing=draw(st.sampled_from(ROUTING)),
        topk_dtype=draw(st.sampled_from([np.int32, np.int64])),
        cast=cast,
        combine=draw(st.sampled_from([(), ("pre_reduce",), ("use_logfmt",)][: 3 if cast else 2])),
        is_special=draw(st.booleans()),
    )
    return num_ranks, case.inputs(num_ranks, draw(st.integers(0, 1 << 16)))


def run_throughput(num_cases: int) -> Counter[Any]:
    """Counts of the cases by shape."""
    seen: Counter[Any] = Counter()

    @reproducible(num_cases)
    @given(throughput_cases())
    def check(drawn: tuple[int, Inputs]) -> None:
        per_node, inputs = drawn
        num_ranks = len(inputs.x)
        seen[num_ranks // per_node, per_node] += 1
        # The oracle runs here, once for all ranks.
        again, with_weights = inputs.with_rows(seed=1), bool(inputs.case.num_biases)
        assert len(inputs.dispatched) == len(again.dispatched) == len(inputs.outputs) == num_ranks

        def program(comm: Any) -> None:
            with Buffer(comm, ranks_per_node=per_node) as buffer:
                layout, result = checks.dispatch(buffer, inputs)
                checks.assert_layout(buffer, inputs, layout)
                checks.assert_dispatched(buffer, inputs, result)
                checks.check_overflow(buffer, inputs)
                cached = buffer.dispatch(checks.payload(again, comm.rank), handle=result.handle)
                checks.assert_dispatched(buffer, again, cached, is_cached=True)
                combined = checks.combine(buffer, inputs, cached, inputs.case.num_biases, with_weights)
                combines[comm.rank] = combined
                comm.barrier()

        combines: list[Any] = [None] * num_ranks
        run_local(num_ranks, program)
        want = inputs.combined(per_node, inputs.case.num_biases, with_weights)
        for rank, (want_x, want_weights) in enumerate(want):
            assert_bitwise(combines[rank].combined_x, want_x, f"combined_x of rank {rank}")
            assert (combines[rank].combined_topk_weights is None) == (want_weights is None)
            if want_weights is not None:
                assert_bitwise(combines[rank].combined_topk_weights, want_weights, f"weights of rank {rank}")

    check()
    return seen


def run_low_latency(num_cases: int) -> Counter[Any]:
    """Counts of the cases by number of ranks, format, and option of combine."""
    seen: Counter[Any] = Counter()

    @reproducible(num_cases)
    @given(low_latency_cases(), st.booleans())
    def check(drawn: tuple[int, LowLatencyInputs], with_hooks: bool) -> None:
        num_ranks, inputs = drawn
        seen[num_ranks, inputs.case.cast, inputs.case.combine] += 1

        def program(comm: Any) -> None:
            with Buffer(comm, low_latency_mode=True) as buffer:
                result = checks.low_latency_dispatch(buffer, inputs, return_recv_hook=with_hooks)
                result.hook()
                results[comm.rank] = result
                combined = checks.low_latency_combine(buffer, inputs, result, return_recv_hook=with_hooks)
                combined.hook()
                combines[comm.rank] = combined.combined_x
                comm.barrier()

        results: list[Any] = [None] * num_ranks
        combines: list[Any] = [None] * num_ranks
        run_local(num_ranks, program)
        wanted = inputs.dispatched()
        for rank, want in enumerate(wanted):
            checks.assert_low_latency_received(want, inputs, results[rank])
            checks.assert_low_latency_sums(inputs, rank, combines[rank], what=f"combined_x of rank {rank}")

    check()
    return seen


def test_throughput():
    seen = run_throughput(60)
    assert seen.total() >= 60
    assert len(seen) >= 6  # of 12 shapes


def test_low_latency():
    seen = run_low_latency(60)
    assert seen.total() >= 60
    assert len(seen) >= 15  # of 5 numbers of ranks x 4 formats x 3 options
    assert len({combine for _, _, combine in seen}) == 3


@pytest.mark.slow
def test_many_more():
    assert run_throughput(1500).total() >= 1500
    assert run_low_latency(1000).total() >= 1000
