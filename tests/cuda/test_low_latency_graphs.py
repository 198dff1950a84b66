"""Low-latency calls in CUDA graphs: replays with changing inputs, odd numbers of calls, shared memory of layers."""

from __future__ import annotations

import random

import pytest
from helpers import checks, low_latency
from helpers.frames import CUPY, assign, down
from helpers.gpu import need_gpu
from helpers.low_latency import BF16, FP8, LOGFMT, PRE_REDUCE, UE8M0
from helpers.low_latency import make_cuda_buffer as make_buffer
from helpers.nodes import nodes  # noqa: F401

from epcomm.errors import InputError
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu


class Step:
    """Inputs of one replay on the device; `x`, `topk_idx` and so on are those that a graph has the addresses of."""

    def __init__(self, case, num_ranks: int, rank: int, seed: int) -> None:
        self.inputs = case.inputs(num_ranks, seed)
        arrays = (self.inputs.x, self.inputs.topk_idx, self.inputs.topk_weights, self.inputs.outputs)
        self.arrays = [CUPY.up(array[rank]) for array in arrays]

    def load_into(self, static) -> None:
        for to, value in zip(static.arrays, self.arrays, strict=True):
            assign(to, value)


def pair(buffer, static, *, is_pulled: bool, is_split: bool, extra: int):
    """A dispatch and a combine, after `extra` dispatches that leave the slots out of step."""
    x, topk_idx, weights, outputs = static.arrays
    case, num_experts = static.inputs.case, static.inputs.num_experts

    def send():
        return buffer.low_latency_dispatch(
            x, topk_idx, case.max_tokens, num_experts, **case.options, return_recv_hook=is_split
        )

    for _ in range(extra):
        send().hook()
    result = send()
    result.hook()
    rows = outputs
    if is_pulled:
        rows = buffer.get_next_low_latency_combine_buffer(result.handle)
        assign(rows, outputs)
    combined = buffer.low_latency_combine(
        rows,
        topk_idx,
        weights,
        result.handle,
        zero_copy=is_pulled,
        return_recv_hook=is_split,
        **case.combine_options,
    )
    combined.hook()
    return result, combined


WAYS = (
    ("push", {"is_pulled": False, "is_split": False, "extra": 0}),
    ("pull_after_an_extra_dispatch", {"is_pulled": True, "is_split": False, "extra": 1}),
    ("pull_in_halves", {"is_pulled": True, "is_split": True, "extra": 0}),
)


@pytest.mark.ranks((1, 2, 4))
@pytest.mark.parametrize(
    ("case", "options"),
    [
        *[pytest.param(case, options, id=f"{case.name}_{name}") for case in (BF16, UE8M0) for name, options in WAYS],
        *[pytest.param(case, WAYS[0][1], id=case.name) for case in (LOGFMT["fp8_ue8m0"], PRE_REDUCE["full"])],
    ],
)
def test_replays(comm, num_ranks, case, options):
    """Inputs change between replays, of which there are odd numbers, with eager calls in between."""
    steps = [Step(case, num_ranks, comm.rank, seed) for seed in range(4)]
    static = Step(case, num_ranks, comm.rank, 99)
    stream, draw = cupy.cuda.Stream(non_blocking=True), random.Random(5)
    CUPY.synchronize()
    with make_buffer(comm) as buffer:
        with stream:
            pair(buffer, static, **{**options, "extra": 0})  # allocates the combine buffers
            stream.begin_capture()
            result, combined = pair(buffer, static, **options)
            graph = stream.end_capture()
            for number in range(25):
                step = draw.choice(steps)
                step.load_into(static)
                graph.launch(stream)
                checks.assert_low_latency_dispatched(buffer, step.inputs, result)
                checks.assert_low_latency_combined(buffer, step.inputs, combined.combined_x, what=f"replay {number}")
                if number % 7 == 3:
                    checks.low_latency_round_trip(buffer, FP8.inputs(num_ranks, number))
        buffer.check()
        stream.synchronize()
        comm.barrier()


@pytest.mark.ranks(2)
def test_layers_of_a_graph_share_memory(comm, num_ranks):
    """The results of all layers but the last are dropped during the capture."""
    step, static = (Step(BF16, num_ranks, comm.rank, seed) for seed in (3, 99))
    stream = cupy.cuda.Stream(non_blocking=True)
    CUPY.synchronize()
    with make_buffer(comm) as buffer, stream:
        options = {"is_pulled": True, "is_split": False, "extra": 0}
        pair(buffer, static, **options)
        held, taken = [], []
        for num_layers in (0, 2, 9):
            stream.begin_capture()
            results = None
            for _ in range(num_layers):
                results = pair(buffer, static, **options)
            held.append((stream.end_capture(), results))
            del results
            pair(buffer, static, **options)  # the pool looks at what was released
            taken.append(buffer.stats["outputs_bytes_live"] + buffer.stats["outputs_bytes_pinned"])
        assert 0 < taken[2] - taken[1] <= taken[1] - taken[0]
        step.load_into(static)
        for graph, (result, combined) in held[1:]:
            graph.launch(stream)
            checks.assert_low_latency_dispatched(buffer, step.inputs, result)
            assert_bitwise(down(combined.combined_x), step.inputs.combined()[comm.rank])
        stream.synchronize()
        comm.barrier()


@pytest.mark.ranks(2)
def test_combine_buffers_are_not_allocated_under_capture(comm):
    inputs = BF16.inputs(comm.size)
    stream = cupy.cuda.Stream(non_blocking=True)
    with make_buffer(comm) as buffer, stream:
        result = checks.low_latency_dispatch(buffer, inputs)
        stream.begin_capture()
        with pytest.raises(InputError, match="get_next_low_latency_combine_buffer: got the first call of this size"):
            buffer.get_next_low_latency_combine_buffer(result.handle)
        stream.end_capture()
        low_latency.zero_copy(buffer, inputs)
        comm.barrier()
