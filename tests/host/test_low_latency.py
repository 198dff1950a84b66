"""Low-latency dispatch and combine on MPI ranks: every case bitwise equal to the oracle, hooks, masks, lost ranks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from helpers import checks
from helpers.cases import CASES, LOW_LATENCY_CASES, LowLatencyCase, LowLatencyInputs

from epcomm import Buffer
from epcomm.bootstrap import topology
from epcomm.errors import BufferStateError, CapacityError, PeerError, RingFull, UnsupportedOption
from epcomm.layout import NUM_SLOTS
from epcomm.testing import assert_bitwise

SIZES, MORE_SIZES = (3,), (1, 2, 4, 8)
BY_NAME = {case.name: case for case in LOW_LATENCY_CASES}
BF16, FP8, UE8M0 = (BY_NAME[name] for name in ("bfloat16", "fp8", "fp8_ue8m0"))

all_cases = pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def buffer():
    """One Buffer for all cases of a job: each finds what the ones before it have left behind."""
    with Buffer(low_latency_mode=True) as shared:
        yield shared


@pytest.mark.ranks(SIZES)
@all_cases
def test_case(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.slow
@pytest.mark.ranks(MORE_SIZES)
@all_cases
def test_case_on_more_ranks(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.slow
@pytest.mark.ranks(3)
@pytest.mark.parametrize("case", [BF16, UE8M0, BY_NAME["zero_tokens_everywhere"]], ids=lambda case: case.name)
@pytest.mark.parametrize("hosts", ["one", "two"])
def test_case_by_messages(comm, case, hosts, monkeypatch):
    if hosts == "one":
        monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", "messages")
    else:
        monkeypatch.setattr(topology, "host_identity", lambda: f"host {comm.rank // 2}")
    inputs = case.inputs(comm.size)
    with Buffer(comm, low_latency_mode=True, ranks_per_node=3) as buffer:
        checks.low_latency_round_trip(buffer, inputs)
        result = checks.low_latency_dispatch(buffer, inputs, return_recv_hook=True)
        result.hook()
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        rows = buffer.get_next_low_latency_combine_buffer(result.handle)
        rows[...] = inputs.outputs[comm.rank]
        combined = checks.low_latency_combine(buffer, inputs, result, x=rows, zero_copy=True)
        assert_bitwise(combined.combined_x, inputs.combined()[comm.rank])
        with pytest.raises(UnsupportedOption, match="share no memory"):
            buffer.low_latency_update_mask_buffer((comm.rank + 1) % comm.size, True)


@pytest.mark.slow
@pytest.mark.ranks(SIZES)
def test_hundred_calls_of_changing_shape(buffer, num_ranks):
    """Tokens, maximum, hidden, experts, format and mode change from call to call; nothing is cleaned in between."""
    draw = random.Random(23)  # the same on every rank
    formats = [case.cast for case in LOW_LATENCY_CASES]
    for seed in range(100):
        max_tokens = draw.choice((1, 4, 12))
        case = LowLatencyCase(
            f"random shape {seed}",
            tokens=tuple(draw.randint(0, max_tokens) for _ in range(num_ranks)),
            max_tokens=max_tokens,
            hidden=128 * draw.randint(1, 3),
            experts_per_rank=draw.randint(1, 4),
            num_topk=draw.randint(1, 6),
            cast=draw.choice(formats),
        )
        inputs = case.inputs(num_ranks, seed)
        result = checks.low_latency_dispatch(buffer, inputs)
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        if draw.random() < 0.7:  # so that dispatches and combines do not alternate
            combined = checks.low_latency_combine(buffer, inputs, result)
            assert_bitwise(combined.combined_x, inputs.combined()[buffer.rank], "combined_x")


@pytest.mark.ranks(3)
def test_odd_numbers_of_calls_between_the_modes(buffer, comm):
    throughput = CASES[0].inputs(comm.size)
    for num_low_latency, num_throughput in ((1, 1), (3, 1), (1, 3), (2, 1)):
        for _ in range(num_low_latency):
            result = checks.low_latency_dispatch(buffer, FP8.inputs(comm.size))
            checks.assert_low_latency_dispatched(buffer, FP8.inputs(comm.size), result)
        for _ in range(num_throughput):
            _, received = checks.dispatch(buffer, throughput)
            checks.assert_dispatched(buffer, throughput, received)
        buffer.clean_low_latency_buffer(16, 256, 6)


def round_trips_in_flight(buffer: Buffer, inputs: list[LowLatencyInputs], order: tuple[int, int], **options: Any):
    """Two dispatches, then two combines, whose receive halves run in `order`."""
    results = [checks.low_latency_dispatch(buffer, mine, return_recv_hook=True) for mine in inputs]
    with pytest.raises(RingFull, match="low_latency_dispatch"):
        checks.low_latency_dispatch(buffer, inputs[0], return_recv_hook=True)
    for index in order:
        results[index].hook()
        checks.assert_low_latency_dispatched(buffer, inputs[index], results[index])
    combines = [
        checks.low_latency_combine(buffer, mine, result, return_recv_hook=True)
        for mine, result in zip(inputs, results, strict=True)
    ]
    with pytest.raises(RingFull, match="low_latency_combine"):
        checks.low_latency_combine(buffer, inputs[0], results[0], return_recv_hook=True)
    for index in order:
        combines[index].hook()
        assert_bitwise(combines[index].combined_x, inputs[index].combined()[buffer.rank], f"combine {index}")


@pytest.mark.ranks(SIZES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in_order", "out_of_order"])
def test_hooks(buffer, num_ranks, order):
    inputs = [FP8.inputs(num_ranks), BY_NAME["full"].inputs(num_ranks)]
    for _ in range(NUM_SLOTS + 1):
        round_trips_in_flight(buffer, inputs, order)


@pytest.mark.ranks(3)
def test_hooks_in_another_order_on_every_rank(buffer, comm):
    inputs = [UE8M0.inputs(comm.size), BF16.inputs(comm.size)]
    for _ in range(NUM_SLOTS + 1):
        round_trips_in_flight(buffer, inputs, (comm.rank % 2, 1 - comm.rank % 2))


@pytest.mark.ranks(3)
def test_hook_runs_once_and_nothing_arrives_before(buffer, comm):
    inputs = FP8.inputs(comm.size)
    stats = np.zeros(FP8.experts_per_rank, np.int32)
    result = checks.low_latency_dispatch(
        buffer, inputs, return_recv_hook=True, cumulative_local_expert_recv_stats=stats
    )
    assert not stats.any()
    result.hook()
    want = inputs.dispatched()[comm.rank].recv_count
    assert_bitwise(stats, want, "statistics")
    result.hook()
    assert_bitwise(stats, want, "statistics after a second call of the hook")
    checks.assert_low_latency_dispatched(buffer, inputs, result)


@pytest.mark.ranks(3)
def test_outputs_stay_as_they_are(comm):
    inputs = FP8.inputs(comm.size)
    with Buffer(comm, low_latency_mode=True) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        combined = checks.low_latency_combine(buffer, inputs, result)
        for seed in range(1, 2 + NUM_SLOTS):
            checks.low_latency_round_trip(buffer, FP8.inputs(comm.size, seed))
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        comm.barrier()
    checks.assert_low_latency_dispatched(buffer, inputs, result)
    assert_bitwise(combined.combined_x, inputs.combined()[comm.rank])


@pytest.mark.ranks(SIZES)
def test_zero_copy(buffer, comm):
    """The experts write where the peers read, with two combines in flight."""
    inputs = BY_NAME["full"].inputs(comm.size)
    result = checks.low_latency_dispatch(buffer, inputs)
    for _ in range(NUM_SLOTS + 1):
        combines, before = [], 0
        for _ in range(NUM_SLOTS):
            rows = buffer.get_next_low_latency_combine_buffer(result.handle)
            assert rows.shape == inputs.outputs[comm.rank].shape
            rows[...] = inputs.outputs[comm.rank]
            before = buffer.stats["bytes_copied_to_windows"]
            combines.append(
                checks.low_latency_combine(buffer, inputs, result, x=rows, zero_copy=True, return_recv_hook=True)
            )
            assert buffer.stats["bytes_copied_to_windows"] == before
        with pytest.raises(RingFull):
            buffer.get_next_low_latency_combine_buffer(result.handle)
        for combined in combines:
            combined.hook()
            assert_bitwise(combined.combined_x, inputs.combined()[comm.rank])


@pytest.mark.ranks(3)
def test_out_and_statistics(buffer, comm):
    inputs = BF16.inputs(comm.size)
    counts, waits = np.full(BF16.experts_per_rank, 7, np.int32), np.full((2, comm.size), 5, np.int64)
    out = np.zeros_like(inputs.x[comm.rank])
    for _ in range(3):
        result = checks.low_latency_dispatch(
            buffer, inputs, cumulative_local_expert_recv_stats=counts, dispatch_wait_recv_cost_stats=waits[0]
        )
        before = waits.copy()
        combined = checks.low_latency_combine(buffer, inputs, result, out=out, combine_wait_recv_cost_stats=waits[1])
        assert combined.combined_x is out
        assert_bitwise(out, inputs.combined()[comm.rank])
        assert (waits >= before).all()
        out[...] = 0
    assert_bitwise(counts, 7 + 3 * inputs.dispatched()[comm.rank].recv_count)
    assert (waits >= 5).all()


@pytest.mark.ranks(3)
def test_too_many_tokens_on_one_rank(buffer, comm):
    inputs = BF16.inputs(comm.size)
    most = max(len(x) for x in inputs.x)
    is_guilty = len(inputs.x[comm.rank]) == most
    with pytest.raises(CapacityError if is_guilty else PeerError, match="num_max_dispatch_tokens_per_rank"):
        buffer.low_latency_dispatch(inputs.x[comm.rank], inputs.topk_idx[comm.rank], most - 1, inputs.num_experts)
    checks.low_latency_round_trip(buffer, inputs)


# -- masks -------------------------------------------------------------------------------------------------------------


def masks_of(comm_size: int, ignored: dict[int, set[int]]) -> list[np.ndarray[Any, Any]]:
    """The oracle's masks from ``{rank: ranks that it ignores}``."""
    return [np.isin(np.arange(comm_size), list(ignored.get(rank, ()))) for rank in range(comm_size)]


