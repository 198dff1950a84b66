"""High-throughput dispatch and combine on one node, on MPI ranks: every case bitwise equal to the oracle."""

from __future__ import annotations

import errno
import gc
import random
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import checks
from helpers.cases import CASES, PLACING_CASES, Case, column_major_scales
from numpy.typing import NDArray

from epcomm import Buffer, EventOverlap
from epcomm.bootstrap import as_communicator, mpi, topology
from epcomm.errors import CapacityError
from epcomm.layout import NUM_SLOTS, Ring
from epcomm.memory import FileSegments
from epcomm.testing import assert_bitwise, token_data

BY_NAME = {case.name: case for case in CASES}
UNIFORM = BY_NAME["uniform"]

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
placing_cases = pytest.mark.parametrize("case", PLACING_CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def buffer():
    """One Buffer for all cases of a job: each finds what the ones before it have left behind."""
    with Buffer() as shared:
        yield shared
        assert shared.stats["bytes_sent_by_message"] == 0


@pytest.fixture(scope="module")
def buffer_by_messages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPCOMM_HOST_TRANSPORT", "messages")
        shared = Buffer()
    with shared:
        yield shared
        assert shared.stats["bytes_copied_to_windows"] == 0


@pytest.fixture(scope="module", params=[4, None], ids=["one_node", "two_nodes"])
def buffer_on_two_hosts(request):
    """Ranks 0 and 1 share memory, so do 2 and 3; between the pairs rows go by message."""
    comm = as_communicator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topology, "host_identity", lambda: f"host {comm.rank // 2}")
        shared = Buffer(comm, ranks_per_node=request.param)
    with shared:
        assert shared.topology.num_nodes == (1 if request.param else 2)
        yield shared
        assert shared.stats["bytes_sent_by_message"] > 0
        assert shared.stats["bytes_copied_to_windows"] > 0


@pytest.mark.ranks((1, 3), slow=(1,))
@all_cases
def test_case(buffer, num_ranks, case):
    checks.round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks((2, 4), slow=(4,))
@placing_cases
def test_case_on_even_numbers_of_ranks(buffer, num_ranks, case):
    checks.round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.slow
@pytest.mark.ranks((2, 4, 5, 8))
@all_cases
def test_case_on_more_ranks(buffer, num_ranks, case):
    checks.round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks((1, 3), slow=(1,))
@placing_cases
def test_case_by_messages(buffer_by_messages, num_ranks, case):
    checks.round_trip(buffer_by_messages, case.inputs(num_ranks))


@pytest.mark.slow
@pytest.mark.ranks(4)
@placing_cases
def test_case_on_two_hosts(buffer_on_two_hosts, case):
    checks.round_trip(buffer_on_two_hosts, case.inputs(4))


@pytest.mark.slow
@pytest.mark.ranks(4)
@all_cases
def test_any_case_by_messages_and_on_two_hosts(buffer_by_messages, buffer_on_two_hosts, case):
    for buffer in (buffer_by_messages, buffer_on_two_hosts):
        checks.round_trip(buffer, case.inputs(4))


@pytest.mark.ranks((2, 4), slow=(4,))
def test_one_buffer_for_many_shapes(comm, num_ranks):
    draw = random.Random(17)  # the same on every rank
    with Buffer(comm) as buffer:
        for seed in range(20):
            case = Case(
                f"random shape {seed}",
                tokens=tuple(draw.choice((0, 1, 5, 40)) for _ in range(num_ranks)),
                hidden=8 * draw.randint(1, 96),
                experts_per_rank=draw.randint(1, 6),
                num_topk=draw.randint(1, 8),
                expert_alignment=draw.choice((1, 4)),
                has_weights=draw.random() < 0.5,
                worst=draw.choice(("", "", "exact", "room", "overflow")),
                num_biases=draw.randint(0, 2),
                scales=draw.choice((None, column_major_scales)),
            )
            checks.round_trip(buffer, case.inputs(num_ranks, seed))


