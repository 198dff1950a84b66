"""NVSHMEM on the host, with a fake library: its start, what is done about a bad one, and who gets what of its heap."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm import env, run_local
from epcomm.bootstrap import SoloCommunicator
from epcomm.errors import (
    BootstrapError,
    CapacityError,
    ForkedProcess,
    InputError,
    MissingDependency,
    RankMismatch,
    UnsupportedOption,
)
from epcomm.memory import driver, nvshmem_start
from epcomm.memory.nvshmem import NvshmemGroup, nvshmem_group
from epcomm.memory.nvshmem_heap import UNIT, Part, SymmetricHeap, first_fit, largest_gap
from epcomm.memory.nvshmem_library import DEFAULT_QUEUE_PAIR, NvshmemLibrary, QueuePairs, Started
from epcomm.memory.nvshmem_start import Instance

MIB = 1 << 20
QUEUE_PAIRS = "NVSHMEM_IBGDA_NUM_RC_PER_PE"
VARIABLES = ("NVSHMEM_SYMMETRIC_SIZE", "NVSHMEM_DISABLE_NVLS", "NVSHMEM_REMOTE_TRANSPORT", QUEUE_PAIRS)
SOLO = SoloCommunicator()


class FakeLibrary:
    """One PE's library, with `room` bytes for the heap, which starts 16 bytes behind a page."""

    def __init__(self, pe: int = 0, num_pes: int = 1, room: int = 1 << 40) -> None:
        self.pe, self.room, self._num_pes = pe, room, num_pes
        self.started = Started(0, 2)
        self.calls: list[tuple] = []
        self._status = 0
        self._next = (1 + pe) * (1 << 40) + 16
        self.environment: dict[str, str | None] = {}
        self.has_queue_pairs = False
        self.made = QueuePairs(0, (2, 4, 6))
        self.behind_network: set[int] = set()

    def version(self):
        return 3, 4, 5

    def status(self):
        return self._status

    def unique_id(self):
        return bytes(128)

    def start(self, unique_id, rank, num_ranks):
        self.calls.append(("start", unique_id, rank, num_ranks))
        self.environment = {name: env.lookup(name) for name in VARIABLES}
        self._status = self.started.status
        return self.started

    def my_pe(self):
        return self.pe

    def num_pes(self):
        return self._num_pes

    def malloc(self, num_bytes):
        self.calls.append(("malloc", num_bytes))
        if num_bytes > self.room:
            return 0
        self.room -= num_bytes
        address, self._next = self._next, self._next + num_bytes
        return address

    def ptr(self, address, pe):
        return 0 if pe == 3 else address + (pe << 40)

    def is_behind_network(self, address, pe):
        assert address == (1 + self.pe) * (1 << 40) + UNIT  # of its own heap
        return pe in self.behind_network

    def create_queue_pairs(self, count):
        self.calls.append(("queue pairs", count))
        return self.made

    def register_module(self, module):
        self.calls.append(("register", module))
        return 7 if module == 13 else 0

    def unregister_module(self, module):
        self.calls.append(("unregister", module))
        return 0


