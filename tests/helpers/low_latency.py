"""Bodies of low-latency tests, for either backend. Collective, all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import checks
from helpers.calls import TIMEOUT_S
from helpers.cases import LOGFMT_CASES, LOW_LATENCY_CASES, PRE_REDUCE_CASES, LowLatencyCase, LowLatencyInputs
from helpers.frames import assign, down, frames_of

from epcomm import Buffer
from epcomm.bootstrap import Communicator
from epcomm.errors import BufferStateError, RingFull
from epcomm.layout import NUM_SLOTS
from epcomm.testing import assert_bitwise

BY_NAME = {case.name: case for case in LOW_LATENCY_CASES}
BF16, FP8, UE8M0 = (BY_NAME[name] for name in ("bfloat16", "fp8", "fp8_ue8m0"))
COMBINES = ((), ("use_logfmt",), ("pre_reduce",))
LOGFMT = {case.name.removeprefix("use_logfmt_"): case for case in LOGFMT_CASES}
PRE_REDUCE = {case.name.removeprefix("pre_reduce_"): case for case in PRE_REDUCE_CASES}

combine_cases = pytest.mark.parametrize("case", [*LOGFMT_CASES, *PRE_REDUCE_CASES], ids=lambda case: case.name)
either_option = pytest.mark.parametrize("options", [LOGFMT, PRE_REDUCE], ids=["use_logfmt", "pre_reduce"])


def make_cuda_buffer(comm: Communicator | None = None, num_rdma_bytes: int = 16 << 20, **settings: Any) -> Buffer:
    """A Buffer in low-latency mode on a GPU."""
    settings = {"timeout_s": TIMEOUT_S, **settings}
    return Buffer(comm, 1 << 20, num_rdma_bytes, low_latency_mode=True, backend="cuda", **settings)


def random_case(
    draw: random.Random, num_ranks: int, seed: int, combines: tuple[tuple[str, ...], ...] = ((),)
) -> LowLatencyCase:
    """Tokens, maximum, hidden, experts, format and what `combines` has for combine change from call to call."""
    max_tokens = draw.choice((1, 4, 12))
    return LowLatencyCase(
        f"random shape {seed}",
        tokens=tuple(draw.randint(0, max_tokens) for _ in range(num_ranks)),
        max_tokens=max_tokens,
        hidden=128 * draw.randint(1, 3),
        experts_per_rank=draw.randint(1, 4),
        num_topk=draw.randint(1, 6),
        cast=draw.choice([case.cast for case in LOW_LATENCY_CASES]),
        combine=draw.choice(combines),
    )


def calls_of_changing_shape(
    buffer: Buffer,
    num_calls: int,
    before: Callable[[], None] = lambda: None,
    combines: tuple[tuple[str, ...], ...] = ((),),
) -> None:
    """Nothing is cleaned in between; `before` runs before every call, `combines` are options of combine."""
    draw, num_ranks = random.Random(23), buffer.group_size  # the same on every rank
    for seed in range(num_calls):
        inputs = random_case(draw, num_ranks, seed, combines).inputs(num_ranks, seed)
        before()
        result = checks.low_latency_dispatch(buffer, inputs)
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        if draw.random() < 0.7:  # so that dispatches and combines do not alternate
            before()
            combined = checks.low_latency_combine(buffer, inputs, result)
            checks.assert_low_latency_combined(buffer, inputs, combined.combined_x)


def odd_numbers_of_calls_between_the_modes(buffer: Buffer, throughput: Any) -> None:
    """`throughput`: inputs of a high-throughput dispatch."""
    inputs = FP8.inputs(buffer.group_size)
    for num_low_latency, num_throughput in ((1, 1), (3, 1), (1, 3), (2, 1)):
        for _ in range(num_low_latency):
            result = checks.low_latency_dispatch(buffer, inputs)
            checks.assert_low_latency_dispatched(buffer, inputs, result)
        for _ in range(num_throughput):
            _, received = checks.dispatch(buffer, throughput)
            checks.assert_dispatched(buffer, throughput, received)
        buffer.clean_low_latency_buffer(16, 256, 6)


def round_trips_in_flight(buffer: Buffer, inputs: list[LowLatencyInputs], order: tuple[int, int]) -> None:
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
        checks.assert_low_latency_combined(buffer, inputs[index], combines[index].combined_x, what=f"combine {index}")


def hook_runs_once_and_nothing_arrives_before(buffer: Buffer) -> None:
    inputs, frames = FP8.inputs(buffer.group_size), frames_of(buffer)
    stats = frames.up(np.zeros(FP8.experts_per_rank, np.int32))
    result = checks.low_latency_dispatch(
        buffer, inputs, return_recv_hook=True, cumulative_local_expert_recv_stats=stats
    )
    frames.synchronize()
    assert not down(stats).any()
    result.hook()
    want = inputs.dispatched()[buffer.rank].recv_count
    assert_bitwise(down(stats), want, "statistics")
    result.hook()
    assert_bitwise(down(stats), want, "statistics after a second call of the hook")
    checks.assert_low_latency_dispatched(buffer, inputs, result)


def outputs_stay_as_they_are(comm: Communicator, make_buffer: Callable[[Communicator], Buffer]) -> None:
    inputs = FP8.inputs(comm.size)
    with make_buffer(comm) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        combined = checks.low_latency_combine(buffer, inputs, result)
        for seed in range(1, 2 + NUM_SLOTS):
            checks.low_latency_round_trip(buffer, FP8.inputs(comm.size, seed))
        checks.assert_low_latency_dispatched(buffer, inputs, result)
        comm.barrier()
    checks.assert_low_latency_dispatched(buffer, inputs, result)
    assert_bitwise(down(combined.combined_x), inputs.combined()[comm.rank])


def zero_copy(buffer: Buffer, inputs: LowLatencyInputs) -> None:
    """The experts write where the peers read, with two combines in flight."""
    result = checks.low_latency_dispatch(buffer, inputs)
    outputs = frames_of(buffer).up(inputs.outputs[buffer.rank])
    for _ in range(NUM_SLOTS + 1):
        combines = []
        for _ in range(NUM_SLOTS):
            rows = buffer.get_next_low_latency_combine_buffer(result.handle)
            assert rows.shape == outputs.shape
            assign(rows, outputs)
            before = buffer.stats
            combines.append(
                checks.low_latency_combine(buffer, inputs, result, x=rows, zero_copy=True, return_recv_hook=True)
            )
            if buffer.backend == "host" and not inputs.case.combine:
                assert buffer.stats["bytes_copied_to_windows"] == before["bytes_copied_to_windows"]
        with pytest.raises(RingFull):
            buffer.get_next_low_latency_combine_buffer(result.handle)
        for combined in combines:
            combined.hook()
            checks.assert_low_latency_combined(buffer, inputs, combined.combined_x)


def out_and_statistics(buffer: Buffer) -> None:
    inputs, up = BF16.inputs(buffer.group_size), frames_of(buffer).up
    counts = up(np.full(BF16.experts_per_rank, 7, np.int32))
    waits = [up(np.full(buffer.group_size, 5, np.int64)) for _ in range(2)]
    empty = up(np.zeros_like(inputs.x[buffer.rank]))
    out = up(np.zeros_like(inputs.x[buffer.rank]))
    for _ in range(3):
        before = down(tuple(waits))
        result = checks.low_latency_dispatch(
            buffer, inputs, cumulative_local_expert_recv_stats=counts, dispatch_wait_recv_cost_stats=waits[0]
        )
        combined = checks.low_latency_combine(buffer, inputs, result, out=out, combine_wait_recv_cost_stats=waits[1])
        assert combined.combined_x is out
        assert_bitwise(down(out), inputs.combined()[buffer.rank])
        assert all((now >= then).all() for now, then in zip(down(tuple(waits)), before, strict=True))
        assign(out, empty)
    assert_bitwise(down(counts), 7 + 3 * inputs.dispatched()[buffer.rank].recv_count)


# -- masks ------------------------------------------------------------------------------------------------------------


def masks_of(comm_size: int, ignored: dict[int, set[int]]) -> list[np.ndarray[Any, Any]]:
    """The oracle's masks from ``{rank: ranks that it ignores}``."""
    return [np.isin(np.arange(comm_size), list(ignored.get(rank, ()))) for rank in range(comm_size)]


