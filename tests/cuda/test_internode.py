"""High-throughput dispatch and combine over virtual nodes on GPUs: two hops, bitwise equal to the two-level oracle.

Rows cross between nodes by plain stores, and through NVSHMEM.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from helpers import checks, emulated_nvshmem, internode
from helpers.calls import TIMEOUT_S, error_of
from helpers.cases import (
    CASES,
    LOW_LATENCY_CASES,
    PLACING_CASES,
    PRE_REDUCE_CASES,
    Case,
    row_major_scales,
)
from helpers.frames import CUPY, assign, down
from helpers.gpu import busy, emulated, need_gpu
from helpers.nvrtc import needs_nvshmem

from epcomm import Buffer
from epcomm.backends.cuda.slots import LowLatencyLauncher
from epcomm.bootstrap import topology
from epcomm.errors import BootstrapError, CapacityError, CompileError, UnsupportedOption
from epcomm.kernels.rings import words_bytes
from epcomm.memory import nvshmem_start
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu

BY_NAME = {case.name: case for case in CASES}
UNIFORM = BY_NAME["uniform"]
NETWORK_BYTES = 24 << 20
ARENA_BYTES = 64 << 20
# Many more units than groups, of several sizes, and not the same number on all ranks.
MANY_TOKENS = Case("many tokens", tokens=(700, 13, 901, 0, 350), hidden=64, num_topk=6, scales=row_major_scales)


@pytest.fixture(scope="module", params=["ipc", pytest.param("nvshmem", marks=needs_nvshmem)])
def transport(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPCOMM_TRANSPORT", request.param)
        yield request.param


@pytest.fixture(scope="module")
def make_buffer(transport):
    """Makes Buffers whose nodes are connected by `transport`."""

    def make(
        comm=None, ranks_per_node=1, num_rdma_bytes=NETWORK_BYTES, num_nvl_bytes=ARENA_BYTES, low_latency_mode=False
    ) -> Buffer:
        return Buffer(
            comm,
            num_nvl_bytes,
            num_rdma_bytes,
            low_latency_mode=low_latency_mode,
            backend="cuda",
            ranks_per_node=ranks_per_node,
            timeout_s=TIMEOUT_S,
        )

    return make


@pytest.fixture(scope="module")
def buffer_of(make_buffer):
    """One Buffer for each size of nodes, for all cases of a job: each finds what those before it have left behind."""
    buffers: dict[tuple[int, int, int], Buffer] = {}

    def get(ranks_per_node: int, num_rdma_bytes: int = NETWORK_BYTES, num_nvl_bytes: int = ARENA_BYTES) -> Buffer:
        key = (ranks_per_node, num_rdma_bytes, num_nvl_bytes)
        if key not in buffers:
            buffers[key] = make_buffer(None, *key)
        return buffers[key]

    yield get
    for buffer in buffers.values():
        buffer.destroy()


all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
placing_cases = pytest.mark.parametrize("case", PLACING_CASES, ids=lambda case: case.name)


@pytest.mark.ranks(4)
@all_cases
def test_case(buffer_of, case):
    buffer = buffer_of(2)
    assert (buffer.topology.num_nodes, buffer.topology.ranks_per_node) == (2, 2)
    checks.round_trip(buffer, case.inputs(4))


@pytest.mark.ranks(4)
@placing_cases
def test_case_with_one_rank_a_node(buffer_of, case):
    checks.round_trip(buffer_of(1), case.inputs(4))


@pytest.mark.skipif(not emulated(), reason="NVSHMEM does not tell which queue pairs were used")
@pytest.mark.ranks(4)
@pytest.mark.parametrize("transport", [pytest.param("nvshmem", marks=needs_nvshmem)], indirect=True, scope="module")
def test_all_goes_through_the_queue_pairs_of_the_buffer(buffer_of, transport):
    """Messages through one half of them, words through the other one, and nothing past them."""
    buffer = buffer_of(2)
    checks.round_trip(buffer, UNIFORM.inputs(4))
    states = [emulated_nvshmem.State.of_module(module) for module in buffer._backend._job.launch.modules]
    assert {state.num_queue_pairs for state in states} == {24}
    messages = np.sum([list(state.num_messages) for state in states], axis=0)
    words = np.sum([list(state.num_words) for state in states], axis=0)
    assert [state.num_by_default for state in states] == [0] * len(states)
    assert (messages[:12] > 0).sum() > 1
    assert (words[12:24] > 0).sum() > 1
    assert messages[12:].sum() == words[:12].sum() == 0


@pytest.mark.ranks(8)
@placing_cases
def test_case_on_eight_ranks(buffer_of, case):
    """2x4, 4x2, 8x1, and on one level 1x8."""
    for ranks_per_node in (4, 2, 1, 8):
        checks.round_trip(buffer_of(ranks_per_node), case.inputs(8))


@pytest.mark.ranks(6)
@placing_cases
def test_case_on_six_ranks(buffer_of, case):
    """3x2 and 2x3."""
    for ranks_per_node in (2, 3):
        checks.round_trip(buffer_of(ranks_per_node), case.inputs(6))


@pytest.mark.slow
@pytest.mark.ranks((2, 6, 8))
@all_cases
def test_case_on_other_nodes(buffer_of, num_ranks, case):
    """2x1; 3x2, 2x3; 4x2, 2x4, 8x1."""
    for ranks_per_node in {2: (1,), 6: (2, 3), 8: (2, 4, 1)}[num_ranks]:
        checks.round_trip(buffer_of(ranks_per_node), case.inputs(num_ranks))


# -- rings ------------------------------------------------------------------------------------------------------------


def smallest(num_nodes: int) -> int:
    """Bytes of rings with a group, or some."""
    return words_bytes(num_nodes) + (num_nodes << 16)


@pytest.mark.ranks((2, 4))
@pytest.mark.parametrize("num_rdma_bytes", [NETWORK_BYTES, 0], ids=["spacious", "small"])
def test_more_units_than_groups(buffer_of, num_ranks, num_rdma_bytes):
    per_node = num_ranks // 2
    buffer = buffer_of(per_node, num_rdma_bytes or smallest(2))
    checks.round_trip(buffer, MANY_TOKENS.inputs(num_ranks))
    checks.round_trip(buffer, UNIFORM.inputs(num_ranks))


@pytest.mark.ranks(6)
def test_a_small_ring_between_three_nodes(buffer_of, num_ranks):
    checks.round_trip(buffer_of(2, smallest(3)), MANY_TOKENS.inputs(num_ranks))


@pytest.mark.ranks((4, 8))
def test_any_number_of_sms(make_buffer, comm, num_ranks, monkeypatch):
    """Ranks may differ."""
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)
    monkeypatch.setattr(Buffer, "_num_sms_chosen", False)
    fitting = cupy.cuda.Device().attributes["MultiProcessorCount"] // num_ranks
    for num_sms in (1, 16):
        Buffer.set_num_sms(max(1, min(num_sms, fitting) - comm.rank % 3))
        with make_buffer(comm, num_ranks // 2, smallest(2)) as buffer:
            checks.round_trip(buffer, Case("tokens", tokens=(200, 3, 90), num_topk=6).inputs(num_ranks))
            comm.barrier()


@pytest.mark.ranks(8)
def test_every_row_crosses_once_for_each_node(buffer_of, num_ranks):
    for ranks_per_node in (4, 2):
        for case in (UNIFORM, BY_NAME["topk_32"], BY_NAME["zipf_skew"]):
            internode.every_row_crosses_once_for_each_node(buffer_of(ranks_per_node), case.inputs(num_ranks))


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_explicit_names_of_the_operations(buffer_of, num_ranks):
    internode.explicit_names_of_the_operations(buffer_of(2), UNIFORM.inputs(num_ranks))


@pytest.mark.ranks(4)
def test_two_levels_round_twice(make_buffer, comm):
    internode.two_levels_round_twice(comm, make_buffer, UNIFORM.inputs(comm.size))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("worst", ["exact", "room", "overflow"])
def test_worst_case_combine_after_cached(buffer_of, comm, worst):
    inputs = Case("worst", worst=worst, num_topk=6, tokens=(30, 2, 17)).inputs(comm.size)
    buffer = buffer_of(2)
    internode.worst_case_combine_after_cached(buffer, inputs)
    if inputs.is_overflowing(comm.rank):
        with pytest.raises(CapacityError, match="num_worst_tokens"):
            buffer.check()
    assert (worst == "overflow") == any(inputs.is_overflowing(rank) for rank in range(comm.size))


@pytest.mark.ranks((4, 6))
def test_calls_of_changing_shape(buffer_of, num_ranks):
    internode.calls_of_changing_shape([buffer_of(2), buffer_of(2, smallest(num_ranks // 2))], 20)


@pytest.mark.slow
@pytest.mark.ranks(8, timeout=900)
def test_500_pairs_with_delays(buffer_of, comm, num_ranks):
    draw = random.Random(comm.rank)
    buffers = [buffer_of(4), buffer_of(2), buffer_of(4, smallest(2)), buffer_of(1)]
    internode.calls_of_changing_shape(
        buffers, 500, before=lambda: busy(draw.random() * 2) if draw.random() < 0.1 else None
    )


@pytest.mark.ranks(4)
def test_20_runs_give_the_same_bits(buffer_of, num_ranks):
    inputs = MANY_TOKENS.inputs(num_ranks)
    for _ in range(20):
        _, result = checks.dispatch(buffer_of(2), inputs)
        checks.assert_dispatched(buffer_of(2), inputs, result)
        checks.assert_combined(buffer_of(2), inputs, checks.combine(buffer_of(2), inputs, result))


@pytest.mark.ranks(4)
def test_a_rank_that_comes_late(buffer_of, comm):
    inputs, buffer = MANY_TOKENS.inputs(comm.size), buffer_of(2)
    for late in range(comm.size):
        if comm.rank == late:
            busy(20)
        _, result = checks.dispatch(buffer, inputs)
        if comm.rank == late:
            busy(20)
        combined = checks.combine(buffer, inputs, result)
        checks.assert_dispatched(buffer, inputs, result)
        checks.assert_combined(buffer, inputs, combined)


@pytest.mark.ranks(4)
def test_a_graph_with_other_rows_each_time(buffer_of, comm):
    """Worst-case dispatch, cached dispatch and combine, captured once."""
    inputs, buffer, rank = Case("worst", worst="room", num_topk=6).inputs(comm.size), buffer_of(2), comm.rank
    x, topk_idx = CUPY.up(inputs.x[rank]), CUPY.up(inputs.topk_idx[rank])
    weights = CUPY.up(inputs.topk_weights[rank])
    stream = cupy.cuda.Stream(non_blocking=True)

    def run():
        layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts)
        first = buffer.dispatch(
            x,
            **layout.arguments(),
            topk_idx=topk_idx,
            topk_weights=weights,
            num_worst_tokens=inputs.num_worst_tokens,
        )
        second = buffer.dispatch(x, handle=first.handle)
        return first, second, buffer.combine(second.recv_x, first.handle)

    with stream:
        run()
        stream.synchronize()
        comm.barrier()
        stream.begin_capture()
        first, second, combined = run()
        graph = stream.end_capture()
        for seed in range(5):
            again = inputs.with_rows(seed)
            assign(x, CUPY.up(again.x[rank]))
            graph.launch(stream)
            stream.synchronize()
            checks.assert_dispatched(buffer, again, first)
            checks.assert_dispatched(buffer, again, second, is_cached=True)
            want = again.dispatched[rank]
            assert combined.combined_x.shape == x.shape
            assert_bitwise(down(second.recv_x)[: want.num_recv_tokens], want.recv_x[: want.num_recv_tokens])
    comm.barrier()


@pytest.mark.ranks(4)
def test_bytes_of_any_number(make_buffer, comm, num_ranks):
    """Rings begin where they may, whatever is in front of them."""
    with make_buffer(comm, 2, NETWORK_BYTES + 1, num_nvl_bytes=65537, low_latency_mode=True) as buffer:
        checks.round_trip(buffer, Case("tiny", hidden=8, tokens=(2, 1), num_topk=2).inputs(num_ranks))
        comm.barrier()


@pytest.mark.ranks(4)
def test_a_forecast_that_was_too_low_on_one_rank(make_buffer, comm, num_ranks):
    """The arena has no room for outputs of both forecast and counts beside each other."""
    with make_buffer(comm, 2, num_nvl_bytes=48 << 10) as buffer:
        for tokens in (12, 40, 12, 60):
            inputs = Case("rows", hidden=64, tokens=(tokens, 12, 3, 12), num_topk=3).inputs(num_ranks)
            _, result = checks.dispatch(buffer, inputs)
            checks.assert_dispatched(buffer, inputs, result)
            del result
        comm.barrier()


@pytest.mark.ranks((4, 6))
def test_low_latency_as_on_one_node(make_buffer, comm, num_ranks):
    """Rows of all nodes lie in the same places, beside calls of the other mode."""
    with make_buffer(comm, 2, low_latency_mode=True) as buffer:
        for case in (*LOW_LATENCY_CASES, *PRE_REDUCE_CASES):
            checks.low_latency_round_trip(buffer, case.inputs(num_ranks))
        checks.round_trip(buffer, UNIFORM.inputs(num_ranks))
        checks.low_latency_round_trip(buffer, LOW_LATENCY_CASES[0].inputs(num_ranks))
        comm.barrier()


@pytest.mark.ranks(4, isolated=True)
@needs_nvshmem
def test_ranks_of_two_hosts(comm, monkeypatch):
    """Ranks that take themselves for ranks of two hosts are two nodes, and reach each other through NVSHMEM."""
    monkeypatch.delenv("EPCOMM_TRANSPORT", raising=False)
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "none")  # a network that is there has no part in this
    for module in (topology, nvshmem_start):
        monkeypatch.setattr(module, "host_identity", lambda: f"host {comm.rank // 2}")
    with Buffer(comm, 64 << 20, NETWORK_BYTES, low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
        assert (buffer.backend, buffer.topology.num_nodes, buffer.topology.ranks_per_node) == ("cuda", 2, 2)
        checks.round_trip(buffer, UNIFORM.inputs(comm.size))
        internode.every_row_crosses_once_for_each_node(buffer, UNIFORM.inputs(comm.size))
        checks.low_latency_round_trip(buffer, LOW_LATENCY_CASES[2].inputs(comm.size))
        comm.barrier()
    with pytest.raises(UnsupportedOption, match="enable_shrink: got ranks on 2 hosts"):
        Buffer(comm, 64 << 20, NETWORK_BYTES, low_latency_mode=True, enable_shrink=True, backend="cuda")
    with pytest.raises(
        UnsupportedOption, match="ranks_per_node: got 4, with ranks 0 to 3 of one node on several hosts"
    ):
        Buffer(comm, 64 << 20, NETWORK_BYTES, backend="cuda", ranks_per_node=4)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_rings_need_some_room(make_buffer, comm, transport):
    with pytest.raises(CapacityError, match="num_rdma_bytes"):
        make_buffer(comm, 1, 1000)
    num_rings = 2 if transport == "ipc" else 4
    with make_buffer(comm, 1, words_bytes(2) + (num_rings << 14)) as buffer:
        checks.round_trip(buffer, BY_NAME["tiny_rows"].inputs(comm.size))
        with pytest.raises(CapacityError, match="num_rdma_bytes"):
            checks.dispatch(buffer, Case("wide", hidden=28672, tokens=(3, 1)).inputs(comm.size))
        checks.round_trip(buffer, BY_NAME["tiny_rows"].inputs(comm.size))
        comm.barrier()


@pytest.mark.ranks(2)
def test_a_rank_that_cannot_load_its_kernels(make_buffer, comm, monkeypatch):
    """All raise, and nothing is in the way of the next Buffer."""
    if comm.rank == 1:
        monkeypatch.setattr(LowLatencyLauncher, "__init__", no_kernels)
    error = error_of(lambda: make_buffer(comm, 1, low_latency_mode=True))
    assert isinstance(error, CompileError if comm.rank == 1 else BootstrapError)
    assert "no kernels here" in str(error)
    monkeypatch.undo()
    with make_buffer(comm, 1, low_latency_mode=True) as buffer:
        checks.round_trip(buffer, BY_NAME["tiny_rows"].inputs(comm.size))
        comm.barrier()


def no_kernels(*arguments):
    raise CompileError("kernels", got="no kernels here", wanted="some")


@pytest.mark.ranks(4)
@all_cases
@pytest.mark.filterwarnings("ignore:no room in the arena")
def test_case_outside_of_the_arena(buffer_of, case):
    """Rows are handed over within the node."""
    checks.round_trip(buffer_of(2, num_nvl_bytes=4096), case.inputs(4))


@pytest.mark.ranks((4, 6))
@pytest.mark.filterwarnings("ignore:no room in the arena")
def test_cases_partly_outside_of_the_arena(buffer_of, comm):
    """Some ranks have room, and get their rows as ever, in calls in which others have none; nodes of 2 and of 3."""
    names = "zero_tokens_on_one_rank", "fp8_with_scales", "column_major_scales", "vector_scales", "worst_room"
    for ranks_per_node in {4: (2,), 6: (2, 3)}[comm.size]:
        buffer = buffer_of(ranks_per_node, num_nvl_bytes=16384)
        before = dict(buffer.stats)
        for name in names:
            checks.round_trip(buffer, BY_NAME[name].inputs(comm.size))
        for way in ("dispatch_by_window", "combine_by_window"):
            assert len(set(comm.allgather(buffer.stats[way] - before[way]))) > 1


@pytest.mark.ranks(4)
@pytest.mark.parametrize("num_rdma_bytes", [NETWORK_BYTES, 0], ids=["spacious", "small"])
@pytest.mark.filterwarnings("ignore:no room in the arena")
def test_many_rows_outside_of_the_arena(buffer_of, num_ranks, num_rdma_bytes):
    buffer = buffer_of(2, num_rdma_bytes or smallest(2), num_nvl_bytes=4096)
    before = dict(buffer.stats)
    for case in (MANY_TOKENS, BY_NAME["hidden_7168"], BY_NAME["zipf_skew"]):
        checks.round_trip(buffer, case.inputs(num_ranks))
    for way in ("dispatch_by_window", "combine_by_window"):
        assert buffer.stats[way] > before[way]
