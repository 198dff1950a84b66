"""Control segments of the host backend: single-writer words, header cells and bounded waits.

Ordering. A rank writes its window and its header cell, then `publish` stores the posted word; a peer that has
read a posted word of at least that sequence may read both. A reader stores its done word after its last load,
and the owner overwrites a slot only after it has read everyone's done word. x86 keeps stores in order; on other
machines `_fence` does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from epcomm.errors import PeerTimeout
from epcomm.layout import HEADER_BYTES, MAX_SELECTS, ControlLayout, Ring

__all__ = ["Control", "Patience"]

_SPIN_S = 20e-6  # a peer that is running answers within this
_YIELD_S = 10e-3  # then give the core away, and after this sleep: there are more ranks than cores
_NAP_S = 50e-6


class Patience:
    """The pause between two looks at a word: spin, then yield, then short sleeps; and the clock of the wait."""

    def __init__(self, timeout_s: float) -> None:
        self._start = time.perf_counter()
        self._timeout_s = timeout_s

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    @property
    def exhausted(self) -> bool:
        return self.elapsed_s > self._timeout_s

    def pause(self) -> None:
        elapsed = self.elapsed_s
        if elapsed > _SPIN_S:
            # Both let go of the interpreter lock, which ranks that are threads need to make progress. time.sleep(0)
            # would as well, but takes as long as a nap.
            if elapsed < _YIELD_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)


class Control:
    """This rank's control segment and its view of those of its peers.

    Args:
        layout: offsets inside a segment.
        rank: this rank; its segment is the only one it writes to.
        segments: by rank, the segments of the ranks of this host.
        timeout_s: bound of every wait, in seconds.
        check_job: called while waiting; raises when the job has failed elsewhere.
    """

    def __init__(
        self,
        layout: ControlLayout,
        rank: int,
        segments: dict[int, NDArray[np.uint8]],
        timeout_s: float,
        check_job: Callable[[], None],
    ) -> None:
        self._layout, self.rank, self._segments = layout, rank, segments
        self.timeout_s, self._check_job = timeout_s, check_job
        words = layout.cell(Ring.THROUGHPUT, 0)
        self._words = {r: segment[:words].data.cast("q") for r, segment in segments.items()}
        self._cells: dict[tuple[int, Ring, int], tuple[memoryview, NDArray[np.int64]]] = {}
        self._lock = threading.Lock()
        self._lock.acquire()

    @property
    def peers(self) -> Iterable[int]:
        """The ranks whose control segments are mapped, this one included."""
        return self._segments.keys()

    def _fence(self) -> None:
        # A lock handed over is the full barrier that Python offers.
        self._lock.release()
        self._lock.acquire()

    def cell(self, rank: int, ring: Ring, slot: int) -> tuple[memoryview, NDArray[np.int64]]:
        """The bytes of a rank's header and the int64 ``[2, MAX_SELECTS, num_ranks]`` beside it."""
        key = (rank, ring, slot)
        if key not in self._cells:
            start = self._layout.cell(ring, slot)
            routes = start + HEADER_BYTES
            segment = self._segments[rank]
            self._cells[key] = (
                segment[start:routes].data,
                segment[routes : routes + self._layout.routes_bytes].view(np.int64).reshape(2, MAX_SELECTS, -1),
            )
        return self._cells[key]

    def _store(self, offset: int, value: int) -> None:
        self._fence()
        self._words[self.rank][offset // 8] = value

    def publish(self, ring: Ring, slot: int, sequence: int) -> None:
        """RELEASE window and header of a slot. Pairs with `await_posted`."""
        self._store(self._layout.posted(ring, slot), sequence)

    def set_opened(self, ring: Ring, slot: int, sequence: int) -> None:
        """Every new window of this call is mapped here. Pairs with `await_opened`."""
        self._store(self._layout.opened(ring, slot), sequence)

    def set_done(self, ring: Ring, slot: int, sequence: int) -> None:
        """RELEASE the peers' windows after the last load. Pairs with `await_done`."""
        self._store(self._layout.done(ring, slot), sequence)

    def set_closed(self) -> None:
        """This rank destroyed its Buffer: who waits for it need not wait longer."""
        self._store(self._layout.closed, 1)

    def give_up(self) -> None:
        """This rank left a call half done: who waits for anybody need not wait longer."""
        self._store(self._layout.gave_up, 1)

    def await_posted(
        self,
        operation: str,
        ring: Ring,
        slot: int,
        sequence: int,
        ranks: Sequence[int],
        on_arrival: Callable[[int, float], None] | None = None,
    ) -> None:
        """ACQUIRE header and window of a slot of `ranks`. Pairs with `publish`."""
        self._wait(operation, "post", self._layout.posted(ring, slot), sequence, ranks, on_arrival)

    def await_opened(self, operation: str, ring: Ring, slot: int, sequence: int, ranks: Sequence[int]) -> None:
        """Wait until `ranks` have mapped this rank's new window. Pairs with `set_opened`."""
        self._wait(operation, "map", self._layout.opened(ring, slot), sequence, ranks)

    def await_done(self, operation: str, ring: Ring, slot: int, sequence: int, ranks: Sequence[int]) -> None:
        """Wait until `ranks` have finished reading an earlier use of a slot. Pairs with `set_done`."""
        self._wait(operation, "release", self._layout.done(ring, slot), sequence, ranks)

    def posted(self, rank: int, ring: Ring, slot: int) -> int:
        """The posted word of a rank as it is now."""
        return self._words[rank][self._layout.posted(ring, slot) // 8]

    def _wait(
        self,
        operation: str,
        phase: str,
        offset: int,
        sequence: int,
        ranks: Sequence[int],
        on_arrival: Callable[[int, float], None] | None = None,
    ) -> None:
        index = offset // 8
        pending = list(ranks)
        patience = Patience(self.timeout_s)
        while True:
            still = []
            for rank in pending:
                if self._words[rank][index] < sequence:
                    still.append(rank)
                elif on_arrival is not None:
                    on_arrival(rank, patience.elapsed_s)
            pending = still
            if not pending:
                self._fence()
                return
            self._check_alive(operation, phase, index, sequence, ranks, pending, patience)
            patience.pause()

    def gave_up(self, rank: int) -> bool:
        """Whether a rank has called `give_up`."""
        return bool(self._words[rank][self._layout.gave_up // 8])

    def _check_alive(
        self,
        operation: str,
        phase: str,
        index: int,
        sequence: int,
        ranks: Sequence[int],
        pending: list[int],
        patience: Patience,
    ) -> None:
        """Raise if waiting on cannot help, or has lasted too long."""
        self._check_job()
        closed = [r for r in pending if self._words[r][self._layout.closed // 8]]
        gave_up = [r for r in ranks if self.gave_up(r)]  # of masked ranks nobody expects anything
        if not (closed or gave_up or patience.exhausted):
            return
        # A peer may have answered, and then closed its Buffer, since the last look at its word.
        self._fence()
        awaited = [r for r in closed or pending if self._words[r][index] < sequence]
        if not awaited:
            return
        if closed:
            reason = "a destroyed Buffer, hence no answer,"
        elif gave_up:
            reason = f"no answer (and {', '.join(f'rank {r}' for r in gave_up)} gave up)"
        else:
            reason = "no answer"
        raise PeerTimeout(
            operation,
            phase=phase,
            waiting_rank=self.rank,
            awaited_ranks=awaited,
            elapsed_s=patience.elapsed_s,
            reason=reason,
        )