def query(buffer: Buffer) -> list[int]:
    status = frames_of(buffer).up(np.full(buffer.group_size, -1, np.int32))
    buffer.low_latency_query_mask_buffer(status)
    return down(status).tolist()  # type: ignore[no-any-return]


def masked_round_trip(buffer: Buffer, inputs: LowLatencyInputs, masks: list[Any]) -> None:
    result = checks.low_latency_dispatch(buffer, inputs)
    checks.assert_low_latency_dispatched(buffer, inputs, result, masks)
    combined = checks.low_latency_combine(buffer, inputs, result)
    checks.assert_low_latency_combined(buffer, inputs, combined.combined_x, masks, masks)


IGNORED = {
    "two_ignore_one": {0: {2}, 1: {2}},
    "two_ignore_each_other": {0: {1}, 1: {0}},
    "one_ignores_one": {1: {2}},
}


def masks_that_the_user_sets(
    comm: Communicator,
    buffer: Buffer,
    ignored: dict[int, set[int]],
    cases: tuple[LowLatencyCase, ...] = (BF16, FP8, BF16),
) -> None:
    """Nothing travels between two ranks when either ignores the other, whether the other knows it or not."""
    masks = masks_of(comm.size, ignored)
    for seed, case in enumerate(cases):
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


def mask_set_between_dispatch_and_combine(comm: Communicator, buffer: Buffer, case: LowLatencyCase = BF16) -> None:
    inputs, masks = case.inputs(comm.size), masks_of(comm.size, {0: {1}, 1: {0}})
    result = checks.low_latency_dispatch(buffer, inputs)
    frames_of(buffer).synchronize()
    comm.barrier()
    if comm.rank < 2:
        buffer.low_latency_update_mask_buffer(1 - comm.rank, True)
    combined = checks.low_latency_combine(buffer, inputs, result)
    checks.assert_low_latency_combined(buffer, inputs, combined.combined_x, masks)
    comm.barrier()
    buffer.low_latency_clean_mask_buffer()
    for _ in range(NUM_SLOTS + 1):
        checks.low_latency_round_trip(buffer, inputs)


