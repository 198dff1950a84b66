"""Low-latency dispatch and combine on a GPU: every case bitwise equal to the oracle, hooks, graphs, masks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from helpers import checks, low_latency
from helpers.calls import TIMEOUT_S, error_of
from helpers.cases import CASES, LOW_LATENCY_CASES, LowLatencyCase
from helpers.frames import CUPY, assign, down
from helpers.gpu import busy, need_gpu
from helpers.low_latency import BF16, BY_NAME, FP8, UE8M0

from epcomm import Buffer
from epcomm.errors import BufferStateError, CapacityError, InputError, PeerError, UnsupportedOption
from epcomm.layout import NUM_SLOTS
from epcomm.testing import assert_bitwise, uniform_routing

cupy = need_gpu()
pytestmark = pytest.mark.gpu

AREA_BYTES = 16 << 20
SIZES = (1, 2, 3, 5, 8)
all_cases = pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.name)


def make_buffer(comm=None, num_rdma_bytes: int = AREA_BYTES, **settings) -> Buffer:
    settings = {"timeout_s": TIMEOUT_S, **settings}
    return Buffer(comm, 1 << 20, num_rdma_bytes, low_latency_mode=True, backend="cuda", **settings)


@pytest.fixture(scope="module")
def buffer():
    """One Buffer for all cases of a job: each finds what the ones before it have left behind."""
    with make_buffer() as shared:
        yield shared
        shared.check()


@pytest.mark.ranks(SIZES)
@all_cases
def test_case(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


WIDE = {
    "48_bytes": LowLatencyCase("48 bytes", hidden=24),
    "7176_channels": LowLatencyCase("7176 channels", hidden=7176, tokens=(3, 16, 1)),
    "7168_fp8": LowLatencyCase("7168 fp8", hidden=7168, tokens=(3, 16, 1), cast=("use_fp8",)),
    "topk_32": LowLatencyCase("topk 32", num_topk=32, experts_per_rank=40, routing=uniform_routing),
    "100_tokens": LowLatencyCase("100 tokens", tokens=(97, 100, 3), max_tokens=100, cast=("use_fp8",)),
    # So many choices that they come in passes.
    "300_experts": LowLatencyCase("300 experts", tokens=(70, 0, 33), max_tokens=300, hidden=8, experts_per_rank=300),
}


@pytest.mark.ranks((1, 3))
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_sizes(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks(3)
def test_20_runs_give_the_same_bits(buffer, num_ranks):
    inputs = UE8M0.inputs(num_ranks)
    for _ in range(20):
        checks.low_latency_round_trip(buffer, inputs)


@pytest.mark.ranks((2, 5))
def test_calls_of_changing_shape(buffer, num_ranks):
    low_latency.calls_of_changing_shape(buffer, 30)


@pytest.mark.slow
@pytest.mark.ranks(8, timeout=900)
def test_2000_pairs_with_delays(buffer, comm, num_ranks):
    draw = random.Random(comm.rank)
    low_latency.calls_of_changing_shape(buffer, 2000, lambda: busy(draw.random() * 2) if draw.random() < 0.05 else None)


@pytest.mark.ranks(3)
def test_odd_numbers_of_calls_between_the_modes(buffer, num_ranks):
    low_latency.odd_numbers_of_calls_between_the_modes(buffer, CASES[0].inputs(num_ranks))


@pytest.mark.ranks((1, 2, 8))
@pytest.mark.parametrize("num_sms", [1, 3, 16])
def test_any_number_of_sms(comm, num_ranks, num_sms, monkeypatch):
    """Ranks may differ."""
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)
    monkeypatch.setattr(Buffer, "_num_sms_chosen", False)
    fitting = cupy.cuda.Device().attributes["MultiProcessorCount"] // num_ranks
    Buffer.set_num_sms(max(1, min(num_sms, fitting) - comm.rank % 3))
    with make_buffer(comm) as buffer:
        for case in (BF16, UE8M0):
            checks.low_latency_round_trip(buffer, case.inputs(num_ranks))
        low_latency.zero_copy(buffer, FP8.inputs(num_ranks))
        comm.barrier()


# -- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(SIZES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in_order", "out_of_order"])
def test_hooks(buffer, num_ranks, order):
    inputs = [FP8.inputs(num_ranks), BY_NAME["full"].inputs(num_ranks)]
    for _ in range(NUM_SLOTS + 1):
        low_latency.round_trips_in_flight(buffer, inputs, order)


@pytest.mark.ranks(3)
def test_hooks_in_another_order_on_every_rank(buffer, comm):
    inputs = [UE8M0.inputs(comm.size), BF16.inputs(comm.size)]
    for _ in range(NUM_SLOTS + 1):
        low_latency.round_trips_in_flight(buffer, inputs, (comm.rank % 2, 1 - comm.rank % 2))


@pytest.mark.ranks(3)
def test_hook_runs_once_and_nothing_arrives_before(buffer, num_ranks):
    low_latency.hook_runs_once_and_nothing_arrives_before(buffer)


@pytest.mark.ranks(3)
def test_hooks_in_another_stream(buffer, num_ranks):
    """The receive half runs in the stream that is current when the hook is called."""
    inputs, other = FP8.inputs(num_ranks), cupy.cuda.Stream(non_blocking=True)
    for _ in range(3):
        result = checks.low_latency_dispatch(buffer, inputs, return_recv_hook=True)
        busy(5)
        with other:
            result.hook()
            checks.assert_low_latency_dispatched(buffer, inputs, result)
            combined = checks.low_latency_combine(buffer, inputs, result, return_recv_hook=True)
            other.synchronize()
        combined.hook()
        assert_bitwise(down(combined.combined_x), inputs.combined()[buffer.rank])


@pytest.mark.ranks(3)
def test_async_finish(buffer, num_ranks):
    inputs = BF16.inputs(num_ranks)
    for _ in range(3):
        result = checks.low_latency_dispatch(buffer, inputs, async_finish=True)
        result.event.current_stream_wait()
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        combined = checks.low_latency_combine(buffer, inputs, result, async_finish=True)
        combined.event.current_stream_wait()
        assert_bitwise(down(combined.combined_x), inputs.combined()[buffer.rank])


@pytest.mark.ranks(3)
def test_outputs_stay_as_they_are(comm):
    low_latency.outputs_stay_as_they_are(comm, make_buffer)


@pytest.mark.ranks(3)
def test_out_and_statistics(buffer, num_ranks):
    low_latency.out_and_statistics(buffer)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("option", ["use_logfmt", "pre_reduce"])
def test_options_that_are_not_there_yet(buffer, num_ranks, option):
    inputs = BF16.inputs(num_ranks)
    result = checks.low_latency_dispatch(buffer, inputs)
    with pytest.raises(UnsupportedOption, match=f"^{option}: got True; wanted False"):
        checks.low_latency_combine(buffer, inputs, result, **{option: True})
    CUPY.synchronize()
    assert type(error_of(buffer.check)) is PeerError
    checks.low_latency_round_trip(buffer, inputs)


# -- combine buffers --------------------------------------------------------------------------------------------------


@pytest.mark.ranks(SIZES)
def test_zero_copy(buffer, num_ranks):
    low_latency.zero_copy(buffer, BY_NAME["full"].inputs(num_ranks))
    low_latency.zero_copy(buffer, FP8.inputs(num_ranks))  # smaller


@pytest.mark.ranks((2, 3))
def test_each_rank_decides_how_its_rows_travel(buffer, comm, num_ranks):
    inputs = BY_NAME["full"].inputs(num_ranks)
    result = checks.low_latency_dispatch(buffer, inputs)
    outputs = CUPY.up(inputs.outputs[comm.rank])
    for number in range(2 * NUM_SLOTS + 1):
        rows = buffer.get_next_low_latency_combine_buffer(result.handle)
        assign(rows, outputs)
        is_pulled = (number + comm.rank) % 2 == 0
        combined = checks.low_latency_combine(
            buffer, inputs, result, x=rows if is_pulled else None, zero_copy=is_pulled
        )
        assert_bitwise(down(combined.combined_x), inputs.combined()[comm.rank], f"combine {number}")


@pytest.mark.ranks(2)
def test_a_rejected_combine_uses_up_the_combine_buffer(comm, buffer):
    """It goes with a slot, which all ranks have left behind them."""
    inputs = BY_NAME["full"].inputs(comm.size)
    result = checks.low_latency_dispatch(buffer, inputs)
    rows = buffer.get_next_low_latency_combine_buffer(result.handle)
    assign(rows, CUPY.up(inputs.outputs[comm.rank]))
    options = {"x": rows, "zero_copy": True}
    wrong = {"out": rows[0]} if comm.rank == 1 else {}
    error = error_of(lambda: checks.low_latency_combine(buffer, inputs, result, **options, **wrong))
    assert (error is not None) == (comm.rank == 1)
    CUPY.synchronize()
    assert (error_of(buffer.check) is not None) == (comm.rank == 0)
    assert type(error_of(lambda: checks.low_latency_combine(buffer, inputs, result, **options))) is InputError
    CUPY.synchronize()
    error_of(buffer.check)
    low_latency.zero_copy(buffer, inputs)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("late_rank", [0, 2])
def test_a_combine_buffer_is_not_written_while_a_slow_rank_reads_it(comm, buffer, late_rank):
    """The rows of each round differ, and one rank comes late to pull them."""
    inputs = [BY_NAME["full"].inputs(comm.size, seed) for seed in range(4)]
    outputs = [CUPY.up(mine.outputs[comm.rank]) for mine in inputs]
    results = [checks.low_latency_dispatch(buffer, mine) for mine in inputs]
    combined = []
    for mine, rows, result in zip(inputs, outputs, results, strict=True):
        place = buffer.get_next_low_latency_combine_buffer(result.handle)
        assign(place, rows)
        if comm.rank == late_rank:
            busy(20)
        combined.append(checks.low_latency_combine(buffer, mine, result, x=place, zero_copy=True))
    for mine, got in zip(inputs, combined, strict=True):
        assert_bitwise(down(got.combined_x), mine.combined()[comm.rank])


# -- graphs -----------------------------------------------------------------------------------------------------------


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
        rows, topk_idx, weights, result.handle, zero_copy=is_pulled, return_recv_hook=is_split
    )
    combined.hook()
    return result, combined


@pytest.mark.ranks((1, 2, 4))
@pytest.mark.parametrize("case", [BF16, UE8M0], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "options",
    [
        {"is_pulled": False, "is_split": False, "extra": 0},
        {"is_pulled": True, "is_split": False, "extra": 1},
        {"is_pulled": True, "is_split": True, "extra": 0},
    ],
    ids=["push", "pull_after_an_extra_dispatch", "pull_in_halves"],
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
                assert_bitwise(down(combined.combined_x), step.inputs.combined()[comm.rank], f"replay {number}")
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


# -- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_an_area_of_the_hinted_size_is_enough(comm):
    case = LowLatencyCase("hinted", tokens=(40,), max_tokens=40, num_topk=10, experts_per_rank=6, hidden=1024)
    hint = Buffer.get_low_latency_rdma_size_hint(40, 1024, comm.size, 6 * comm.size)
    with make_buffer(comm, hint) as buffer:
        checks.low_latency_round_trip(buffer, case.inputs(comm.size))
        comm.barrier()


@pytest.mark.ranks(2)
def test_an_area_that_is_too_small(comm):
    """All ranks raise alike, and smaller calls work."""
    inputs = BY_NAME["full"].inputs(comm.size)
    small = LowLatencyCase("small", tokens=(2,), max_tokens=2, hidden=128)
    with make_buffer(comm, 80 << 10) as buffer:
        error = error_of(lambda: checks.low_latency_dispatch(buffer, inputs))
        assert type(error) is CapacityError, repr(error)
        assert "num_rdma_bytes: got 81920 bytes; wanted at least" in str(error)
        CUPY.synchronize()
        error_of(buffer.check)
        checks.low_latency_round_trip(buffer, small.inputs(comm.size))
        many = LowLatencyCase("choices", tokens=(2,), max_tokens=2, hidden=640, num_topk=32, experts_per_rank=16)
        inputs = many.inputs(comm.size)
        result = checks.low_latency_dispatch(buffer, inputs)
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        with pytest.raises(CapacityError, match="32 choices"):
            checks.low_latency_combine(buffer, inputs, result)
        CUPY.synchronize()
        error_of(buffer.check)
        checks.low_latency_round_trip(buffer, small.inputs(comm.size))
        comm.barrier()


@pytest.mark.ranks(2)
def test_wrong_indices_touch_nothing_else(comm, buffer):
    """Nobody looks at them without EPCOMM_CHECK; they select nothing, or the same row twice."""
    mine = BF16.inputs(comm.size)
    wrong = mine.topk_idx[comm.rank].copy()
    wrong[0] = [-7, 1 << 40, mine.num_experts]
    wrong[1:] = wrong[1:, :1]
    arrays = [CUPY.up(array[comm.rank]) for array in (mine.x, mine.topk_weights, mine.outputs)]
    for topk_idx in (wrong, wrong.astype(np.int32)):
        result = buffer.low_latency_dispatch(arrays[0], CUPY.up(topk_idx), 16, mine.num_experts, use_fp8=False)
        buffer.low_latency_combine(arrays[2], CUPY.up(topk_idx), arrays[1], result.handle)
    checks.low_latency_round_trip(buffer, mine)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(3)
@pytest.mark.parametrize("ignored", low_latency.IGNORED.values(), ids=low_latency.IGNORED)
def test_masks_that_the_user_sets(buffer, comm, ignored):
    low_latency.masks_that_the_user_sets(comm, buffer, ignored)


@pytest.mark.ranks(3)
def test_mask_set_between_dispatch_and_combine(buffer, comm):
    low_latency.mask_set_between_dispatch_and_combine(comm, buffer)


@pytest.mark.ranks(3)
def test_one_rank_is_brought_back(buffer, comm):
    low_latency.one_rank_is_brought_back(comm, buffer)


@pytest.mark.ranks(3)
def test_hook_from_before_the_masks_were_cleaned(buffer, comm):
    low_latency.hook_from_before_the_masks_were_cleaned(buffer)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("lost", [0, 2])
def test_rank_that_stops_answering(comm, lost):
    with make_buffer(comm, enable_shrink=True, timeout_s=2.0) as buffer:
        low_latency.rank_that_stops_answering(comm, buffer, lost)
        buffer.check()


@pytest.mark.ranks(3)
def test_rank_that_stops_answering_between_dispatch_and_combine(comm):
    with make_buffer(comm, enable_shrink=True, timeout_s=2.0) as buffer:
        low_latency.rank_that_stops_answering_between_dispatch_and_combine(comm, buffer)


@pytest.mark.ranks(3)
def test_rank_that_comes_back_by_itself(comm):
    """It hears from `check` that the others went on without it, and disturbs nobody."""
    masks = low_latency.masks_of(3, {0: {1}, 2: {1}})
    with make_buffer(comm, enable_shrink=True, timeout_s=2.0) as buffer:
        checks.low_latency_round_trip(buffer, FP8.inputs(comm.size))
        comm.barrier()
        if comm.rank != 1:
            for seed in range(2 * NUM_SLOTS):
                low_latency.masked_round_trip(buffer, BF16.inputs(comm.size, seed), masks)
        comm.barrier()
        if comm.rank == 1:
            for _ in range(NUM_SLOTS):
                checks.low_latency_dispatch(buffer, BF16.inputs(comm.size))
            CUPY.synchronize()
            assert type(error_of(buffer.check)) is BufferStateError
        comm.barrier()
        if comm.rank != 1:
            low_latency.masked_round_trip(buffer, FP8.inputs(comm.size), masks)
        comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        for seed in range(2 * NUM_SLOTS + 1):
            checks.low_latency_round_trip(buffer, BY_NAME["full"].inputs(comm.size, seed))
        comm.barrier()
