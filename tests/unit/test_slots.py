"""The slots of low-latency calls: whose turn it is, and which combine buffers peers are surely through with."""

from __future__ import annotations

import pytest

from epcomm.backends.cuda.slots import Pulls, Ring
from epcomm.errors import BufferStateError, RingFull
from epcomm.kernels.low_latency import Slot

EAGER, UNKNOWN, FIRST, SECOND = 0, -1, 1, 2  # captures


@pytest.fixture
def ring():
    return Ring("low_latency_combine", 6, (Slot(0, 32), Slot(16, 48)))


def test_slots_in_turn(ring):
    for slot in (0, 1, 0, 1):
        assert ring.next_slot() == slot
        ring.pass_over(slot)


def test_a_slot_is_taken_until_it_is_received(ring):
    numbers = [ring.take(ring.next_slot()) for _ in range(2)]
    with pytest.raises(RingFull, match=r"^low_latency_combine: got 2 sends whose receive half has not run"):
        ring.next_slot()
    ring.give_back(1, numbers[1])
    with pytest.raises(RingFull, match="got 1 sends"):  # the next one is slot 0
        ring.next_slot()
    ring.give_back(0, numbers[0])
    assert ring.next_slot() == 0


def test_what_was_forgotten_is_not_received(ring):
    ring.pass_over(0)
    number = ring.take(1)
    ring.forget()
    assert ring.next_slot() == 0
    with pytest.raises(BufferStateError, match="hook"):
        ring.give_back(1, number)


def test_numbers_and_overtaking(ring):
    assert ring.next_number == 1
    first, second = ring.take(0), ring.take(1)
    assert (first, second, ring.next_number) == (1, 2, 3)
    assert not ring.give_back(1, second)
    assert ring.give_back(0, first)
    ring.pass_over(0)
    third = ring.take(1)
    assert third == 4
    assert not ring.give_back(1, third)
    ring.forget()
    assert ring.next_number == 1


# -- pulls ------------------------------------------------------------------------------------------------------------


def combine(pulls: Pulls, slot: int, capture: int, *, is_postponed: bool = False) -> int:
    number = pulls.note_send(capture)
    pulls.note_combine(slot, number, capture, is_postponed=is_postponed)
    return number


def call(pulls: Pulls, capture: int) -> None:
    """A dispatch that sends and receives."""
    pulls.note_received(pulls.note_send(capture), capture)


def test_a_combine_is_over_when_a_later_call_is_received():
    pulls = Pulls()
    assert not pulls.are_over(0, EAGER)  # nothing is known of it
    pulls.note_received(combine(pulls, 0, EAGER), EAGER)
    assert not pulls.are_over(0, EAGER)  # peers may still pull
    call(pulls, EAGER)
    assert pulls.are_over(0, EAGER)
    first = combine(pulls, 0, EAGER)
    assert not pulls.are_over(0, EAGER)
    pulls.note_received(first, EAGER)
    pulls.note_received(combine(pulls, 1, EAGER), EAGER)
    assert pulls.are_over(0, EAGER)
    assert not pulls.are_over(1, EAGER)


def test_what_was_sent_before_the_combine_says_nothing():
    pulls = Pulls()
    earlier = pulls.note_send(EAGER)
    pulls.note_received(combine(pulls, 0, EAGER), EAGER)
    later = pulls.note_send(EAGER)
    pulls.note_received(earlier, EAGER)
    assert not pulls.are_over(0, EAGER)
    pulls.note_received(later, EAGER)
    assert pulls.are_over(0, EAGER)


def test_of_a_combine_in_halves_nothing_is_known():
    pulls = Pulls()
    pulls.note_received(combine(pulls, 0, EAGER, is_postponed=True), EAGER)
    call(pulls, EAGER)
    assert not pulls.are_over(0, EAGER)


@pytest.mark.parametrize("capture", [EAGER, UNKNOWN, SECOND])
def test_replays_are_not_seen(capture):
    """What a capture has seen counts in it alone, and outside nothing counts any more."""
    pulls = Pulls()
    for number in (EAGER, FIRST):
        pulls.note_received(combine(pulls, 0, number), number)
        call(pulls, number)
        assert pulls.are_over(0, number)
    assert not pulls.are_over(0, capture)
    combine(pulls, 0, EAGER)
    call(pulls, EAGER)
    assert not pulls.are_over(0, EAGER)


def test_calls_elsewhere_do_not_count():
    pulls = Pulls()
    pulls.note_received(combine(pulls, 0, FIRST), FIRST)
    call(pulls, SECOND)
    assert not pulls.are_over(0, FIRST)


def test_forget():
    pulls = Pulls()
    combine(pulls, 0, EAGER)
    call(pulls, EAGER)
    pulls.forget()
    assert not pulls.are_over(0, EAGER)