def one_rank_is_brought_back(comm: Communicator, buffer: Buffer) -> None:
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
        buffer.low_latency_update_mask_buffer(rank if rank != comm.rank else 1, False)
    assert query(buffer) == [0, 0, 0]
    checks.low_latency_round_trip(buffer, inputs)


def hook_from_before_the_masks_were_cleaned(buffer: Buffer) -> None:
    """Cleaning starts both rings anew; what was under way then is forgotten, and its hook says so."""
    inputs = BF16.inputs(buffer.group_size)
    result = checks.low_latency_dispatch(buffer, inputs, return_recv_hook=True)
    buffer.low_latency_clean_mask_buffer()
    with pytest.raises(BufferStateError, match="hook"):
        result.hook()
    checks.low_latency_round_trip(buffer, inputs)


def rank_that_stops_answering(comm: Communicator, buffer: Buffer, lost: int) -> None:
    """The others finish without its rows and go on; it comes back with low_latency_clean_mask_buffer."""
    masks = masks_of(comm.size, {rank: {lost} for rank in range(comm.size) if rank != lost})
    for seed in range(NUM_SLOTS + 1):
        checks.low_latency_round_trip(buffer, FP8.inputs(comm.size, seed))
    comm.barrier()
    if comm.rank != lost:
        # The second is wider.
        for case in (BF16, BY_NAME["full"], UE8M0, BF16):
            masked_round_trip(buffer, case.inputs(comm.size), masks)
        assert query(buffer) == masks[comm.rank].astype(int).tolist()
    comm.barrier()
    buffer.low_latency_clean_mask_buffer()
    assert query(buffer) == [0, 0, 0]
    for seed in range(2 * NUM_SLOTS + 1):
        checks.low_latency_round_trip(buffer, BY_NAME["full"].inputs(comm.size, seed))
    comm.barrier()


def combines_of_several_kinds_in_flight(comm: Communicator, buffer: Buffer) -> None:
    pairs = (LOGFMT["bfloat16"], BF16), (BY_NAME["full"], PRE_REDUCE["full"]), (PRE_REDUCE["fp8"], LOGFMT["full"])
    for first, second in pairs:
        inputs = [first.inputs(comm.size), second.inputs(comm.size, 1)]
        round_trips_in_flight(buffer, inputs, (comm.rank % 2, 1 - comm.rank % 2))


def rank_that_stops_answering_between_dispatch_and_combine(
    comm: Communicator, buffer: Buffer, case: LowLatencyCase = BF16
) -> None:
    inputs = case.inputs(comm.size)
    masks = masks_of(comm.size, {0: {1}, 2: {1}})
    result = checks.low_latency_dispatch(buffer, inputs)
    frames_of(buffer).synchronize()
    comm.barrier()
    if comm.rank != 1:
        combined = checks.low_latency_combine(buffer, inputs, result)
        checks.assert_low_latency_combined(buffer, inputs, combined.combined_x, masks)
    comm.barrier()
    buffer.low_latency_clean_mask_buffer()
    checks.low_latency_round_trip(buffer, inputs)
    comm.barrier()