def query(buffer: Buffer) -> list[int]:
    status = np.full(buffer.group_size, -1, np.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def masked_round_trip(buffer: Buffer, inputs: LowLatencyInputs, masks: list[Any]) -> None:
    result = checks.low_latency_dispatch(buffer, inputs)
    checks.assert_low_latency_dispatched(buffer, inputs, result, masks)
    combined = checks.low_latency_combine(buffer, inputs, result)
    assert_bitwise(combined.combined_x, inputs.combined(masks, at_dispatch=masks)[buffer.rank], "combined_x")


@pytest.mark.ranks(3)
@pytest.mark.parametrize(
    "ignored",
    [{0: {2}, 1: {2}}, {0: {1}, 1: {0}}, {1: {2}}],
    ids=["two_ignore_one", "two_ignore_each_other", "one_ignores_one"],
)
def test_masks_that_the_user_sets(buffer, comm, ignored):
    """Nothing travels between two ranks when either ignores the other, whether the other knows it or not."""
    masks = masks_of(comm.size, ignored)
    for seed, case in enumerate((BF16, FP8, BF16)):
        inputs = case.inputs(comm.size, seed)
        for rank in ignored.get(comm.rank, ()):
            buffer.low_latency_update_mask_buffer(rank, True)
        assert query(buffer) == masks[comm.rank].astype(int).tolist()
        comm.barrier()
        masked_round_trip(buffer, inputs, masks)
        comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        assert query(buffer) == [0, 0, 0]
        for _ in range(NUM_SLOTS + 1):
            checks.low_latency_round_trip(buffer, inputs)


@pytest.mark.ranks(3)
def test_mask_set_between_dispatch_and_combine(buffer, comm):
    inputs, masks = BF16.inputs(comm.size), masks_of(comm.size, {0: {1}, 1: {0}})
    result = checks.low_latency_dispatch(buffer, inputs)
    comm.barrier()
    if comm.rank < 2:
        buffer.low_latency_update_mask_buffer(1 - comm.rank, True)
    combined = checks.low_latency_combine(buffer, inputs, result)
    assert_bitwise(combined.combined_x, inputs.combined(masks)[comm.rank], "combined_x")
    comm.barrier()
    buffer.low_latency_clean_mask_buffer()


@pytest.mark.ranks(3)
def test_one_rank_is_brought_back(buffer, comm):
    inputs = FP8.inputs(comm.size)
    if comm.rank != 1:
        buffer.low_latency_update_mask_buffer(1, True)
    comm.barrier()
    if comm.rank == 1:
        for rank in (0, 2):
            buffer.low_latency_update_mask_buffer(rank, True)
    masked_round_trip(buffer, inputs, masks_of(comm.size, {0: {1}, 2: {1}, 1: {0, 2}}))
    comm.barrier()
    for rank in (1, 0, 2):
        if rank != comm.rank:
            buffer.low_latency_update_mask_buffer(rank, False)
        else:
            buffer.low_latency_update_mask_buffer(1, False)
    assert query(buffer) == [0, 0, 0]
    checks.low_latency_round_trip(buffer, inputs)


@pytest.mark.slow
@pytest.mark.ranks(3)
@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("call", ["never", pytest.param("late", marks=pytest.mark.slow)])
def test_rank_that_stops_answering(comm, lost, call):
    """The others finish without its rows and go on; it comes back with low_latency_clean_mask_buffer.

    Before that it may even try to take part (late): it is told that it was left behind, and nobody else is disturbed.
    """
    masks = masks_of(comm.size, {rank: {lost} for rank in range(comm.size) if rank != lost})
    with Buffer(comm, low_latency_mode=True, enable_shrink=True, timeout_s=1.0) as buffer:
        for seed in range(NUM_SLOTS + 1):
            checks.low_latency_round_trip(buffer, FP8.inputs(comm.size, seed))
        comm.barrier()
        if comm.rank != lost:
            # The second is wider: windows grow while the rank is away.
            for case in (BF16, BY_NAME["full"], UE8M0, BF16):
                masked_round_trip(buffer, case.inputs(comm.size), masks)
            assert query(buffer) == masks[comm.rank].astype(int).tolist()
        comm.barrier()
        if call == "late":
            if comm.rank == lost:
                for _ in range(NUM_SLOTS):  # the others have made twice as many
                    with pytest.raises(BufferStateError, match="low_latency_clean_mask_buffer"):
                        checks.low_latency_dispatch(buffer, BF16.inputs(comm.size))
            comm.barrier()
            if comm.rank != lost:
                masked_round_trip(buffer, FP8.inputs(comm.size), masks)
            comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        assert query(buffer) == [0, 0, 0]
        for seed in range(2 * NUM_SLOTS + 1):
            checks.low_latency_round_trip(buffer, BY_NAME["full"].inputs(comm.size, seed))
        comm.barrier()


@pytest.mark.slow
@pytest.mark.ranks(3)
def test_rank_that_stops_answering_between_dispatch_and_combine(comm):
    inputs = BF16.inputs(comm.size)
    masks = masks_of(comm.size, {0: {1}, 2: {1}})
    with Buffer(comm, low_latency_mode=True, enable_shrink=True, timeout_s=1.0) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        comm.barrier()
        if comm.rank != 1:
            combined = checks.low_latency_combine(buffer, inputs, result)
            assert_bitwise(combined.combined_x, inputs.combined(masks)[comm.rank], "combined_x")
        comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        checks.low_latency_round_trip(buffer, inputs)
        comm.barrier()


@pytest.mark.ranks(3)
def test_hook_from_before_the_masks_were_cleaned(comm):
    """Cleaning starts both rings anew; what was under way then is forgotten, and its hook says so."""
    inputs = BF16.inputs(comm.size)
    with Buffer(comm, low_latency_mode=True) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs, return_recv_hook=True)
        buffer.low_latency_clean_mask_buffer()
        with pytest.raises(BufferStateError, match="hook"):
            result.hook()
        checks.low_latency_round_trip(buffer, inputs)
        comm.barrier()
