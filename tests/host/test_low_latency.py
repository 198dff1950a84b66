"""Low-latency dispatch and combine on MPI ranks: every case bitwise equal to the oracle, hooks, masks, lost ranks."""

from __future__ import annotations

import pytest
from helpers import checks, low_latency
from helpers.cases import CASES, LOW_LATENCY_CASES
from helpers.low_latency import (
    BF16,
    BY_NAME,
    COMBINES,
    FP8,
    LOGFMT,
    PRE_REDUCE,
    UE8M0,
    combine_cases,
    either_option,
    masked_round_trip,
    masks_of,
    query,
)

from epcomm import Buffer
from epcomm.bootstrap import topology
from epcomm.errors import BufferStateError, CapacityError, PeerError, UnsupportedOption
from epcomm.layout import NUM_SLOTS
from epcomm.testing import assert_bitwise

SIZES, MORE_SIZES = (3,), (1, 2, 4, 8)

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
    low_latency.calls_of_changing_shape(buffer, 100, combines=COMBINES)


@pytest.mark.ranks(3)
def test_odd_numbers_of_calls_between_the_modes(buffer, comm):
    low_latency.odd_numbers_of_calls_between_the_modes(buffer, CASES[0].inputs(comm.size))


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
def test_hook_runs_once_and_nothing_arrives_before(buffer, comm):
    low_latency.hook_runs_once_and_nothing_arrives_before(buffer)


@pytest.mark.ranks(3)
def test_outputs_stay_as_they_are(comm):
    low_latency.outputs_stay_as_they_are(comm, lambda comm: Buffer(comm, low_latency_mode=True))


@pytest.mark.ranks(SIZES)
def test_zero_copy(buffer, comm):
    low_latency.zero_copy(buffer, BY_NAME["full"].inputs(comm.size))


@pytest.mark.ranks(3)
def test_out_and_statistics(buffer, comm):
    low_latency.out_and_statistics(buffer)


@pytest.mark.ranks(3)
def test_too_many_tokens_on_one_rank(buffer, comm):
    inputs = BF16.inputs(comm.size)
    most = max(len(x) for x in inputs.x)
    is_guilty = len(inputs.x[comm.rank]) == most
    with pytest.raises(CapacityError if is_guilty else PeerError, match="num_max_dispatch_tokens_per_rank"):
        buffer.low_latency_dispatch(inputs.x[comm.rank], inputs.topk_idx[comm.rank], most - 1, inputs.num_experts)
    checks.low_latency_round_trip(buffer, inputs)


# -- options of combine ------------------------------------------------------------------------------------------------


@pytest.mark.ranks(SIZES)
@combine_cases
def test_combine_case(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.slow
@pytest.mark.ranks((1, 2, 5, 8))
@combine_cases
def test_combine_case_on_more_ranks(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks(3)
def test_combines_of_several_kinds_in_flight(buffer, comm):
    low_latency.combines_of_several_kinds_in_flight(comm, buffer)


@pytest.mark.ranks(3)
def test_zero_copy_with_logfmt(buffer, comm):
    low_latency.zero_copy(buffer, LOGFMT["full"].inputs(comm.size))


@pytest.mark.ranks(3)
@pytest.mark.parametrize("ignored", low_latency.IGNORED.values(), ids=low_latency.IGNORED)
def test_masks_and_options_of_combine(buffer, comm, ignored):
    low_latency.masks_that_the_user_sets(comm, buffer, ignored, (LOGFMT["bfloat16"], PRE_REDUCE["bfloat16"], BF16))


@pytest.mark.ranks(3)
@either_option
def test_mask_set_between_dispatch_and_combine_with_options(buffer, comm, options):
    low_latency.mask_set_between_dispatch_and_combine(comm, buffer, options["bfloat16"])


@pytest.mark.slow
@pytest.mark.ranks(3)
@either_option
@pytest.mark.parametrize("hosts", ["one", "two"])
def test_combine_options_by_messages(comm, options, hosts, monkeypatch):
    if hosts == "one":
        monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", "messages")
    else:
        monkeypatch.setattr(topology, "host_identity", lambda: f"host {comm.rank // 2}")
    with Buffer(comm, low_latency_mode=True, ranks_per_node=3) as buffer:
        for name in ("bfloat16", "zero_tokens_everywhere", "full"):
            checks.low_latency_round_trip(buffer, options[name].inputs(comm.size))
        comm.barrier()


def bytes_of_combine(buffer, inputs):
    """Bytes that travel from this rank in a combine, by message or in its window."""
    result = checks.low_latency_dispatch(buffer, inputs)
    before = buffer.stats
    combined = checks.low_latency_combine(buffer, inputs, result)
    after = buffer.stats
    checks.assert_low_latency_combined(buffer, inputs, combined.combined_x)
    return tuple(after[name] - before[name] for name in ("bytes_copied_to_windows", "bytes_sent_by_message"))


@pytest.mark.ranks(3)
@pytest.mark.parametrize("transport", ["segments", "messages"])
def test_logfmt_sends_164_bytes_for_128_channels(comm, transport, monkeypatch):
    monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", transport)
    plain, short = BY_NAME["fp8_ue8m0"].inputs(comm.size), LOGFMT["fp8_ue8m0"].inputs(comm.size)
    assert plain.case.hidden == 640
    received = plain.dispatched()[comm.rank]
    from_others = int(received.recv_count.sum() - (received.layout_range[:, comm.rank] & 0xFFFFFFFF).sum())
    with Buffer(comm, low_latency_mode=True) as buffer:
        for inputs, row_bytes in ((plain, 2 * 640), (short, 5 * 160 + 32)):
            if transport == "segments":  # what a rank sends to itself stays where it is
                assert bytes_of_combine(buffer, inputs) == (from_others * row_bytes, 0)
            else:
                assert bytes_of_combine(buffer, inputs) == (0, int(received.recv_count.sum()) * row_bytes)
        comm.barrier()


# -- masks -------------------------------------------------------------------------------------------------------------


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
    with Buffer(comm, low_latency_mode=True, enable_shrink=True, timeout_s=1.0) as buffer:
        low_latency.rank_that_stops_answering_between_dispatch_and_combine(comm, buffer)


@pytest.mark.ranks(3)
def test_hook_from_before_the_masks_were_cleaned(comm):
    with Buffer(comm, low_latency_mode=True) as buffer:
        low_latency.hook_from_before_the_masks_were_cleaned(buffer)
        comm.barrier()