@pytest.fixture
def filled(monkeypatch):
    """No driver: (address, bytes) that were to be filled with zeros."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(driver, "in_context", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(driver, "fill_zero", lambda address, num_bytes: calls.append((address, num_bytes)))
    return calls


@pytest.fixture
def library(monkeypatch, filled):
    """A process that has started nothing yet."""
    fake = FakeLibrary()
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in (("_instance", None), ("_library", fake), ("_failure", "")):
        monkeypatch.setattr(nvshmem_start, name, value)
    monkeypatch.setattr(
        nvshmem_start, "installed_nvshmem", lambda: SimpleNamespace(version=(3, 4, 5), host_library="absent")
    )
    return fake


# -- the heap -----------------------------------------------------------------------------------------------------


def test_the_first_gap_that_is_large_enough_is_taken():
    sizes = [8 * UNIT, 16 * UNIT]
    taken = [Part(0, 0, 2 * UNIT), Part(0, 4 * UNIT, UNIT), Part(0, 4 * UNIT, 2 * UNIT), Part(1, 0, UNIT)]
    assert first_fit(sizes, taken, 1) == Part(0, 2 * UNIT, UNIT)
    assert first_fit(sizes, taken, 2 * UNIT) == Part(0, 2 * UNIT, 2 * UNIT)
    assert first_fit(sizes, taken, 2 * UNIT + 1) == Part(1, UNIT, 3 * UNIT)
    assert first_fit(sizes, taken, 15 * UNIT) == Part(1, UNIT, 15 * UNIT)
    assert first_fit(sizes, taken, 15 * UNIT + 1) is None
    assert largest_gap(sizes, taken) == 15 * UNIT
    assert (first_fit([], [], 1), largest_gap([], [])) == (None, 0)


def overlap(one: Part, other: Part) -> bool:
    return one.block == other.block and max(one.offset, other.offset) < min(
        one.offset + one.num_bytes, other.offset + other.num_bytes
    )


@settings(deadline=None)
@given(st.data())
def test_no_part_is_given_out_where_another_group_may_write(data):
    """Four PEs, groups of some of them that share a part; each of them gives it back when it likes."""
    heaps = [SymmetricHeap() for _ in range(4)]
    for pe, heap in enumerate(heaps):
        heap.add_block((1 + pe) << 40, 40 * UNIT)
        heap.add_block((1 + pe) << 41, 20 * UNIT)
    groups: list[tuple[frozenset[int], Part, dict[int, int]]] = []  # PEs, part, addresses where it was not given back
    for _ in range(data.draw(st.integers(1, 40))):
        live = [addresses for _, _, addresses in groups if addresses]
        if live and data.draw(st.booleans()):
            addresses = data.draw(st.sampled_from(live))
            pe = data.draw(st.sampled_from(sorted(addresses)))
            heaps[pe].free(addresses.pop(pe))
            continue
        pes = data.draw(st.frozensets(st.integers(0, 3), min_size=1))
        taken = [part for pe in pes for part in heaps[pe].taken_for(pes)]
        shuffled = random.Random(len(groups)).sample(taken, len(taken))
        part = first_fit(heaps[0].sizes, taken, data.draw(st.integers(1, 20 * UNIT)))
        if part is None:
            continue
        assert first_fit(heaps[0].sizes, shuffled, part.num_bytes) == part
        for others, theirs, addresses in groups:
            assert not (addresses and others & pes and overlap(part, theirs))
        groups.append((pes, part, {pe: heaps[pe].take(part, pes) for pe in pes}))


def test_a_part_is_had_again_by_those_who_had_it():
    heap = SymmetricHeap()
    heap.add_block(1 << 40, 4 * UNIT)
    address = heap.take(Part(0, 0, 4 * UNIT), (0, 1))
    assert first_fit(heap.sizes, heap.taken_for((0, 1)), UNIT) is None
    heap.free(address)
    assert first_fit(heap.sizes, heap.taken_for((0, 1, 2)), UNIT) == Part(0, 0, UNIT)
    assert first_fit(heap.sizes, heap.taken_for((0,)), UNIT) is None  # PE 1 may still use it


# -- the start ----------------------------------------------------------------------------------------------------


def test_the_first_call_starts_it_and_later_ones_join(library, filled):
    group = nvshmem_group(SOLO, 3, MIB)
    assert library.calls == [("start", bytes(128), 0, 1), ("malloc", MIB + UNIT)]
    assert library.environment == {
        "NVSHMEM_SYMMETRIC_SIZE": str(2 * MIB),
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_REMOTE_TRANSPORT": "none",
        QUEUE_PAIRS: None,
    }
    assert (group.pe, group.num_pes, group.pe_of_rank, group.version, group.device) == (0, 1, (0,), (3, 4, 5), 3)
    assert repr(group) == "NvshmemGroup(1 of 1 PEs, initialised)"
    again = nvshmem_group(SOLO, 3, 16 * MIB)
    addresses = [group.allocate(1), again.allocate(UNIT + 1)]
    assert addresses == [(1 << 40) + UNIT, (1 << 40) + 2 * UNIT]
    assert filled == [(addresses[0], UNIT), (addresses[1], 2 * UNIT)]
    assert len(library.calls) == 2


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("8M", [8 * MIB]), ("1.5 mb", [MIB * 3 // 2]), ("2097152", [2 * MIB]), ("1K", [MIB]), ("nonsense", [MIB])],
)
def test_what_the_user_has_set_stays(text, sizes, library, monkeypatch):
    monkeypatch.setenv("NVSHMEM_SYMMETRIC_SIZE", text)
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "ibrc")
    nvshmem_group(SOLO, 0, MIB)
    assert library.environment["NVSHMEM_SYMMETRIC_SIZE"] == text
    assert library.environment["NVSHMEM_REMOTE_TRANSPORT"] == "ibrc"
    assert [call[1] - UNIT for call in library.calls if call[0] == "malloc"] == sizes


def test_without_room_for_what_the_user_has_set_the_least_will_do(library, monkeypatch):
    monkeypatch.setenv("NVSHMEM_SYMMETRIC_SIZE", "8M")
    library.room = 2 * MIB
    group = nvshmem_group(SOLO, 0, MIB)
    assert library.calls[1:] == [("malloc", 8 * MIB + UNIT), ("malloc", MIB + UNIT)]
    assert group.allocate(MIB)


@pytest.mark.parametrize("started", [Started(0, 1), Started(7, 1), Started(7, 2), Started(0, 0), Started(-1, 99)])
def test_a_bad_start_is_an_error_now_and_later(started, library):
    library.started = started
    words = rf"got code {started.code} and status {started.status} .*NVSHMEM_DEBUG=INFO"
    with pytest.raises(BootstrapError, match=rf"^NVSHMEM 3\.4\.5 on cuda:0: {words}"):
        nvshmem_group(SOLO, 0, MIB)
    with pytest.raises(BootstrapError, match=rf"got an earlier start that failed \(.*{words}.*processes again"):
        nvshmem_group(SOLO, 0, MIB)
    assert [call[0] for call in library.calls] == ["start"]


def test_a_heap_without_room(library):
    library.room = MIB
    with pytest.raises(CapacityError, match=r"^NVSHMEM, symmetric heap: got a request for 2097152 bytes; "):
        nvshmem_group(SOLO, 0, 2 * MIB)
    with pytest.raises(BootstrapError, match="got an earlier start that failed"):
        nvshmem_group(SOLO, 0, MIB)


def test_who_else_is_in_the_process(library, monkeypatch):
    library._status = 2
    with pytest.raises(UnsupportedOption, match="got a process in which another library has started it"):
        nvshmem_group(SOLO, 0, MIB)
    library._status = 0
    monkeypatch.setattr(library, "version", lambda: (3, 5, 1))
    with pytest.raises(BootstrapError, match=r"got 3\.5\.1 loaded, 3\.4\.5 installed; wanted one version"):
        nvshmem_group(SOLO, 0, MIB)


def test_another_device_and_a_fork(library, monkeypatch):
    nvshmem_group(SOLO, 0, MIB)
    with pytest.raises(UnsupportedOption, match="got cuda:1, started on cuda:0"):
        nvshmem_group(SOLO, 1, MIB)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ForkedProcess, match="got a fork of the process that started it"):
        nvshmem_group(SOLO, 0, MIB)


def test_a_library_that_cannot_be_loaded(tmp_path):
    path = tmp_path / "libnvshmem_host.so.3"
    with pytest.raises(MissingDependency, match=r"^NVSHMEM: got .*No such file.*; wanted the host library "):
        NvshmemLibrary(path)
    with pytest.raises(MissingDependency, match=r"undefined symbol: nvshmem"):
        NvshmemLibrary("libc.so.6")


def test_ranks_that_are_threads():
    def program(comm):
        with pytest.raises(UnsupportedOption, match="got ranks that are threads of one process"):
            nvshmem_group(comm, 0, MIB)

    run_local(2, program)


@pytest.mark.parametrize(
    ("ranks", "error", "words"),
    [
        ([("a", (3, 4, 5)), ("a", (3, 5, 0))], RankMismatch, r"version = 3\.4\.5 \(rank 0\), 3\.5\.0 \(rank 1\)"),
        (
            [("a", (3, 4, 5)), (None, (3, 4, 5))],
            UnsupportedOption,
            "got ranks 1 of this Buffer, which did not start it",
        ),
        ([("a", (3, 4, 5)), ("b", (3, 4, 5)), ("a", (3, 4, 5))], UnsupportedOption, "got ranks 1 of this Buffer"),
        ([("a", (3, 4, 5)), None], BootstrapError, "^NVSHMEM: got on rank 1: not here"),
    ],
    ids=["versions", "newcomer", "other_start", "error"],
)
def test_ranks_that_differ_raise_together(ranks, error, words, monkeypatch):
    def introduce(device, heap_bytes, num_queue_pairs):
        if ranks[device] is None:
            raise MissingDependency("not here")
        name, version = ranks[device]
        return nvshmem_start._Rank("host", version, name, heap_bytes, num_queue_pairs)

    monkeypatch.setattr(nvshmem_start, "_introduce", introduce)

    def program(comm):
        own = MissingDependency if ranks[comm.rank] is None else error
        with pytest.raises(own, match="not here" if ranks[comm.rank] is None else words):
            nvshmem_start.start_or_join(comm, comm.rank, MIB, 0)
        comm.barrier()

    run_local(len(ranks), program)


# -- queue pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "chosen", "found"), [(24, None, "24"), (24, "3", "3"), (0, None, None)])
def test_a_library_without_queue_pairs_is_told_how_many_to_have(wanted, chosen, found, library, monkeypatch):
    library.behind_network = {0}
    if chosen is not None:
        monkeypatch.setenv(QUEUE_PAIRS, chosen)
    group = nvshmem_group(SOLO, 0, MIB, wanted)
    assert library.environment[QUEUE_PAIRS] == found
    assert [call[0] for call in library.calls] == ["start", "malloc"]
    assert group.queue_pairs == ()


def test_queue_pairs_are_made_once(library):
    library.has_queue_pairs, library.behind_network = True, {0}
    group = nvshmem_group(SOLO, 0, MIB, 3)
    assert library.environment[QUEUE_PAIRS] is None  # they would come on top
    assert library.calls == [("start", bytes(128), 0, 1), ("malloc", MIB + UNIT), ("queue pairs", 3)]
    assert group.queue_pairs == (2, 4, 6)
    assert nvshmem_group(SOLO, 0, MIB, 5).queue_pairs == (2, 4, 6)
    assert len(library.calls) == 3


@pytest.mark.parametrize(("wanted", "behind_network"), [(0, {0}), (3, set())], ids=["none_wanted", "nothing_to_cross"])
def test_queue_pairs_that_nobody_would_use(wanted, behind_network, library):
    library.has_queue_pairs, library.behind_network = True, behind_network
    assert nvshmem_group(SOLO, 0, MIB, wanted).queue_pairs == ()
    assert [call[0] for call in library.calls] == ["start", "malloc"]
    assert library.environment[QUEUE_PAIRS] is None


def test_a_transport_without_queue_pairs(library):
    library.has_queue_pairs, library.behind_network = True, {0}
    library.made = QueuePairs(0, (DEFAULT_QUEUE_PAIR,) * 3)
    assert nvshmem_group(SOLO, 0, MIB, 3).queue_pairs == ()


def test_queue_pairs_that_cannot_be_made(library):
    library.has_queue_pairs, library.behind_network = True, {0}
    library.made = QueuePairs(7, ())
    words = r"3 queue pairs to each of 1 PEs: got code 7; pass a smaller num_qps_per_rank"
    with pytest.raises(BootstrapError, match=rf"^NVSHMEM 3\.4\.5, {words}"):
        nvshmem_group(SOLO, 0, MIB, 3)
    with pytest.raises(BootstrapError, match=rf"got an earlier start that failed \(.*{words}"):
        nvshmem_group(SOLO, 0, MIB, 3)


def test_all_ranks_make_queue_pairs_or_none_and_fail_together():
    """Rank 1 alone sees a PE behind the network, and fails when all have made them."""
    made = instances(2)
    made[1].library.behind_network, made[1].library.made = {0}, QueuePairs(7, ())

    def program(comm):
        instance = made[comm.rank]
        error = "code 7" if comm.rank else "on rank 1: .*code 7"
        with pytest.raises(BootstrapError, match=error):
            nvshmem_start._make_queue_pairs(comm, instance, ((1 + comm.rank) << 40) + UNIT, 3)
        return instance.queue_pairs, instance.library.calls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "in_context", lambda device: contextlib.nullcontext())
        assert run_local(2, program) == [((), [("queue pairs", 3)])] * 2


def test_the_most_that_a_rank_of_the_start_wants(library, monkeypatch):
    library.has_queue_pairs, library.behind_network = True, {0}
    ranks = [nvshmem_start._Rank("host", (3, 5, 0), None, MIB, wanted) for wanted in (2, 7, 3)]
    nvshmem_start._start(SOLO, 0, ranks)
    assert library.calls[-1] == ("queue pairs", 7)


@pytest.mark.parametrize("code", [0, 7])
def test_handles_are_read_from_the_library(code):
    array = (ctypes.c_int * 3)(8, 16, 24)

    def create(count, out):
        if code == 0:
            ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.addressof(array)
        return code if count == 3 else -1

    library = NvshmemLibrary.__new__(NvshmemLibrary)
    library._library = SimpleNamespace(nvshmemx_qp_create=create)
    assert library.create_queue_pairs(3) == (code, () if code else (8, 16, 24))


# -- groups -------------------------------------------------------------------------------------------------------


def instances(num_pes: int, room: int = 1 << 40) -> list[Instance]:
    """One of each PE, with heaps of one MiB."""
    made = [Instance(FakeLibrary(pe, num_pes, room), "a", pe, num_pes, 0, 3, os.getpid()) for pe in range(num_pes)]
    for pe, instance in enumerate(made):
        instance.heap.add_block((1 + pe) << 40, MIB)
    return made


def group_of(comm, made: list[Instance], pe: int) -> NvshmemGroup:
    return NvshmemGroup(comm, made[pe], comm.allgather(pe))


def test_parts_of_a_group_and_of_a_group_of_some_ranks(filled):
    made = instances(3)

    def program(comm):
        world = group_of(comm, made, comm.rank)
        first = world.allocate(1000)
        some = comm.split(0 if comm.rank else 1, key=-comm.rank)
        part = group_of(some, made, comm.rank)
        assert part.pe_of_rank == ((2, 1) if comm.rank else (0,))
        second = part.allocate(UNIT)
        third = world.allocate(UNIT)
        world.free(first)
        comm.barrier()
        fourth = world.allocate(2 * UNIT)
        with pytest.raises(InputError, match=r"^free: got 0x"):
            world.free(first + UNIT)
        base = (1 + comm.rank) << 40
        return [address - base for address in (first, second, third, fourth)]

    assert run_local(3, program) == [[0, 2 * UNIT, 3 * UNIT, 0]] * 3
    assert all(num_bytes % UNIT == 0 for _, num_bytes in filled)


def test_the_heap_grows_for_all_ranks_only(filled):
    made = instances(2)

    def program(comm):
        world = group_of(comm, made, comm.rank)
        alone = group_of(comm.split(comm.rank, 0), made, comm.rank)
        with pytest.raises(CapacityError, match=rf"at most {MIB}, .*NVSHMEM_SYMMETRIC_SIZE to {4 * MIB} or more"):
            alone.allocate(3 * MIB)
        address = world.allocate(3 * MIB)
        assert address == ((1 + comm.rank) << 40) + UNIT  # of the fake's second block
        assert alone.allocate(MIB) == (1 + comm.rank) << 40
        return [call for call in made[comm.rank].library.calls if call[0] == "malloc"]

    assert run_local(2, program) == [[("malloc", 3 * MIB + UNIT)]] * 2


def test_a_heap_that_cannot_grow(filled):
    made = instances(2)
    made[1].library.room = 0  # of one GPU

    def program(comm):
        world = group_of(comm, made, comm.rank)
        with pytest.raises(CapacityError, match="got a request for 2097152 bytes"):
            world.allocate(2 * MIB)
        assert world.allocate(MIB) == (1 + comm.rank) << 40

    run_local(2, program)


def test_allocations_that_differ_or_fail_raise_together(filled, monkeypatch):
    made = instances(2)
    failing = threading.local()

    def fill(address, num_bytes):
        if getattr(failing, "here", False):
            raise CapacityError("no more streams")

    monkeypatch.setattr(driver, "fill_zero", fill)

    def program(comm):
        world = group_of(comm, made, comm.rank)
        with pytest.raises(RankMismatch, match=r"num_bytes = 1 \(rank 0\), 2 \(rank 1\)"):
            world.allocate(1 + comm.rank)
        with pytest.raises(InputError, match=r"^num_bytes: got 0; wanted at least 1"):
            world.allocate(0)
        failing.here = comm.rank == 1
        with pytest.raises(CapacityError if comm.rank else BootstrapError, match="no more streams"):
            world.allocate(MIB)
        failing.here = False
        assert world.allocate(MIB) == (1 + comm.rank) << 40

    run_local(2, program)


def test_pointers_and_modules(filled):
    (instance, *_) = made = instances(4)
    group = NvshmemGroup(SOLO, made[0], [0])
    assert [group.ptr(1 << 40, pe) for pe in range(4)] == [1 << 40, 2 << 40, 3 << 40, 0]
    for pe in (-1, 4):
        with pytest.raises(InputError, match=f"^pe: got {pe}; wanted a PE, 0 to 3"):
            group.ptr(1 << 40, pe)
    for _ in range(2):
        group.register_module(5)
    group.unregister_module(6)
    group.unregister_module(5)
    with pytest.raises(BootstrapError, match=r"got code 7; wanted kernels that are linked with .*3\.4\.5"):
        group.register_module(13)
    assert instance.library.calls == [("register", 5), ("unregister", 5), ("register", 13)]
