"""CUDA graphs: captured once, replayed with changing inputs, every replay equal to the oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from helpers import checks, moe
from helpers.calls import TIMEOUT_S, error_of
from helpers.cases import FP8, Case, Inputs, row_major_scales
from helpers.frames import CUPY, TORCH, assign, down, up_all
from helpers.gpu import emulated, has_gpu, need_gpu
from numpy.typing import NDArray

from epcomm import Buffer, reference
from epcomm.errors import CapacityError, ConcurrentUse
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu

NUM_REPLAYS = 10 if emulated() else 100
TOKENS = (13, 7, 16, 0)
BF16_CASE = Case("bf16", tokens=TOKENS, hidden=264, num_topk=3)
FP8_CASE = Case("fp8", tokens=TOKENS, hidden=128, dtype=FP8, scales=row_major_scales)


def make_buffer(comm, num_nvl_bytes: int = 16 << 20) -> Buffer:
    return Buffer(comm, num_nvl_bytes, backend="cuda", timeout_s=TIMEOUT_S)


@dataclass(frozen=True)
class Step:
    """One set of inputs, on the device, and what this rank must get for them."""

    inputs: Inputs
    x: object
    scales: object
    topk_idx: object
    topk_weights: object
    combined: tuple[NDArray, NDArray]

    @classmethod
    def make(cls, case: Case, num_ranks: int, rank: int, seed: int, frames, num_worst_tokens: int | None = None):
        inputs = case.inputs(num_ranks, seed)
        worst = sum(inputs.num_tokens) if num_worst_tokens is None else num_worst_tokens
        inputs = replace(inputs, num_worst_tokens=worst)
        received = inputs.dispatched
        sums = reference.combine(
            # Rows of one byte cannot be summed; their weights can.
            [one.recv_x if one.recv_x.dtype.itemsize > 1 else one.recv_x.view("f4") for one in received],
            inputs.topk_idx,
            inputs.num_experts,
            topk_weights=[one.recv_topk_weights for one in received],
            num_worst_tokens=worst,
        )
        mine = (inputs.x[rank], inputs.scales and inputs.scales[rank], inputs.topk_idx[rank], inputs.topk_weights[rank])
        return cls(inputs, *up_all(frames, mine), sums[rank])

    def load_into(self, static: Step) -> None:
        """Change the inputs of a graph in place."""
        for name in ("x", "scales", "topk_idx", "topk_weights"):
            if getattr(self, name) is not None:
                assign(getattr(static, name), getattr(self, name))

    @property
    def payload(self):
        return self.x if self.scales is None else (self.x, self.scales)


@dataclass
class Captured:
    """What the calls of a graph returned, to be looked at after each replay."""

    dispatched: list
    combined: list
    layout: object = None

    def check(self, buffer: Buffer, step: Step) -> None:
        if self.layout is not None:
            checks.assert_layout(buffer, step.inputs, self.layout)
        for number, result in enumerate(self.dispatched):
            is_cached = self.layout is None or number > 0
            checks.assert_dispatched(buffer, step.inputs, result, is_cached)
        for result in self.combined:
            assert_bitwise(down(result.combined_x), step.combined[0], "combined_x")
            if result.combined_topk_weights is not None:
                assert_bitwise(down(result.combined_topk_weights), step.combined[1], "combined_topk_weights")


def rows_to_sum(result):
    """What combine gets: the received rows themselves, as numbers of 4 bytes where they are bytes."""
    x = result.recv_x[0] if isinstance(result.recv_x, tuple) else result.recv_x
    return x if x.itemsize > 1 else x.view("f4")


def worst_case_calls(buffer: Buffer, static: Step, **options) -> Captured:
    layout = buffer.get_dispatch_layout(static.topk_idx, static.inputs.num_experts, **options)
    result = buffer.dispatch(
        static.payload,
        **layout.arguments(),
        topk_idx=static.topk_idx,
        topk_weights=static.topk_weights,
        num_worst_tokens=static.inputs.num_worst_tokens,
        **options,
    )
    combined = buffer.combine(rows_to_sum(result), result.handle, topk_weights=result.recv_topk_weights, **options)
    if options:
        combined.event.current_stream_wait()
    return Captured([result], [combined], layout)


def three_dispatches(buffer: Buffer, static: Step) -> Captured:
    """An odd number of calls of one kind, an even one of the other: replays begin with either parity."""
    captured = worst_case_calls(buffer, static)
    first = captured.dispatched[0]
    again = [buffer.dispatch(static.payload, handle=first.handle) for _ in range(2)]
    combined = buffer.combine(rows_to_sum(again[1]), first.handle)
    return Captured([first, *again], [*captured.combined, combined], captured.layout)


def capture(stream, calls):
    """(graph, what `calls` returned)."""
    with stream:
        stream.begin_capture()
        try:
            captured = calls()
        finally:
            graph = stream.end_capture()
    return graph, captured


def replay_and_check(buffer, stream, graph, captured, static, steps, eager=lambda: None) -> None:
    draw = random.Random(5)  # the same on every rank
    with stream:
        for number in range(NUM_REPLAYS):
            step = draw.choice(steps)
            step.load_into(static)
            graph.launch(stream)
            captured.check(buffer, step)
            if number % 10 == 3:
                eager()
    buffer.check()


VARIANTS = {
    "worst_case": worst_case_calls,
    "three_dispatches": three_dispatches,
    "async_finish": lambda buffer, static: worst_case_calls(buffer, static, async_finish=True),
}


@pytest.mark.ranks((1, 2, 4))
@pytest.mark.parametrize("case", [BF16_CASE, FP8_CASE], ids=lambda case: case.name)
@pytest.mark.parametrize("num_nvl_bytes", [16 << 20, 0], ids=["arena", "window"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replays(comm, num_ranks, variant, num_nvl_bytes, case):
    """Rows, indices and weights change between replays, and eager calls come in between."""
    steps = [Step.make(case, num_ranks, comm.rank, seed, CUPY) for seed in range(5)]
    static = Step.make(case, num_ranks, comm.rank, 99, CUPY)
    stream = cupy.cuda.Stream(non_blocking=True)
    CUPY.synchronize()
    with make_buffer(comm, num_nvl_bytes) as buffer:
        with stream:
            moe.assert_works(buffer)
        graph, captured = capture(stream, lambda: VARIANTS[variant](buffer, static))
        seeds = iter(range(1000))
        replay_and_check(
            buffer,
            stream,
            graph,
            captured,
            static,
            steps,
            eager=lambda: moe.assert_throughput_works(buffer, next(seeds) % 3),
        )
        stream.synchronize()
        comm.barrier()


@pytest.mark.ranks((1, 2, 4))
@pytest.mark.parametrize("num_nvl_bytes", [16 << 20, 0], ids=["arena", "window"])
def test_replays_of_a_cached_dispatch(comm, num_ranks, num_nvl_bytes):
    """The handle of an eager dispatch; the routing stays, the rows change."""
    first = BF16_CASE.inputs(num_ranks)
    steps = []
    for seed in range(5):
        inputs = first.with_rows(seed)
        outputs = [one.recv_x for one in inputs.dispatched]
        sums = reference.combine(outputs, inputs.topk_idx, inputs.num_experts)
        x = CUPY.up(inputs.x[comm.rank])
        steps.append(Step(inputs, x, None, None, None, sums[comm.rank]))
    stream = cupy.cuda.Stream(non_blocking=True)
    static = replace(steps[0], x=CUPY.up(first.x[comm.rank]))
    CUPY.synchronize()
    with make_buffer(comm, num_nvl_bytes) as buffer:
        with stream:
            _, eager = checks.dispatch(buffer, first)

        def calls() -> Captured:
            results = [buffer.dispatch(static.x, handle=eager.handle) for _ in range(3)]
            return Captured(results, [buffer.combine(results[-1].recv_x, eager.handle)])

        graph, captured = capture(stream, calls)
        replay_and_check(buffer, stream, graph, captured, static, steps)
        stream.synchronize()
        comm.barrier()


@pytest.mark.ranks((1, 2, 4))
def test_torch_graphs(comm, num_ranks):
    """torch.cuda.graph forbids more while it captures than a relaxed capture does."""
    if not has_gpu("torch"):
        pytest.skip("torch has no GPU")
    import torch

    steps = [Step.make(BF16_CASE, num_ranks, comm.rank, seed, TORCH) for seed in range(5)]
    static = Step.make(BF16_CASE, num_ranks, comm.rank, 99, TORCH)
    draw = random.Random(6)
    with make_buffer(comm) as buffer:
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            worst_case_calls(buffer, static)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = worst_case_calls(buffer, static)
        for number in range(NUM_REPLAYS):
            step = draw.choice(steps)
            step.load_into(static)
            graph.replay()
            captured.check(buffer, step)
            if number % 10 == 3:
                moe.assert_throughput_works(buffer, number % 3, TORCH)
        buffer.check()
        torch.cuda.synchronize()
        comm.barrier()


@pytest.mark.ranks(2)
def test_several_graphs_of_one_buffer(comm):
    """In any order; each keeps its memory although its arrays are dropped, and takes none that others hold."""
    stream = cupy.cuda.Stream(non_blocking=True)
    steps = [Step.make(BF16_CASE, 2, comm.rank, seed, CUPY) for seed in range(3)]
    CUPY.synchronize()
    with make_buffer(comm) as buffer:
        kept = [capture(stream, lambda one=one: worst_case_calls(buffer, one)) for one in steps]
        dropped = [capture(stream, lambda one=one: worst_case_calls(buffer, one))[0] for one in steps]
        with stream:
            held = [moe.send(buffer, moe.inputs(comm.rank, 2, seed)) for seed in range(4)]
            for _ in range(5):
                for graph, _ in kept:
                    graph.launch(stream)
                for graph in dropped:
                    graph.launch(stream)
            for (_, captured), step in zip(kept, steps, strict=True):
                captured.check(buffer, step)
            for seed, result in enumerate(held):
                want = moe.oracle(2, 2, seed).dispatched[comm.rank].recv_x
                assert_bitwise(down(result.recv_x), want, "recv_x of an eager dispatch")
        buffer.check()
        assert buffer.stats["arena_bytes_pinned"] > 0
        stream.synchronize()
        comm.barrier()


@pytest.mark.ranks(2)
def test_overflow_in_a_replay(comm):
    """Every replay counts the rows that it drops."""
    stream = cupy.cuda.Stream(non_blocking=True)
    static = Step.make(BF16_CASE, 2, comm.rank, 1, CUPY, num_worst_tokens=3)
    assert static.inputs.is_overflowing(comm.rank)
    want = static.inputs.dispatched[comm.rank]
    num_dropped = int(want.rank_prefix_matrix[-1, comm.rank]) - want.num_recv_tokens
    CUPY.synchronize()
    with make_buffer(comm) as buffer:
        graph, captured = capture(stream, lambda: worst_case_calls(buffer, static))
        for _ in range(7):
            graph.launch(stream)
        stream.synchronize()
        with pytest.raises(CapacityError, match=f"got {7 * num_dropped} rows for rank {comm.rank} "):
            buffer.check()
        captured.check(buffer, static)
        buffer.check()
        comm.barrier()


@pytest.mark.ranks(2)
def test_a_replay_beside_an_eager_call(comm):
    """Two operations of one Buffer at once are found on the GPU; nobody hangs, and the Buffer says so from then on."""
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    static = Step.make(BF16_CASE, 2, comm.rank, 1, CUPY)
    CUPY.synchronize()
    with make_buffer(comm) as buffer:
        graph, captured = capture(streams[0], lambda: worst_case_calls(buffer, static))
        with streams[1]:
            x = CUPY.up(static.inputs.x[comm.rank])
            _, result = checks.dispatch(buffer, static.inputs)
            streams[1].synchronize()
            comm.barrier()
            if comm.rank == 0:
                # Both wait for rank 1, which does not come.
                graph.launch(streams[0])
                buffer.dispatch(x, handle=result.handle)
        CUPY.synchronize()
        if comm.rank == 0:
            for _ in range(2):
                error = error_of(buffer.check)
                assert type(error) is ConcurrentUse, repr(error)
        assert captured is not None
        comm.barrier()
    with make_buffer(comm) as buffer:
        moe.assert_works(buffer)
