"""The block allocator against a naive model, with a timeline of our own instead of a GPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from epcomm.errors import CapacityError
from epcomm.memory.blocks import GRANULE, BlockPool
from epcomm.memory.local_pool import SLAB_BYTES, LocalPool
from epcomm.memory.parked import close_or_park, sweep

BASE = 1 << 40
STREAMS = (0, 7, 8)


class Event:
    def __init__(self, stream, time):
        self.stream, self.time, self.is_done = stream, time, False


class FakeTimeline:
    """Events happen when a test says so."""

    def __init__(self):
        self.time = 0
        self.events = []
        self.waits = []  # (stream, event) since the last look
        self.synchronized_at = -1
        self.capturing = set()
        self.num_captures = 1

    def tick(self):
        self.time += 1
        return self.time

    def record(self, stream):
        assert stream not in self.capturing, "the event would become part of the graph"
        self.events.append(Event(stream, self.tick()))
        return self.events[-1]

    def wait(self, stream, event):
        assert stream not in self.capturing
        self.waits.append((stream, event))

    def done(self, event):
        return event.is_done

    def synchronize(self):
        assert not self.capturing
        self.synchronized_at = self.tick()
        for event in self.events:
            event.is_done = True

    def is_capturing(self, stream):
        return stream in self.capturing

    def capture_of(self, stream):
        assert stream in self.capturing
        return self.num_captures


class Pools(RuleBasedStateMachine):
    """Every granule remembers who may still use it; an allocation must have dealt with each of them."""

    SIZE = 8  # granules; few, so that most allocations meet memory that is still in use

    def __init__(self):
        super().__init__()
        self.timeline = FakeTimeline()
        self.pool = BlockPool(BASE, self.SIZE * GRANULE + 100, self.timeline)
        self.blocks = []  # (block, readers, hidden, number of the capture that pins it, 0 for none)
        self.users = [set() for _ in range(self.SIZE)]  # (stream or "hidden", time of the release)
        self.pinned = {}  # granule -> (capture, stream) that may have it again

    @staticmethod
    def granules(block):
        start = block.offset // GRANULE
        return range(start, start + max(1, -(-block.num_bytes // GRANULE)))

    def is_over(self, user, time, stream=None):
        """Whether what `user` did before `time` is done, or the last allocation made `stream` wait for it."""
        if self.timeline.synchronized_at > time:
            return True
        past = [event for event in self.timeline.events if event.stream == user and event.time > time]
        return any(event.is_done or (stream, event) in self.timeline.waits for event in past)

    def free_runs(self, usable):
        taken = {granule for block, *_ in self.blocks for granule in self.granules(block)} | set(self.pinned)
        runs, length = [0], 0
        for granule in range(self.SIZE):
            length = length + 1 if granule not in taken and usable(granule) else 0
            runs.append(length)
        return max(runs) * GRANULE

    @rule(
        size=st.integers(0, 5 * GRANULE),
        stream=st.sampled_from(STREAMS),
        high=st.booleans(),
        readers=st.sets(st.sampled_from(STREAMS), max_size=2),
    )
    def allocate(self, size, stream, high, readers):
        is_captured = stream in self.timeline.capturing
        hidden = any(user == "hidden" for users in self.users for user, _ in users) or any(b[2] for b in self.blocks)
        if self.timeline.capturing and not is_captured and hidden:
            return  # it might synchronise, which a program does not do during a capture
        largest = self.pool.largest_free(stream)
        self.timeline.waits.clear()
        block = self.pool.allocate(size, stream, high=high)
        need = max(GRANULE, -(-size // GRANULE) * GRANULE)
        assert block is not None if need <= largest else block is None or is_captured
        if block is None:
            if not self.timeline.capturing:
                assert self.free_runs(lambda granule: True) < need
            return
        assert block.ptr == BASE + block.offset
        assert block.ptr % GRANULE == 0
        assert block.num_bytes == size
        for granule in self.granules(block):
            again = self.pinned.pop(granule, None)
            assert again is None or (is_captured and again == (self.timeline.num_captures, stream))
            for user, time in self.users[granule]:
                assert self.is_over(user, time, stream), (granule, user)
            self.users[granule] = set()
        assert not (is_captured and self.timeline.waits)
        for reader in readers:
            block.note_reader(reader)
        self.blocks.append((block, readers, False, self.timeline.num_captures if is_captured else 0))

    @precondition(lambda self: self.blocks)
    @rule(which=st.integers(0, 99), pin=st.integers(0, 5).map(lambda n: n == 5))
    def hide(self, which, pin):
        index = which % len(self.blocks)
        block, readers, hidden, pinned = self.blocks[index]
        if pin:
            capture = self.timeline.num_captures
            block.pin(capture)
            pinned = pinned if pinned == capture else -1
        else:
            block.note_hidden_reader()
        self.blocks[index] = (block, readers, hidden or not pin, pinned)

    @precondition(lambda self: self.blocks)
    @rule(which=st.integers(0, 99))
    def release(self, which):
        block, readers, hidden, pinned = self.blocks.pop(which % len(self.blocks))
        time = self.timeline.tick()
        for granule in self.granules(block):
            self.users[granule] = {(stream, time) for stream in readers} | ({("hidden", time)} if hidden else set())
            if pinned:
                self.users[granule] = set()  # replays have an order that eager work knows nothing of
                (reader,) = readers if len(readers) == 1 and not hidden else (None,)
                self.pinned[granule] = (pinned, reader)

    @precondition(lambda self: self.timeline.events)
    @rule(which=st.integers(0, 99))
    def happen(self, which):
        """Events of one stream happen in order."""
        last = self.timeline.events[which % len(self.timeline.events)]
        for event in self.timeline.events:
            if event.stream == last.stream and event.time <= last.time:
                event.is_done = True

    @precondition(lambda self: not self.timeline.capturing)
    @rule(stream=st.sampled_from(STREAMS))
    def begin_capture(self, stream):
        self.timeline.capturing = {stream}
        self.timeline.num_captures += 1

    @precondition(lambda self: self.timeline.capturing)
    @rule()
    def end_capture(self):
        self.timeline.capturing = set()

    @precondition(lambda self: not self.timeline.capturing)
    @rule(synchronize=st.booleans())
    def settle(self, synchronize):
        idle = self.pool.settle(synchronize=synchronize)
        if synchronize:
            assert idle == (not self.blocks)
        if idle:
            assert not self.blocks
            for granule in set(range(self.SIZE)) - set(self.pinned):
                assert all(self.is_over(user, time) for user, time in self.users[granule])

    @invariant()
    def live_blocks_do_not_overlap(self):
        held = [granule for block, *_ in self.blocks for granule in self.granules(block)]
        assert len(held) == len(set(held))
        assert all(0 <= granule < self.SIZE for granule in held)


LIMITS = settings(stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


class TestPool(Pools.TestCase):
    settings = settings(LIMITS, max_examples=20, derandomize=True)


@pytest.mark.slow
class TestPoolAtLength(Pools.TestCase):
    settings = settings(LIMITS, max_examples=500)


@pytest.fixture
def timeline():
    return FakeTimeline()


def test_ends_best_fit_and_coalescing(timeline):
    pool = BlockPool(BASE, 10 * GRANULE, timeline)
    top = pool.allocate(10, 7, high=True)
    low = pool.allocate(2 * GRANULE + 1, 7)
    middle = pool.allocate(GRANULE, 7)
    rest = pool.allocate(5 * GRANULE, 7)
    assert [block.offset // GRANULE for block in (top, low, middle, rest)] == [9, 0, 3, 4]
    assert pool.allocate(1, 7) is None
    del low, middle
    assert pool.largest_free() == 4 * GRANULE  # one range again
    first = pool.allocate(3 * GRANULE, 7)
    del rest
    assert pool.allocate(GRANULE, 7).offset == 3 * GRANULE  # 1 + 5 are neighbours: one range of 6
    del top, first
    assert pool.largest_free() == 10 * GRANULE
    stats = pool.stats
    assert (stats["num_live"], stats["bytes_live"], stats["bytes_free"]) == (0, 0, 10 * GRANULE)
    assert stats["bytes_peak"] == 10 * GRANULE


def test_memory_without_events_is_preferred_and_else_waited_for(timeline):
    pool = BlockPool(BASE, 4 * GRANULE, timeline)
    block = pool.allocate(2 * GRANULE, 7)
    block.note_reader(7)
    block.note_reader(8)
    del block
    assert pool.allocate(2 * GRANULE, 9).offset == 2 * GRANULE
    assert not timeline.waits
    whole = pool.allocate(4 * GRANULE, 9)
    assert whole.offset == 0
    assert sorted((stream, event.stream) for stream, event in timeline.waits) == [(9, 7), (9, 8)]
    assert timeline.synchronized_at < 0


@pytest.mark.parametrize("high", [False, True])
def test_a_block_over_several_ranges_waits_for_the_events_of_each(timeline, high):
    pool = BlockPool(BASE, 3 * GRANULE, timeline)
    blocks = [pool.allocate(1, 7) for _ in range(3)]
    for stream in (3, 4, 5):
        blocks.pop(0).note_reader(stream)
    pool.largest_free()
    block = pool.allocate(2 * GRANULE, 7, high=high)
    assert block.offset == high * GRANULE
    assert sorted(event.stream for _, event in timeline.waits) == ([4, 5] if high else [3, 4])


def test_one_event_serves_all_blocks_of_a_stream(timeline):
    pool = BlockPool(BASE, 64 * GRANULE, timeline)
    blocks = [pool.allocate(1, 7) for _ in range(8)]
    for block in blocks:
        block.note_reader(7)
    del blocks, block
    pool.largest_free()
    assert len(timeline.events) == 1


def test_a_stream_gets_its_own_blocks_back_without_an_event(timeline):
    pool = BlockPool(BASE, 4 * GRANULE, timeline)
    block, other = pool.allocate(GRANULE, 7), pool.allocate(2 * GRANULE, 7)
    block.note_reader(7)
    place = block.offset
    del block
    again = pool.allocate(GRANULE, 7)
    assert again.offset == place
    assert not timeline.events
    # Another stream waits for the first one.
    again.note_reader(7)
    del again
    assert pool.allocate(GRANULE, 8).offset == 3 * GRANULE  # where nobody was
    rest = [pool.allocate(GRANULE, 8) for _ in range(2)]
    assert place in [block.offset for block in rest]
    assert [(stream, event.stream) for stream, event in timeline.waits] == [(8, 7)]
    # So does everybody for a block with two readers.
    other.note_reader(7)
    other.note_reader(8)
    timeline.waits.clear()
    del other
    assert pool.allocate(2 * GRANULE, 7) is not None
    assert sorted(event.stream for _, event in timeline.waits) == [7, 8]


def test_a_reader_can_be_noted_by_any_address_in_a_block(timeline):
    pool = BlockPool(BASE, 4 * GRANULE, timeline)
    first, second = pool.allocate(GRANULE + 1, 7), pool.allocate(GRANULE, 7)
    pool.note_reader(first.ptr + 2 * GRANULE - 1, 8, object())
    pool.note_reader(second.ptr, 9, object())
    pool.note_reader(BASE + 4 * GRANULE, 5, object())  # nobody's
    del first
    pool.largest_free()
    assert [event.stream for event in timeline.events] == [8]
    del second
    pool.largest_free()
    assert [event.stream for event in timeline.events] == [8, 9]


def test_memory_of_its_last_stream_stays_known_to_have_been_used(timeline):
    """Also if the block that has it next is dropped before anybody notes a reader."""
    pool = BlockPool(BASE, GRANULE, timeline)
    pool.allocate(1, 7).note_reader(7)
    pool.allocate(1, 7)
    assert pool.allocate(1, 8) is not None
    assert [(stream, event.stream) for stream, event in timeline.waits] == [(8, 7)]


def test_hidden_readers_cost_a_synchronisation_or_the_room(timeline):
    patient, hasty = (BlockPool(BASE, GRANULE, timeline, may_synchronize=may) for may in (True, False))
    for pool in (patient, hasty):
        pool.allocate(1, 7).note_hidden_reader()
    assert hasty.largest_free() == 0
    assert hasty.allocate(1, 7) is None
    assert timeline.synchronized_at < 0
    assert patient.largest_free() == GRANULE
    assert patient.allocate(1, 7) is not None
    assert timeline.synchronized_at > 0
    hasty.note_synchronized()
    assert hasty.allocate(1, 7) is not None


def test_blocks_of_a_capture_stay(timeline):
    pool = BlockPool(BASE, 3 * GRANULE, timeline)
    pool.allocate(1, 7).note_reader(7)
    timeline.capturing = {7}
    captured = pool.allocate(2 * GRANULE, 7)
    assert captured.offset in (0, GRANULE)  # whichever it is, without an event
    del captured
    assert pool.allocate(2 * GRANULE, 7) is None
    timeline.capturing = set()
    assert pool.largest_free() == GRANULE
    assert pool.stats["bytes_pinned"] == 2 * GRANULE
    timeline.synchronize()
    assert pool.settle()
    pool.close()
    assert pool.allocate(1, 7) is None


def test_streams_outlive_a_cycle_of_garbage_with_their_block(timeline):
    """The collector may finalize a stream before the block that it was noted in."""

    class Stream:
        is_destroyed = False

        def __del__(self):
            self.is_destroyed = True

    pool = BlockPool(BASE, GRANULE, timeline)
    cycle = [pool.allocate(1, 7), Stream()]
    stream = weakref.ref(cycle[1])
    cycle[0].note_reader(8, cycle[1])
    cycle[0].note_reader(7)
    pool.largest_free()
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert not stream().is_destroyed
    pool.largest_free()
    gc.collect()
    assert stream() is None


@pytest.mark.parametrize("other", [None, "stream", "reader", "pin", "capture"])
def test_a_capture_has_its_memory_again(timeline, other):
    """In the same stream, if that was the only reader, and no other graph has the address."""
    pool = BlockPool(BASE, GRANULE, timeline)
    timeline.capturing = {7, 8}
    block = pool.allocate(1, 7)
    block.note_reader(7)
    if other == "reader":
        block.note_reader(8)
    if other == "pin":
        timeline.num_captures += 1
        block.pin(timeline.num_captures)
        timeline.num_captures -= 1
    else:
        block.pin(timeline.num_captures)
    del block
    if other == "capture":
        timeline.num_captures += 1
    again = pool.allocate(1, 8 if other == "stream" else 7)
    assert (again is not None) == (other is None)
    assert pool.stats["bytes_pinned"] == (0 if again else GRANULE)


def test_a_stream_object_is_kept_until_its_event_is_recorded(timeline):
    class Stream:
        pass

    alive = threading.Event()
    pool = BlockPool(BASE, GRANULE, timeline)
    stream = Stream()
    weakref.finalize(stream, alive.set)
    block = pool.allocate(1, 7)
    block.note_reader(8, stream)
    block.note_reader(8)
    del stream, block
    assert not alive.is_set()
    pool.largest_free()
    assert alive.is_set()
    assert timeline.events[0].stream == 8


def test_release_in_other_threads_and_in_the_garbage_collector(timeline):
    pool = BlockPool(BASE, 256 * GRANULE, timeline)

    def churn():
        for _ in range(50):
            cycle = [passed.pop()] if passed else []
            cycle.append(cycle)

    for _ in range(5):
        passed = [pool.allocate(1, 7) for _ in range(200)]
        assert None not in passed
        threads = [threading.Thread(target=churn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        assert pool.largest_free() == 256 * GRANULE
    assert pool.stats["num_live"] == 0


PROGRAM = """
import sys, types
from epcomm.memory.blocks import BlockPool
class Timeline:
    def is_capturing(self, stream): return False