@pytest.mark.ranks((2, 4), slow=(4,))
@pytest.mark.parametrize("transport", ["segments", "messages"])
def test_several_buffers_at_once(comm, num_ranks, transport, monkeypatch):
    """Calls of three Buffers in turn, each finding its own rows."""
    monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", transport)
    buffers = [Buffer(comm) for _ in range(3)]
    inputs = [UNIFORM.inputs(num_ranks, seed) for seed in range(3)]
    for _ in range(3):
        results = [checks.dispatch(buffer, mine)[1] for buffer, mine in zip(buffers, inputs, strict=True)]
        for buffer, mine, result in zip(buffers, inputs, results, strict=True):
            checks.assert_dispatched(buffer, mine, result)
        for buffer, mine, result in reversed(list(zip(buffers, inputs, results, strict=True))):
            checks.assert_combined(buffer, mine, checks.combine(buffer, mine, result, 1), 1)
    assert len({buffer.id for buffer in buffers}) == 3
    for buffer in buffers:
        buffer.destroy()


@pytest.mark.ranks(3)
def test_sub_communicators(comm, num_ranks):
    """Odd and even ranks work at the same time, in reverse order, and beside a Buffer of all ranks."""
    half = comm.split(comm.rank % 2, -comm.rank)
    with Buffer(comm) as everybody, Buffer(half) as part:
        for seed in range(3):
            checks.round_trip(part, BY_NAME["zipf_skew"].inputs(half.size, seed))
            checks.round_trip(everybody, UNIFORM.inputs(num_ranks, seed))


@pytest.mark.ranks(2)
def test_mpi4py_communicator_and_none(comm):
    from mpi4py import MPI

    for given in (MPI.COMM_WORLD, None):
        with Buffer(given) as buffer:
            checks.round_trip(buffer, UNIFORM.inputs(comm.size))


class CountingEvent(EventOverlap):
    """An event that knows how often it was waited for."""

    num_waits = 0

    def current_stream_wait(self) -> None:
        self.num_waits += 1


@pytest.mark.ranks(3)
def test_events(comm):
    inputs = UNIFORM.inputs(comm.size)
    with Buffer(comm) as buffer:
        before = CountingEvent()
        options = {"previous_event": before, "async_finish": True, "allocate_on_comm_stream": True}
        layout = buffer.get_dispatch_layout(inputs.topk_idx[comm.rank], inputs.num_experts, **options)
        _, result = checks.dispatch(buffer, inputs, **options)
        combined = buffer.combine(inputs.outputs[comm.rank], result.handle, **options)
        assert before.num_waits == 3
        for event in (layout.event, result.event, combined.event, buffer.capture()):
            assert isinstance(event, EventOverlap)
            with event:
                pass
            event.current_stream_wait()
        checks.assert_layout(buffer, inputs, layout)
        checks.assert_dispatched(buffer, inputs, result)
        checks.assert_combined(buffer, inputs, combined)


@pytest.mark.ranks(3)
def test_outputs_stay_as_they_are(comm):
    """While later calls run, after the Buffer is destroyed, and without a Buffer at all."""
    inputs, others = UNIFORM.inputs(comm.size), BY_NAME["zipf_skew"].inputs(comm.size, seed=5)
    buffer = Buffer(comm)
    _, result = checks.dispatch(buffer, inputs)
    combined = checks.combine(buffer, inputs, result, 1)
    for _ in range(2 * NUM_SLOTS):
        checks.round_trip(buffer, others)
    checks.assert_dispatched(buffer, inputs, result)
    comm.barrier()
    buffer.destroy()
    checks.assert_dispatched(buffer, inputs, result)
    checks.assert_combined(buffer, inputs, combined, 1)
    view, want = result.recv_x[1:, ::2], inputs.dispatched[comm.rank].recv_x[1:, ::2]
    del buffer, result
    gc.collect()
    assert_bitwise(view, want)


@pytest.mark.ranks((2, 3))
def test_combine_buffer_saves_the_copy(comm, num_ranks):
    """Rows written into get_combine_buffer are read where they are, as often as the experts run."""
    inputs = BY_NAME["hidden_7168"].inputs(num_ranks)
    rows = inputs.outputs[comm.rank]
    with Buffer(comm) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        for _ in range(2 * NUM_SLOTS + 1):
            mine = buffer.get_combine_buffer(result.handle, rows.dtype)
            mine[...] = rows
            before = buffer.stats["bytes_copied_to_windows"]
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, x=mine))
            assert buffer.stats["bytes_copied_to_windows"] == before
        checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result))
        # What a rank sends to itself it reads where it lies.
        own = np.diff(result.handle.recv_rank_prefix_sum, prepend=0)[comm.rank]
        assert buffer.stats["bytes_copied_to_windows"] - before == (len(rows) - own) * rows[:1].nbytes


