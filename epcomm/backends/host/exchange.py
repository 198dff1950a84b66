"""One collective step of the host backend: post fields of rows, read what the others posted.

A rank *posts* fields with selections, then *collects*: it waits for its peers' posts and reads the rows meant for
it straight from their windows. Ranks of other hosts, and payload for which shared memory has no room, go through
the communicator's alltoallv instead, behind the same `Delivery`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from epcomm.backends.host.control import Control
from epcomm.backends.host.delivery import Delivery
from epcomm.backends.host.fields import Field, Layout, fill, lay_out, selections_of
from epcomm.backends.host.header import Header, Operation, agreed_values
from epcomm.backends.host.messages import MessageTransport
from epcomm.backends.host.windows import OwnWindow, PeerWindows
from epcomm.bootstrap import Communicator
from epcomm.errors import BufferStateError, EpcommError, PeerTimeout, RingFull
from epcomm.layout import HEADER_BYTES, MAX_NAME, MAX_SELECTS, NUM_SLOTS, Ring
from epcomm.memory import SegmentStore

__all__ = ["Exchange", "Ticket"]

_IN_PLACE = (Operation.COMBINE, Operation.LOW_LATENCY_COMBINE)
_MASKED_RINGS = (Ring.LOW_LATENCY_DISPATCH, Ring.LOW_LATENCY_COMBINE)


@dataclass(frozen=True, eq=False)
class Ticket:
    """A post whose receive half has not run."""

    operation: Operation
    ring: Ring
    sequence: int
    fields: Sequence[Field]
    cell: memoryview
    routes: NDArray[np.int64]
    window: OwnWindow | None

    @property
    def slot(self) -> int:
        return self.sequence % NUM_SLOTS


@dataclass(eq=False)
class _RingState:
    next_sequence: int = 1
    in_flight: set[int] = field(default_factory=set)


def _header(
    sequence: int,
    operation: Operation,
    agreed: tuple[int, ...],
    layout: Layout,
    window: OwnWindow | None,
    by_message: bool,
    rejection: str,
) -> Header:
    grew, index, num_bytes, name = False, 0, 0, ""
    if window is not None:
        grew, index, num_bytes, name = window.unread_name, window.index, window.bytes.size, window.name
    return Header(
        sequence, operation, by_message, grew, index, num_bytes, agreed, layout.fields, layout.selects, name, rejection
    )


class Exchange:
    """Posts and collects for one Buffer.

    Args:
        comm: the ranks.
        store: where windows are created; None when no memory is shared.
        control: control segments of this host's ranks; None without a store.
        timeout_s: bound of every wait, in seconds.
        mask_on_timeout: a low-latency rank that does not answer is masked instead of raising.
    """

    def __init__(
        self,
        comm: Communicator,
        store: SegmentStore | None,
        control: Control | None,
        timeout_s: float,
        mask_on_timeout: bool,
    ) -> None:
        self.comm, self.control, self._store = comm, control, store
        self.messages = MessageTransport(comm, timeout_s)
        self.peer_windows = PeerWindows(store) if store is not None else None
        self.shared = frozenset(control.peers) if control is not None else frozenset()
        self.one_host = len(self.shared) == comm.size
        self.masked = np.zeros(comm.size, np.bool_)
        self._mask_on_timeout = mask_on_timeout
        self._rings = {ring: _RingState() for ring in Ring}
        self._windows: dict[tuple[Ring, bool, int], OwnWindow] = {}
        self.num_bytes_copied = 0
        self.interrupted = False  # a wait was left by an exception that is none of ours

    def sequence(self, ring: Ring) -> int:
        """Sequence number of the ring's next call."""
        return self._rings[ring].next_sequence

    def resume_at(self, ring: Ring, sequence: int) -> None:
        """Forget the ring's past, after all ranks have agreed on the next sequence number."""
        self._rings[ring] = _RingState(sequence)
        for (of_ring, _, _), window in self._windows.items():
            if of_ring == ring:
                window.retire()  # ranks that were masked have not mapped it, and its name is gone
        if self.control is not None:
            for past in range(max(sequence - NUM_SLOTS, 0), sequence):
                self.control.set_done(ring, past % NUM_SLOTS, past)

    def next_window(self, ring: Ring, operation: Operation, num_bytes: int) -> OwnWindow:
        """The window of the next post of `operation`, free of readers and at least `num_bytes` large.

        Raises:
            RingFull: both slots of the ring hold posts that were not collected.
            PeerTimeout: a peer did not finish reading the window's previous content.
            OSError: no room for the window, or no shared memory at all.
        """
        if self._store is None:
            raise OSError("ranks share no memory")
        return self._window(ring, operation, self._free_slot(ring, operation), num_bytes)

    def _window(self, ring: Ring, operation: Operation, sequence: int, num_bytes: int) -> OwnWindow:
        """The window of post `sequence`, whose slot is free. Raises OSError when there is no room for it."""
        if self._store is None:
            raise OSError("ranks share no memory")
        # Combines have windows of their own: users write into them while other calls run.
        key = (ring, operation in _IN_PLACE, sequence % NUM_SLOTS)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = OwnWindow(self._store, len(self._windows))
        window.reserve(num_bytes)
        return window

    def _free_slot(self, ring: Ring, operation: Operation) -> int:
        """Sequence of the next post, once everybody has read what its slot held before."""
        state = self._rings[ring]
        if len(state.in_flight) >= NUM_SLOTS:
            raise RingFull(
                operation.label,
                got=f"{NUM_SLOTS} sends whose receive half has not run",
                do="call the hook of an earlier send first",
            )
        sequence = state.next_sequence
        if (control := self.control) is not None:
            self._wait(
                ring,
                lambda ranks: control.await_done(
                    operation.label, ring, sequence % NUM_SLOTS, sequence - NUM_SLOTS, ranks
                ),
            )
        return sequence

    def post(
        self,
        operation: Operation,
        ring: Ring,
        agreed: Mapping[str, int],
        fields: Sequence[Field],
        *,
        rejection: str = "",
    ) -> Ticket:
        """Send half: copy `fields` into this rank's window and announce them. Waits only for a free slot.

        Args:
            agreed: the values that `header.AGREED` names for the operation.
            rejection: why this rank rejects its input; then there are no fields.
        """
        sequence = self._free_slot(ring, operation)
        slot = sequence % NUM_SLOTS
        if self.control is not None:
            cell, routes = self.control.cell(self.comm.rank, ring, slot)
        else:
            cell, routes = memoryview(bytearray(HEADER_BYTES)), np.zeros((2, MAX_SELECTS, self.comm.size), np.int64)
        selections = selections_of(fields)
        assert len(selections) <= MAX_SELECTS
        routes[:, len(selections) :] = 0
        for index, selection in enumerate(selections):
            routes[0, index], routes[1, index] = selection.counts, selection.begin
        if ring in _MASKED_RINGS:
            routes[:, :, self.masked] = 0  # also a rank that does not know that it is masked must read nothing
        layout = lay_out(fields, selections)
        window = self._reserved(ring, operation, sequence, layout.num_bytes) if fields else None
        if window is not None:
            in_place = operation in _IN_PLACE
            self.num_bytes_copied += fill(window.bytes, layout, fields, selections, self.comm.rank, in_place)
        values = () if rejection else agreed_values(operation, agreed)
        by_message = bool(fields) and window is None  # all ranks see this and use messages for this call
        _header(sequence, operation, values, layout, window, by_message, rejection).write(cell)
        state = self._rings[ring]
        state.next_sequence = sequence + 1
        state.in_flight.add(sequence)
        if self.control is not None:
            self.control.publish(ring, slot, sequence)
        return Ticket(operation, ring, sequence, fields, cell, routes, window)

    def _reserved(self, ring: Ring, operation: Operation, sequence: int, num_bytes: int) -> OwnWindow | None:
        """`_window`, or None where there is no room for it, or no place for its name in a header."""
        try:
            window = self._window(ring, operation, sequence, num_bytes)
        except OSError:
            return None
        return window if len(window.name.encode()) <= MAX_NAME else None

    def collect(self, ticket: Ticket) -> Delivery:
        """Receive half: wait for the peers' posts. Use the result in a ``with`` block; leaving it lets the peers
        overwrite what they posted.

        Raises:
            PeerTimeout: a peer did not post in time.
            BufferStateError: the send was forgotten, because the ranks have agreed on a new start since.
        """
        if ticket.sequence not in self._rings[ticket.ring].in_flight:
            raise BufferStateError(
                ticket.operation.label,
                got="the hook of a send from before low_latency_clean_mask_buffer",
                do="send again",
            )
        waited_s = np.zeros(self.comm.size)
        if not self.one_host or self.control is None:
            received, tables = self.messages.headers(ticket.operation.label, ticket.cell, ticket.routes)
            return Delivery(self, ticket, dict(enumerate(received)), dict(enumerate(tables)), waited_s)
        control, ring, slot = self.control, ticket.ring, ticket.slot

        def arrived(rank: int, elapsed_s: float) -> None:
            waited_s[rank] = elapsed_s

        self._wait(
            ring,
            lambda ranks: control.await_posted(ticket.operation.label, ring, slot, ticket.sequence, ranks, arrived),
        )
        present = self._awaited(ring)
        self._check_in_step(ticket, present)
        cells = {rank: control.cell(rank, ring, slot) for rank in present}
        headers = {rank: Header.read(cell) for rank, (cell, _) in cells.items()}
        return Delivery(self, ticket, headers, {rank: routes for rank, (_, routes) in cells.items()}, waited_s)

    def finish(self, ticket: Ticket, headers: Mapping[int, Header]) -> None:
        """End of a call: windows that grew lose their names, the peers' slots are free again."""
        # Before anything else: who was left behind need not wait for peers that will never answer.
        self._check_in_step(ticket, headers)
        self._rings[ticket.ring].in_flight.discard(ticket.sequence)
        control, ring, slot = self.control, ticket.ring, ticket.slot
        if control is None:
            return
        grew = [rank for rank in self.shared if rank in headers and headers[rank].grew]
        if grew:
            control.set_opened(ring, slot, ticket.sequence)
        if self.comm.rank in grew and ticket.window is not None:
            self._wait(
                ring,
                lambda ranks: control.await_opened(ticket.operation.label, ring, slot, ticket.sequence, ranks),
            )
            ticket.window.forget_name()
        control.set_done(ring, slot, ticket.sequence)

    def abandon(self) -> None:
        """Leave a call half done: peers need not wait, and no name outlives a process that nobody cleans up after."""
        if self.control is not None:
            self.control.give_up()  # first, so that whoever misses a name knows why
        self._forget_names()

    def close(self) -> None:
        """Take the names of windows away and tell the peers not to wait for this rank. Never waits."""
        self._forget_names()
        if self.control is not None:
            self.control.set_closed()

    def _forget_names(self) -> None:
        for window in self._windows.values():
            window.forget_name()

    def _check_in_step(self, ticket: Ticket, ranks: Iterable[int]) -> None:
        """A peer that masked this rank does not wait for it, and may have overwritten what this rank reads."""
        control, ring, slot = self.control, ticket.ring, ticket.slot
        if control is None or ring not in _MASKED_RINGS:
            return
        ahead = [r for r in ranks if r in self.shared and control.posted(r, ring, slot) > ticket.sequence]
        if ahead:
            raise self.left_behind(ticket, ahead)

    def left_behind(self, ticket: Ticket, ranks: Sequence[int]) -> BufferStateError:
        """The error of a call that `ranks` made without this rank. It leaves the Buffer whole."""
        self._rings[ticket.ring].in_flight.discard(ticket.sequence)
        if self.control is not None:
            self.control.set_done(ticket.ring, ticket.slot, ticket.sequence)  # nothing was, or will be, read
        return BufferStateError(
            ticket.operation.label,
            got=f"calls that {', '.join(f'rank {r}' for r in ranks)} made without this rank, which is masked there",
            wanted="all ranks in step",
            do="call low_latency_clean_mask_buffer on all ranks to bring it back",
        )

    def can_leave_behind(self, ring: Ring) -> bool:
        """Whether peers may go on without a rank."""
        return ring in _MASKED_RINGS

    def _awaited(self, ring: Ring) -> list[int]:
        """This host's ranks, less those masked where masks hold."""
        return [r for r in self.shared if not (ring in _MASKED_RINGS and self.masked[r])]

    def _wait(self, ring: Ring, wait: Callable[[Sequence[int]], None]) -> None:
        """Run ``wait(ranks)``; where that was asked for, mask ranks that time out and go on without them."""
        while True:
            try:
                return wait(self._awaited(ring))
            except PeerTimeout as timeout:
                others = [r for r in timeout.awaited_ranks if r != self.comm.rank]
                if self.control is None or not (self._mask_on_timeout and ring in _MASKED_RINGS and others):
                    raise
                self.masked[[r for r in others if self.control.gave_up(r)] or others] = True
            except EpcommError:
                raise
            except BaseException:  # of a signal handler, somewhere in the wait
                self.interrupted = True
                raise