pool = BlockPool(1 << 40, 1 << 20, Timeline())
keep = types.ModuleType("keep")
sys.modules["keep"] = keep
keep.block = pool.allocate(1, 0)
cycle = [pool.allocate(1, 0)]
cycle.append(cycle)
sys.attic = pool.allocate(1, 0)
import builtins
builtins.attic = [pool.allocate(1, 0)]
"""


def test_interpreter_exit_with_live_blocks():
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- LocalPool and parked memory


class Slab:
    def __init__(self, ptr, num_bytes):
        self.ptr, self.num_bytes, self.is_open = ptr, num_bytes, True

    def close(self):
        assert self.is_open
        self.is_open = False


@pytest.fixture
def slabs():
    return []


@pytest.fixture
def local(timeline, slabs):
    def allocate_slab(num_bytes):
        if sum(slab.num_bytes for slab in slabs) + num_bytes > 4 * SLAB_BYTES:
            raise CapacityError("device memory")
        slabs.append(Slab(BASE + sum(slab.num_bytes for slab in slabs), num_bytes))
        return slabs[-1]

    return LocalPool(3, timeline, allocate_slab=allocate_slab)


def test_local_pool_grows_and_then_says_so(local, slabs, timeline):
    small = [local.allocate(100, 7) for _ in range(100)]
    assert [slab.num_bytes for slab in slabs] == [SLAB_BYTES]
    large = local.allocate(SLAB_BYTES + 1, 7)
    assert slabs[1].num_bytes == SLAB_BYTES + (2 << 20)
    assert large.ptr == slabs[1].ptr  # not across the border to the first slab, though they are neighbours
    large.note_reader(7)
    del large
    large = local.allocate(SLAB_BYTES + 1, 8)
    assert len(slabs) == 2
    assert [stream for stream, _ in timeline.waits] == [8]
    fits = local.allocate(2 * SLAB_BYTES - (2 << 20), 7)
    assert len(slabs) == 3
    with pytest.raises(CapacityError, match=r"out of device memory: .*hold \d+ of \d+ bytes.*cuda:3"):
        local.allocate(SLAB_BYTES, 7)
    del small, large, fits
    assert local.settle()
    local.release()
    assert not any(slab.is_open for slab in slabs)
    with pytest.raises(CapacityError, match="closed pool"):
        local.allocate(1, 7)
    local.release()


def test_memory_that_is_still_held_is_parked(timeline):
    closed = []
    pool = BlockPool(BASE, GRANULE, timeline)
    assert close_or_park(BlockPool(BASE, GRANULE, timeline), lambda: closed.append("idle"))
    assert closed == ["idle"]
    held = pool.allocate(1, 7)
    held.note_hidden_reader()
    assert not close_or_park(pool, lambda: closed.append("held"))
    assert sweep(synchronize=True) == 1
    del held
    assert sweep() == 1
    assert sweep(synchronize=True) == 0
    assert closed == ["idle", "held"]
