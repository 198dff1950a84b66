"""High-throughput dispatch and combine on a GPU: every case bitwise equal to the oracle, wherever the outputs lie."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from helpers import checks, internode
from helpers.calls import TIMEOUT_S
from helpers.cases import CASES, FP8, PLACING_CASES, Case, column_major_scales, row_major_scales, to_one_expert
from helpers.frames import CUPY, down
from helpers.gpu import need_gpu
from helpers.window import shrink_window

from epcomm import Buffer, Config, testing
from epcomm.testing import assert_bitwise, token_data

cupy = need_gpu()
pytestmark = pytest.mark.gpu

BY_NAME = {case.name: case for case in CASES}
UNIFORM = BY_NAME["uniform"]
ARENA_BYTES = 64 << 20

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
placing_cases = pytest.mark.parametrize("case", PLACING_CASES, ids=lambda case: case.name)


def fitting_sms(num_sms: int, num_ranks: int) -> int:
    """`num_sms`, or as many as every rank of this GPU can have."""
    return min(num_sms, cupy.cuda.Device().attributes["MultiProcessorCount"] // num_ranks)


def make_buffer(comm=None, num_nvl_bytes: int = ARENA_BYTES) -> Buffer:
    return Buffer(comm, num_nvl_bytes, backend="cuda", timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def buffer():
    """One Buffer for all cases of a job: each finds what the ones before it have left behind."""
    with make_buffer() as shared:
        yield shared
        assert shared.stats["dispatch_by_window"] == shared.stats["combine_by_window"] == 0


@pytest.fixture(scope="module")
def buffer_without_arena():
    with make_buffer(num_nvl_bytes=0) as shared:
        yield shared
        assert shared.stats["dispatch_in_arena"] == 0


@pytest.fixture(scope="module")
def buffer_with_little_room():
    """Some outputs fit, and others do not: of one rank, of one call, while earlier ones are held."""
    with make_buffer(num_nvl_bytes=4096) as shared:
        yield shared


@pytest.mark.ranks((1, 2, 3, 4, 5, 8))
@all_cases
def test_case(buffer, num_ranks, case):
    checks.round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks((1, 3, 8))
@placing_cases
def test_case_through_the_window(buffer_without_arena, num_ranks, case):
    checks.round_trip(buffer_without_arena, case.inputs(num_ranks))


@pytest.mark.ranks((1, 3, 8))
@placing_cases
def test_case_in_a_small_arena(buffer_with_little_room, num_ranks, case):
    checks.round_trip(buffer_with_little_room, case.inputs(num_ranks))


@pytest.mark.slow
@pytest.mark.ranks((2, 3, 5, 8))
@all_cases
def test_any_case_through_the_window(buffer_without_arena, buffer_with_little_room, num_ranks, case):
    for buffer in (buffer_without_arena, buffer_with_little_room):
        checks.round_trip(buffer, case.inputs(num_ranks))


# -- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.ranks((2, 5))
def test_one_buffer_for_many_shapes(comm, num_ranks):
    draw = random.Random(17)  # the same on every rank
    with make_buffer(comm) as spacious, make_buffer(comm, 16 << 10) as small:
        for seed in range(30):
            case = internode.random_case(draw, num_ranks, seed)
            checks.round_trip(draw.choice((spacious, small)), case.inputs(num_ranks, seed))
        for buffer in (spacious, small):
            assert buffer.stats["dispatch_calls"] > 0
        assert small.stats["dispatch_by_window"] > 0


# Bytes a row: odd multiples of 16, more than one piece (14336 bytes), and the sizes around that.
WIDE = {
    "48_bytes": Case("48 bytes", hidden=24, tokens=(9, 4, 7)),
    "528_bytes": Case("528 bytes", hidden=264, tokens=(9, 4, 7)),
    "14336_bytes": Case("14336 bytes", hidden=7168, tokens=(5, 2, 4)),
    "14352_bytes": Case("14352 bytes", hidden=7176, tokens=(5, 2, 4), num_biases=1),
    "7168_float32": Case(
        "7168 float32", hidden=7168, tokens=(5, 2, 4), dtype=np.dtype("f4"), combine_dtype=np.dtype("f4"), num_biases=2
    ),
    "hidden_20000": Case("hidden 20000", hidden=20000, tokens=(4, 1, 3)),
    "100000_bytes": Case("100000 bytes", hidden=100000, dtype=FP8, tokens=(3, 1, 2), scales=row_major_scales),
}


@pytest.mark.ranks((3, 8), slow=(8,))
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_rows_of_many_widths(buffer, buffer_without_arena, num_ranks, case):
    for one in (buffer, buffer_without_arena):
        checks.round_trip(one, case.inputs(num_ranks))


@pytest.mark.ranks(2)
def test_512_tokens_of_7168_channels(buffer):
    case = Case("512 tokens", tokens=(512, 509), hidden=7168, experts_per_rank=8, num_topk=8, num_biases=1)
    checks.round_trip(buffer, case.inputs(2))


@pytest.mark.ranks((2, 8))
def test_1024_experts_on_a_rank(buffer, num_ranks):
    case = Case("many experts", tokens=(70, 33), experts_per_rank=1024, num_topk=32, expert_alignment=8)
    checks.round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks((3, 8))
@pytest.mark.parametrize("num_sms", [1, 2, 7, 16])
def test_any_number_of_sms(buffer, buffer_without_arena, comm, num_ranks, num_sms):
    """As many blocks as are asked for, ranks may differ, and nobody waits for a block that is not there."""
    default = Buffer.get_dispatch_config(num_ranks)
    own = Config(max(1, fitting_sms(num_sms, num_ranks) - comm.rank % 3), *default.values()[1:])
    inputs = Case("sms", tokens=(90, 0, 33), hidden=520, num_biases=1).inputs(num_ranks)
    for one in (buffer, buffer_without_arena):
        _, result = checks.dispatch(one, inputs, config=own)
        checks.assert_dispatched(one, inputs, result)
        checks.assert_combined(one, inputs, checks.combine(one, inputs, result, 1, True, config=own), 1, True)


# -- the window ---------------------------------------------------------------------------------------------------

ROUNDS = {
    "even": Case("even", tokens=(600,), num_biases=1),
    "uneven": Case("uneven", tokens=(600, 0, 130, 1), routing=testing.zipf_routing, hidden=72),
    "scales": Case("scales", tokens=(600, 301), dtype=FP8, hidden=128, scales=column_major_scales),
    "to_one_rank": Case("to one rank", tokens=(200, 150), routing=to_one_expert, has_weights=False),
    "worst": Case("worst", tokens=(300, 150), worst="overflow", hidden=136, num_biases=2),
}


@pytest.mark.ranks((1, 3, 8))
@pytest.mark.parametrize("num_sms", [1, 16])
def test_many_rounds(comm, num_ranks, num_sms, monkeypatch):
    """A window of 20 to 100 rows for each peer, twice; outputs of all ranks, or of some, go through it."""
    shrink_window(monkeypatch, 32768 * num_ranks)
    default = Buffer.get_dispatch_config(num_ranks)
    config = Config(fitting_sms(num_sms, num_ranks), *default.values()[1:])
    for num_nvl_bytes in (0, 64 << 10):
        with make_buffer(comm, num_nvl_bytes) as buffer:
            for case in ROUNDS.values():
                inputs = case.inputs(num_ranks)
                _, result = checks.dispatch(buffer, inputs, config=config)
                checks.assert_dispatched(buffer, inputs, result)
                checks.check_overflow(buffer, inputs)
                combined = checks.combine(buffer, inputs, result, case.num_biases, True, config=config)
                checks.assert_combined(buffer, inputs, combined, case.num_biases, True)
                checks.round_trip(buffer, inputs)
            assert buffer.stats["dispatch_by_window"] > 0


@pytest.mark.ranks((3, 8))
def test_outputs_of_one_rank_do_not_fit(comm, num_ranks):
    """Rank 0 receives everything, more than its arena holds; the others, which receive nothing, do not need theirs."""
    inputs = Case("to rank 0", tokens=(40, 41), routing=to_one_expert, num_biases=1).inputs(num_ranks)
    with make_buffer(comm, 8192) as buffer:
        for _ in range(3):
            _, result = checks.dispatch(buffer, inputs)
            checks.assert_dispatched(buffer, inputs, result)
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, 1), 1)
        assert buffer.stats["dispatch_by_window"] == (3 if comm.rank == 0 else 0)
        assert buffer.stats["dispatch_in_arena"] == (0 if comm.rank == 0 else 3)


@pytest.mark.ranks(3)
def test_no_room_is_said_once(comm, recwarn):
    inputs = UNIFORM.inputs(comm.size)
    with make_buffer(comm, 0) as buffer:
        for _ in range(3):
            checks.dispatch(buffer, inputs)
        checks.combine(buffer, inputs, checks.dispatch(buffer, inputs)[1])
        warnings = [str(warning.message) for warning in recwarn if "no room in the arena" in str(warning.message)]
        assert len(warnings) == 1
        assert "raise num_nvl_bytes" in warnings[0]
        cupy.cuda.runtime.deviceSynchronize()
        comm.barrier()


@pytest.mark.ranks(3)
def test_combine_in_place_copies_nothing(comm):
    """What dispatch has delivered to the arena, and memory of get_combine_buffer, is read where it lies."""
    inputs = BY_NAME["hidden_7168"].inputs(comm.size)
    with make_buffer(comm) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        rows = checks.rows_in_place(buffer, inputs, result, CUPY)
        buffer.combine(rows, result.handle)  # the pool knows its sizes now
        before = buffer.stats
        combined = checks.combine(buffer, inputs, result, x=rows)
        checks.assert_combined(buffer, inputs, combined)
        assert buffer.stats["arena_bytes_peak"] == before["arena_bytes_peak"]
        assert buffer.stats["combine_in_arena"] == before["combine_in_arena"] + 1
        comm.barrier()


# -- several Buffers ----------------------------------------------------------------------------------------------


@pytest.mark.ranks((2, 4))
@pytest.mark.parametrize("num_nvl_bytes", [ARENA_BYTES, 0], ids=["arena", "window"])
def test_several_buffers_at_once(comm, num_ranks, num_nvl_bytes):
    """Calls of three Buffers in turn, each finding its own rows."""
    buffers = [make_buffer(comm, num_nvl_bytes) for _ in range(3)]
    inputs = [UNIFORM.inputs(num_ranks, seed) for seed in range(3)]
    for _ in range(3):
        results = [checks.dispatch(buffer, mine)[1] for buffer, mine in zip(buffers, inputs, strict=True)]
        for buffer, mine, result in zip(buffers, inputs, results, strict=True):
            checks.assert_dispatched(buffer, mine, result)
        for buffer, mine, result in reversed(list(zip(buffers, inputs, results, strict=True))):
            checks.assert_combined(buffer, mine, checks.combine(buffer, mine, result, 1), 1)
    for buffer in buffers:
        buffer.destroy()


@pytest.mark.ranks((3, 5))
def test_sub_communicators(comm, num_ranks):
    """Odd and even ranks work at the same time, in reverse order, and beside a Buffer of all ranks."""
    half = comm.split(comm.rank % 2, -comm.rank)
    with make_buffer(comm) as everybody, make_buffer(half) as part:
        for seed in range(3):
            checks.round_trip(part, BY_NAME["zipf_skew"].inputs(half.size, seed))
            checks.round_trip(everybody, UNIFORM.inputs(num_ranks, seed))


@pytest.mark.ranks(2)
def test_auto_takes_the_gpu(comm, monkeypatch):
    from mpi4py import MPI

    monkeypatch.delenv("EPCOMM_BACKEND", raising=False)
    for given in (MPI.COMM_WORLD, None):
        with Buffer(given, timeout_s=TIMEOUT_S) as buffer:
            assert buffer.backend == "cuda"
            checks.round_trip(buffer, UNIFORM.inputs(comm.size))
    monkeypatch.setenv("EPCOMM_BACKEND", "host")
    with Buffer(comm) as buffer:
        assert buffer.backend == "host"


# -- handles ------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(3)
@pytest.mark.parametrize("num_nvl_bytes", [ARENA_BYTES, 0], ids=["arena", "window"])
@pytest.mark.parametrize("worst", ["", "overflow"], ids=["exact_size", "worst_case"])
def test_cached_dispatch_of_another_kind_of_rows(comm, worst, num_nvl_bytes):
    """A handle stands for a routing, not for a width or a dtype: gradients go the way of the tokens."""
    inputs = Case("gradients", worst=worst).inputs(comm.size)
    x = [token_data(len(mine), 24, np.float32, seed=7, first_token=100 * rank) for rank, mine in enumerate(inputs.x)]
    with make_buffer(comm, num_nvl_bytes) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        cached = buffer.dispatch(CUPY.up(x[comm.rank]), handle=result.handle)
        received = inputs.dispatched[comm.rank]
        places = zip(received.recv_src_rank, received.recv_src_idx, strict=True)
        want = np.array([x[source][token] for source, token in places if source >= 0], np.float32).reshape(-1, 24)
        assert_bitwise(down(cached.recv_x)[: received.num_recv_tokens], want)
        checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, cached, 2), 2)


@pytest.mark.ranks(3)
def test_handles_in_any_order(comm):
    """Old handles stay good, with other calls in between."""
    inputs = [replace(UNIFORM, name=f"seed {seed}").inputs(comm.size, seed) for seed in range(4)]
    with make_buffer(comm) as buffer:
        results = [checks.dispatch(buffer, mine)[1] for mine in inputs]
        for index in (2, 0, 3, 1, 0):
            mine, result = inputs[index], results[index]
            cached = buffer.dispatch(CUPY.up(mine.x[comm.rank]), handle=result.handle)
            checks.assert_dispatched(buffer, mine, cached, is_cached=True)
            checks.assert_combined(buffer, mine, checks.combine(buffer, mine, result, 1), 1)
