"""Low-latency calls of which something is wrong: nothing hangs, nothing is touched, and the Buffer goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import checks, low_latency
from helpers.calls import error_of
from helpers.frames import CUPY, assign, down
from helpers.gpu import need_gpu
from helpers.low_latency import BF16, BY_NAME, PRE_REDUCE, UE8M0
from helpers.low_latency import make_cuda_buffer as make_buffer
from helpers.nodes import nodes  # noqa: F401

from epcomm.backends.cuda.turn import CudaTurn
from epcomm.errors import HandleError, InputError, PeerError, PeerTimeout, RankMismatch, RoutingError
from epcomm.layout import NUM_SLOTS

cupy = need_gpu()
pytestmark = pytest.mark.gpu

FULL = BY_NAME["full"]


def settled(buffer):
    """What `check` says when all that was launched is through."""
    CUPY.synchronize()
    return error_of(buffer.check)


def goes_on(comm, buffer):
    """Nothing is left of what went wrong."""
    CUPY.synchronize()
    error_of(buffer.check)
    comm.barrier()
    for seed in range(NUM_SLOTS + 1):
        checks.low_latency_round_trip(buffer, FULL.inputs(comm.size, seed))
    buffer.check()
    comm.barrier()


@pytest.fixture
def dirty_memory(monkeypatch):
    """New outputs hold large numbers."""
    new_block = CudaTurn._new_block

    def filled(turn, num_bytes):
        block = new_block(turn, num_bytes)
        turn._job.runtime.memsetAsync(block.ptr, 0x01, num_bytes, turn.stream)
        return block

    monkeypatch.setattr(CudaTurn, "_new_block", filled)


# -- a dispatch that moved nothing, and a combine behind it -----------------------------------------------------------


@pytest.mark.ranks(3)
@pytest.mark.parametrize("combine", low_latency.COMBINES, ids=str)
@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "in_halves"])
def test_rejected_dispatch(comm, dirty_memory, combine, is_split):
    """Rank 1 rejects both; the others hear of it from `check` only."""
    inputs = replace(FULL, combine=combine).inputs(comm.size)
    x, topk_idx = CUPY.up(inputs.x[comm.rank]), CUPY.up(inputs.topk_idx[comm.rank])
    with make_buffer(comm) as buffer:

        def dispatch(topk_idx):
            result = buffer.low_latency_dispatch(
                x, topk_idx, 16, inputs.num_experts, use_fp8=False, return_recv_hook=is_split
            )
            result.hook()
            return result

        good = dispatch(topk_idx)
        if comm.rank == 1:
            assert error_of(lambda: dispatch(topk_idx[:3])) is not None
            assert error_of(lambda: checks.low_latency_combine(buffer, inputs, good, x=x)) is not None
        else:
            void = dispatch(topk_idx)
            checks.low_latency_combine(buffer, inputs, void)
            assert type(settled(buffer)) is PeerError
            assert down(void.recv_count).tolist() == [0] * FULL.experts_per_rank
            assert (down(void.handle[0]) == -1).all()
            assert not down(void.handle[1]).any()
        goes_on(comm, buffer)


@pytest.mark.ranks(2)
def test_mismatch_and_a_combine(comm, dirty_memory):
    inputs = UE8M0.inputs(comm.size)
    x, topk_idx = CUPY.up(inputs.x[comm.rank]), CUPY.up(inputs.topk_idx[comm.rank])
    with make_buffer(comm) as buffer:
        result = buffer.low_latency_dispatch(x, topk_idx, 16, inputs.num_experts, round_scale=comm.rank == 0)
        rows = buffer.get_next_low_latency_combine_buffer(result.handle)
        checks.low_latency_combine(buffer, inputs, result, x=rows, zero_copy=True)
        checks.low_latency_combine(buffer, inputs, result)
        assert type(settled(buffer)) is RankMismatch
        goes_on(comm, buffer)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("enable_shrink", [False, True])
def test_mismatch_beside_a_masked_rank(comm, enable_shrink):
    inputs = UE8M0.inputs(comm.size)
    x, topk_idx = CUPY.up(inputs.x[comm.rank]), CUPY.up(inputs.topk_idx[comm.rank])
    with make_buffer(comm, enable_shrink=enable_shrink) as buffer:
        if comm.rank != 2:
            buffer.low_latency_update_mask_buffer(2, True)
            buffer.low_latency_dispatch(x, topk_idx, 16, inputs.num_experts, round_scale=comm.rank == 0)
            error = settled(buffer)
            assert type(error) is RankMismatch
            assert "round_scale" in str(error)
        comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        goes_on(comm, buffer)


# -- handles and buffers that are not those of the call ---------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("enable_shrink", [False, True])
@pytest.mark.parametrize("combine", low_latency.COMBINES, ids=str)
def test_handles_of_different_dispatches(comm, combine, enable_shrink):
    """Of the same sizes, and with weights that lie elsewhere."""
    cases = replace(FULL, combine=combine), replace(FULL, combine=combine, max_tokens=20)
    with make_buffer(comm, enable_shrink=enable_shrink) as buffer:
        for second in cases:
            inputs = [cases[0].inputs(comm.size), second.inputs(comm.size)]
            results = [checks.low_latency_dispatch(buffer, mine) for mine in inputs]
            checks.low_latency_combine(buffer, inputs[comm.rank], results[comm.rank])
            error = settled(buffer)
            assert type(error) is RankMismatch
            assert "handle of dispatch" in str(error)
            goes_on(comm, buffer)
        assert low_latency.query(buffer) == [0, 0]


@pytest.mark.ranks(2)
def test_handle_before_its_rows_are_received(comm):
    inputs = FULL.inputs(comm.size)
    with make_buffer(comm) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs, return_recv_hook=True)
        with pytest.raises(HandleError, match="call the hook of its dispatch first"):
            checks.low_latency_combine(buffer, inputs, result)
        with pytest.raises(HandleError, match="call the hook of its dispatch first"):
            buffer.get_next_low_latency_combine_buffer(result.handle)
        result.hook()
        checks.assert_low_latency_combined(
            buffer, inputs, checks.low_latency_combine(buffer, inputs, result).combined_x
        )
        goes_on(comm, buffer)


@pytest.mark.ranks(2)
def test_what_is_from_before_the_masks_were_cleaned(comm):
    inputs = FULL.inputs(comm.size)
    with make_buffer(comm) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        checks.low_latency_combine(buffer, inputs, result)  # the next slot is another than after a new start
        rows = buffer.get_next_low_latency_combine_buffer(result.handle)
        buffer.low_latency_clean_mask_buffer()
        with pytest.raises(HandleError, match="before masked ranks were brought back"):
            checks.low_latency_combine(buffer, inputs, result)
        result = checks.low_latency_dispatch(buffer, inputs)
        with pytest.raises(InputError, match="zero_copy"):
            checks.low_latency_combine(buffer, inputs, result, x=rows, zero_copy=True)
        goes_on(comm, buffer)


@pytest.mark.ranks(2)
def test_choices_that_the_dispatch_did_not_have(comm):
    inputs = FULL.inputs(comm.size)
    fewer = inputs.topk_idx[comm.rank].copy()
    fewer[:, 0] = -1
    x, topk_idx = CUPY.up(inputs.x[comm.rank]), CUPY.up(fewer)
    with make_buffer(comm) as buffer:
        result = buffer.low_latency_dispatch(x, topk_idx, 16, inputs.num_experts, use_fp8=False)
        checks.low_latency_combine(buffer, inputs, result)
        assert type(settled(buffer)) is RoutingError
        goes_on(comm, buffer)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("enable_shrink", [False, True])
def test_all_ranks_or_none_have_a_hook_for_a_combine(comm, enable_shrink):
    inputs = PRE_REDUCE["full"].inputs(comm.size)
    with make_buffer(comm, enable_shrink=enable_shrink) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        checks.low_latency_combine(buffer, inputs, result, return_recv_hook=comm.rank == 0).hook()
        error = settled(buffer)
        assert type(error) is RankMismatch
        assert "return_recv_hook" in str(error)
        goes_on(comm, buffer)


@pytest.mark.ranks(2)
def test_rejection_under_capture(comm):
    inputs = BF16.inputs(comm.size)
    x, topk_idx = CUPY.up(inputs.x[comm.rank]), CUPY.up(inputs.topk_idx[comm.rank])
    stream = cupy.cuda.Stream(non_blocking=True)
    with make_buffer(comm) as buffer:
        checks.low_latency_round_trip(buffer, inputs)
        with stream:
            stream.begin_capture()
            mine = topk_idx[:1] if comm.rank == 1 else topk_idx
            error = error_of(lambda: buffer.low_latency_dispatch(x, mine, 16, inputs.num_experts, use_fp8=False))
            stream.end_capture()
        assert (error is not None) == (comm.rank == 1)
        goes_on(comm, buffer)


@pytest.mark.ranks(2)
def test_next_combine_buffer_after_hooks_in_reverse(comm):
    """It is free although the other rank makes no further call."""
    inputs = FULL.inputs(comm.size)
    with make_buffer(comm) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        combines = []
        for _ in range(NUM_SLOTS):
            rows = buffer.get_next_low_latency_combine_buffer(result.handle)
            assign(rows, CUPY.up(inputs.outputs[comm.rank]))
            combines.append(
                checks.low_latency_combine(buffer, inputs, result, x=rows, zero_copy=True, return_recv_hook=True)
            )
        for combined in reversed(combines):
            combined.hook()
        CUPY.synchronize()
        comm.barrier()
        if comm.rank == 0:
            buffer.get_next_low_latency_combine_buffer(result.handle)
            CUPY.synchronize()
            buffer.check()
        goes_on(comm, buffer)


# -- masked ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.ranks(3)
def test_a_masked_rank_that_is_ahead(comm):
    """It has made calls in slots whose turn it is for the others only later."""
    inputs, masks = FULL.inputs(comm.size), low_latency.masks_of(3, {0: {1, 2}, 1: {0}, 2: {0}})
    with make_buffer(comm, enable_shrink=True) as buffer:
        for rank in {0: (1, 2), 1: (0,), 2: (0,)}[comm.rank]:
            buffer.low_latency_update_mask_buffer(rank, True)
        comm.barrier()
        if comm.rank == 0:
            for _ in range(2 * NUM_SLOTS + 1):
                low_latency.masked_round_trip(buffer, inputs, masks)
        comm.barrier()
        if comm.rank != 0:
            low_latency.masked_round_trip(buffer, inputs, masks)
        buffer.check()
        comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        goes_on(comm, buffer)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("pulls", [False, True], ids=["pre_reduce", "zero_copy"])
def test_rank_that_stops_answering_before_a_combine(comm, pulls):
    inputs = (FULL if pulls else PRE_REDUCE["full"]).inputs(comm.size)
    masks = low_latency.masks_of(3, {0: {1}, 2: {1}})
    with make_buffer(comm, enable_shrink=True, timeout_s=2.0) as buffer:
        result = checks.low_latency_dispatch(buffer, inputs)
        options = {}
        if pulls:
            rows = buffer.get_next_low_latency_combine_buffer(result.handle)
            assign(rows, CUPY.up(inputs.outputs[comm.rank]))
            options = {"x": rows, "zero_copy": True}
        CUPY.synchronize()
        comm.barrier()
        if comm.rank != 1:
            combined = checks.low_latency_combine(buffer, inputs, result, **options)
            checks.assert_low_latency_combined(buffer, inputs, combined.combined_x, masks)
            buffer.check()
            assert low_latency.query(buffer) == [0, 1, 0]
        comm.barrier()
        buffer.low_latency_clean_mask_buffer()
        goes_on(comm, buffer)


@pytest.mark.ranks(3)
def test_a_masked_rank_that_gives_up(comm):
    """The others go on without it all the same."""
    inputs, masks = FULL.inputs(comm.size), low_latency.masks_of(3, {0: {2}, 1: {2}})
    with make_buffer(comm, enable_shrink=True, timeout_s=2.0) as buffer:
        if comm.rank != 2:
            low_latency.masked_round_trip(buffer, inputs, masks)
        comm.barrier()
        if comm.rank == 2:
            assert type(error_of(buffer.low_latency_clean_mask_buffer)) is PeerTimeout
        comm.barrier()
        if comm.rank != 2:
            for _ in range(NUM_SLOTS + 1):
                low_latency.masked_round_trip(buffer, inputs, masks)
            buffer.check()
        comm.barrier()