@pytest.mark.ranks(2)
def test_combine_buffer_that_is_kept_too_long(comm):
    """Memory of an earlier combine is an ordinary array to a later one: its rows are copied, never mixed up."""
    inputs = UNIFORM.inputs(comm.size)
    rows = inputs.outputs[comm.rank]
    with Buffer(comm) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        mine = buffer.get_combine_buffer(result.handle, rows.dtype)
        mine[...] = rows
        for _ in range(NUM_SLOTS - 1):
            checks.dispatch(buffer, inputs)
        checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, x=mine))


@pytest.mark.ranks((1, 3), slow=(1,))
def test_overflow_keeps_the_first_rows_and_is_reported_once(comm, num_ranks):
    inputs = BY_NAME["worst_overflow"].inputs(num_ranks)
    assert any(inputs.is_overflowing(rank) for rank in range(num_ranks))
    with Buffer(comm) as buffer:
        for _ in range(2):
            checks.assert_dispatched(buffer, inputs, checks.dispatch(buffer, inputs)[1])
        if inputs.is_overflowing(comm.rank):
            with pytest.raises(CapacityError, match=f"rank {comm.rank}"):
                buffer.check()
        buffer.check()
        comm.barrier()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("worst", ["", "overflow"], ids=["exact_size", "worst_case"])
def test_cached_dispatch_of_another_kind_of_rows(comm, worst):
    """A handle stands for a routing, not for a width or a dtype: gradients go the way of the tokens."""
    inputs = Case("gradients", worst=worst).inputs(comm.size)
    x = [token_data(len(mine), 24, np.float32, seed=7, first_token=100 * rank) for rank, mine in enumerate(inputs.x)]
    with Buffer(comm) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        cached = buffer.dispatch(x[comm.rank], handle=result.handle)
        received = inputs.dispatched[comm.rank]
        places = zip(received.recv_src_rank, received.recv_src_idx, strict=True)
        want = np.array([x[source][token] for source, token in places if source >= 0], np.float32).reshape(-1, 24)
        assert_bitwise(cached.recv_x[: received.num_recv_tokens], want)
        checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, cached, 2), 2)


@contextmanager
def full_folder(limit_bytes: int):
    """Segments above a size find no room, as in a /dev/shm that is nearly full."""
    create = FileSegments.create

    def create_if_small(self: FileSegments, num_bytes: int) -> tuple[str, NDArray[np.uint8]]:
        if num_bytes > limit_bytes:
            raise OSError(errno.ENOSPC, "no space left on device")
        return create(self, num_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSegments, "create", create_if_small)
        yield


@pytest.mark.ranks(3)
@pytest.mark.parametrize("ranks_per_node", [None, 1], ids=["one_level", "two_level"])
def test_no_room_on_one_rank(comm, ranks_per_node):
    """All ranks take the messages for the calls that have no room, and shared memory again when there is some."""
    small, large = UNIFORM.inputs(comm.size), BY_NAME["hidden_7168"].inputs(comm.size)
    with Buffer(comm, ranks_per_node=ranks_per_node) as buffer:
        checks.round_trip(buffer, small)
        assert buffer.stats["bytes_sent_by_message"] == 0
        if comm.rank == 1:
            with full_folder(1 << 16):
                checks.round_trip(buffer, large)
        else:
            checks.round_trip(buffer, large)
        num_sent = buffer.stats["bytes_sent_by_message"]
        assert num_sent > 0
        comm.barrier()
        for _ in range(NUM_SLOTS):
            checks.round_trip(buffer, large)
            checks.dispatch(buffer, small)  # an odd number of calls, so that every slot sees every one
        assert buffer.stats["bytes_sent_by_message"] == num_sent


@pytest.mark.ranks(2)
def test_no_room_for_anything(comm, monkeypatch):
    with full_folder(0) if comm.rank == 0 else pytest.MonkeyPatch.context(), Buffer(comm) as buffer:
        checks.round_trip(buffer, UNIFORM.inputs(comm.size))
        assert buffer.stats["bytes_copied_to_windows"] == 0


