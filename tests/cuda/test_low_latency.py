"""Low-latency dispatch and combine on a GPU: every case bitwise equal to the oracle, hooks, graphs, masks."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from helpers import checks, low_latency
from helpers.calls import error_of
from helpers.cases import CASES, LOW_LATENCY_CASES, LowLatencyCase
from helpers.frames import CUPY, assign, down
from helpers.gpu import busy, need_gpu
from helpers.low_latency import BF16, BY_NAME, FP8, UE8M0
from helpers.low_latency import make_cuda_buffer as make_buffer
from helpers.nodes import nodes  # noqa: F401

from epcomm import Buffer
from epcomm.errors import BufferStateError, CapacityError, InputError, RoutingError
from epcomm.kernels import low_latency_dispatch
from epcomm.layout import NUM_SLOTS
from epcomm.testing import assert_bitwise, uniform_routing

cupy = need_gpu()
pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3, 5, 8)
all_cases = pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.name)


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
    "100_tokens_ue8m0": LowLatencyCase("100 tokens UE8M0", tokens=(97, 100, 3), max_tokens=100, cast=UE8M0.cast),
    "300_experts": LowLatencyCase("300 experts", tokens=(70, 0, 33), max_tokens=300, hidden=8, experts_per_rank=300),
    # So many choices of so many experts, on 3 ranks, that they are looked at in chunks.
    "chunks": LowLatencyCase(
        "chunks", tokens=(165, 0, 161), max_tokens=165, hidden=8, num_topk=8, experts_per_rank=680
    ),
}


@pytest.mark.ranks((1, 3))
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_sizes(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


def test_the_chunks_are_some():
    assert low_latency_dispatch.num_words(165, 680, 3, 8) == 5 < -(-165 // 32)


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
def test_larger_combine_buffers_while_a_combine_is_under_way(comm):
    """Its receive half pulls from those that its send half told the peers of."""
    small, large = BF16.inputs(comm.size), WIDE["7176_channels"].inputs(comm.size)
    with make_buffer(comm) as buffer:
        results = [checks.low_latency_dispatch(buffer, inputs) for inputs in (small, large)]
        rows = buffer.get_next_low_latency_combine_buffer(results[0].handle)
        assign(rows, CUPY.up(small.outputs[comm.rank]))
        combined = checks.low_latency_combine(buffer, small, results[0], x=rows, zero_copy=True, return_recv_hook=True)
        larger = buffer.get_next_low_latency_combine_buffer(results[1].handle)
        assert larger.nbytes > rows.nbytes
        combined.hook()
        assert_bitwise(down(combined.combined_x), small.combined()[comm.rank])


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
    with make_buffer(comm, 640 << 10) as buffer:
        error = error_of(lambda: checks.low_latency_dispatch(buffer, inputs))
        assert type(error) is CapacityError, repr(error)
        assert "num_rdma_bytes: got 655360 bytes; wanted at least" in str(error)
        CUPY.synchronize()
        error_of(buffer.check)
        checks.low_latency_round_trip(buffer, small.inputs(comm.size))
        many = LowLatencyCase("choices", tokens=(2,), max_tokens=2, hidden=2560, num_topk=32, experts_per_rank=16)
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


@pytest.mark.ranks(3)
@pytest.mark.parametrize("combine", low_latency.COMBINES, ids=str)
def test_other_choices_than_those_of_the_dispatch(buffer, comm, combine):
    """The rank that has them hears of it from `check`; nobody waits for ever, and the others have their sums."""
    inputs = replace(BY_NAME["full"], combine=combine).inputs(comm.size)
    topk_idx = inputs.topk_idx[comm.rank].copy()
    if comm.rank == 1:
        topk_idx[:, [0, -1]] = topk_idx[:, [-1, 0]]
    for is_pulled in (False, not combine):
        result = checks.low_latency_dispatch(buffer, inputs)
        rows = CUPY.up(inputs.outputs[comm.rank])
        if is_pulled:
            rows, outputs = buffer.get_next_low_latency_combine_buffer(result.handle), rows
            assign(rows, outputs)
        combined = checks.low_latency_combine(
            buffer, inputs, result, x=rows, topk_idx=CUPY.up(topk_idx), zero_copy=is_pulled
        )
        CUPY.synchronize()
        if comm.rank == 1:
            assert type(error_of(buffer.check)) is RoutingError
        else:
            checks.assert_low_latency_combined(buffer, inputs, combined.combined_x)
        buffer.check()
    checks.low_latency_round_trip(buffer, inputs)


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