@pytest.mark.ranks(2)
def test_folder_with_a_long_name(comm, monkeypatch, tmp_path):
    """Segments live wherever EPCOMM_SHM_DIR says, on each rank."""
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    monkeypatch.setenv("EPCOMM_SHM_DIR", str(folder))
    with Buffer(comm) as buffer:
        checks.round_trip(buffer, UNIFORM.inputs(comm.size))
        assert list(folder.iterdir()) == []
        comm.barrier()


@pytest.mark.ranks(3)
def test_windows_grow(comm):
    """A tiny call, then larger and larger ones, on one rank only and on all of them; then a tiny one again."""
    with Buffer(comm) as buffer:
        for tokens in ((1, 0, 2), (1, 0, 60), (50, 0, 2), (80, 80, 80), (300, 1, 1), (1, 1, 1)):
            inputs = Case("growing", tokens=tokens, hidden=2048, num_biases=1).inputs(comm.size)
            _, result = checks.dispatch(buffer, inputs)
            checks.assert_dispatched(buffer, inputs, result)
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, 1), 1)


@pytest.mark.ranks(2)
def test_messages_longer_than_one_piece(comm, monkeypatch):
    """What travels as one message below 1 GiB and as several above, with the limit lowered."""
    monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", "messages")
    monkeypatch.setattr(mpi, "CHUNK_BYTES", 1000)
    with Buffer(comm) as buffer:
        checks.round_trip(buffer, BY_NAME["hidden_7168"].inputs(comm.size))


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("transport", ["segments", "messages"])
def test_more_than_2_gib(comm, transport, monkeypatch):
    """Rank 0 sends 2.25 GiB to rank 1: offsets and counts of bytes beyond 32 bits."""
    monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", transport)
    hidden = 8192
    num_tokens = (9 << 28) // hidden if comm.rank == 0 else 3
    x = np.arange(num_tokens * hidden // 4, dtype=np.uint32).view(np.uint8).reshape(num_tokens, hidden)
    topk_idx = np.full((num_tokens, 1), 1 - comm.rank)
    with Buffer(comm) as buffer:
        layout = buffer.get_dispatch_layout(topk_idx, 2)
        recv_x = buffer.dispatch(x, **layout.arguments(), topk_idx=topk_idx).recv_x
        comm.barrier()
    assert recv_x.shape == ((3, hidden) if comm.rank == 0 else ((9 << 28) // hidden, hidden))
    words = recv_x.view(np.uint32)
    for start in range(0, len(words), 1 << 12):
        block = words[start : start + (1 << 12)].reshape(-1)
        assert np.array_equal(block, np.arange(start * hidden // 4, start * hidden // 4 + block.size, dtype=np.uint32))


def make_and_use_buffers(comm, count: int) -> None:
    inputs = Case("little", tokens=(2, 3), hidden=8).inputs(comm.size)
    for _ in range(count):
        with Buffer(comm) as buffer:
            _, result = checks.dispatch(buffer, inputs)
            checks.assert_dispatched(buffer, inputs, result)


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_300_buffers_one_after_another(comm):
    make_and_use_buffers(comm, 300)


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=300)
def test_3000_buffers_one_after_another(comm):
    """MPI implementations run out of communicators, and processes of file descriptors, before this."""
    make_and_use_buffers(comm, 3000)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("late_rank", [0, 2])
def test_rank_that_comes_late(comm, late_rank):
    """It enters when all others are inside and have sent, in every call of two rounds."""
    inputs = UNIFORM.inputs(comm.size)
    with Buffer(comm) as buffer:
        exchange = buffer._backend._exchange

        def when_others_have_sent() -> None:
            sequence = exchange.sequence(Ring.THROUGHPUT)
            others = [rank for rank in range(comm.size) if rank != late_rank]
            while any(
                exchange.control.posted(rank, Ring.THROUGHPUT, sequence % NUM_SLOTS) < sequence for rank in others
            ):
                pass

        for _ in range(NUM_SLOTS + 1):
            for operation in ("dispatch", "combine"):
                if comm.rank == late_rank:
                    when_others_have_sent()
                if operation == "dispatch":
                    _, result = checks.dispatch(buffer, inputs)
                    checks.assert_dispatched(buffer, inputs, result)
                else:
                    checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, 1), 1)
