"""N ranks as N threads of one process: the same programs without MPI, for tests, notebooks and debuggers.

All collectives are one primitive, the *round*: every rank of a group brings a value, and leaves with the
values of all. Rank r's k-th call joins round k, so calls may follow each other without a pause in between:
a fast rank that is already in round k + 1 cannot disturb a slow one that is still reading round k.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from epcomm.bootstrap.communicator import check_colors, check_root, check_segments
from epcomm.errors import BootstrapError, InputError, PeerTimeout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LocalCommunicator", "LocalGroup", "run_local"]

T = TypeVar("T")

# After one rank failed, how long `run_local` waits for the others to notice before it reports.
FAILURE_GRACE_S = 5.0


class _Round:
    """One meeting of all ranks: who has arrived, with which call and value."""

    def __init__(self, size: int, operation: str) -> None:
        self.operation = operation
        self.values: list[Any] = [None] * size
        self.absent = set(range(size))
        self.num_left = 0


class LocalGroup:
    """The ranks of one in-process job.

    Attributes:
        size: number of ranks.
        comms: the communicator of each rank; hand ``comms[r]`` to the thread that plays rank r.
        shared: a registry for other rooms, to publish memory of this process to the other ranks.
        lock: guards `shared`.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError("size", got=size, wanted="at least one rank")
        self.size = size
        self.comms = [LocalCommunicator(self, rank) for rank in range(size)]
        self.shared: dict[Any, Any] = {}
        self.lock = threading.Lock()
        self._changed = threading.Condition(threading.RLock())
        self._rounds: dict[int, _Round] = {}
        self._children: weakref.WeakSet[LocalGroup] = weakref.WeakSet()
        self._poison: BaseException | None = None

    def poison(self, exc: BaseException) -> None:
        """Make all blocked and later calls of this group, and of those split from it, raise. The first one stays."""
        with self._changed:
            if self._poison is None:
                self._poison = exc
            self._changed.notify_all()
            children = list(self._children)
        for child in children:
            child.poison(exc)

    def meet(self, rank: int, sequence: int, operation: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        """Join round `sequence` with `value`; the values of all ranks.

        Raises:
            BootstrapError: the group is poisoned, or the ranks made different calls (which poisons it).
            PeerTimeout: some ranks did not come within `timeout_s` (which poisons the group).
        """
        with self._changed:
            self.raise_if_poisoned()
            meeting = self._rounds.setdefault(sequence, _Round(self.size, operation))
            if meeting.operation != operation:
                self._out_of_step(rank, operation, meeting)
            meeting.values[rank] = value
            meeting.absent.discard(rank)
            if not meeting.absent:
                self._changed.notify_all()
            # A complete round is a result even if the group was poisoned meanwhile: all ranks get the same.
            self._changed.wait_for(lambda: not meeting.absent or self._poison is not None, timeout_s)
            if meeting.absent:
                self.raise_if_poisoned()
                self._time_out(rank, operation, meeting, timeout_s or 0.0)
            meeting.num_left += 1
            if meeting.num_left == self.size:
                del self._rounds[sequence]
            return meeting.values

    def adopt(self, child: LocalGroup) -> LocalGroup:
        """Pass this group's poison on to `child` from now on."""
        with self._changed:
            self._children.add(child)
            exc = self._poison
        if exc is not None:
            child.poison(exc)
        return child

    def raise_if_poisoned(self) -> None:
        """Raise BootstrapError if a rank of the group has failed; for waits outside of this module."""
        if self._poison is not None:
            raise BootstrapError(
                "the in-process job", got=f"an error on another rank: {self._poison!r}", do="look at that error first"
            ) from self._poison

    def _out_of_step(self, rank: int, operation: str, meeting: _Round) -> NoReturn:
        others = sorted(set(range(self.size)) - meeting.absent)
        error = BootstrapError(
            "collective calls",
            got=f"{operation} on rank {rank}, {meeting.operation} on ranks {others}",
            wanted="the same call on every rank",
            do="make the ranks call the same operations in the same order",
        )
        self.poison(error)
        raise error

    def _time_out(self, rank: int, operation: str, meeting: _Round, elapsed_s: float) -> NoReturn:
        error = PeerTimeout(
            operation,
            phase="meet",
            waiting_rank=rank,
            awaited_ranks=sorted(meeting.absent),
            elapsed_s=elapsed_s,
        )
        # The late ranks would read arrays that this rank is about to reuse: nobody may go on.
        self.poison(error)
        raise error


class LocalCommunicator:
    """One thread-rank's end of a `LocalGroup`; has the methods of `epcomm.bootstrap.Communicator`.

    Attributes:
        group: the group, shared by all its ranks.
    """

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size
        self._num_calls = 0

    def __repr__(self) -> str:
        return f"LocalCommunicator(rank={self.rank}, size={self.size})"

    def allgather(self, obj: Any) -> list[Any]:
        return list(self._meet("allgather", obj))

    def bcast(self, obj: Any, root: int = 0) -> Any:
        check_root(root, self.size)
        return self._meet(f"bcast from {root}", obj)[root]

    def barrier(self) -> None:
        self._meet("barrier", None)

    def split(self, color: int, key: int) -> LocalCommunicator:
        places = self._meet("split", (color, key, self.rank))
        check_colors([place[0] for place in places])
        members = [member for _, member in sorted((k, r) for c, k, r in places if c == color)]
        # The lowest rank of each colour makes the group, a second round hands it out.
        made = self.group.adopt(LocalGroup(len(members))) if self.rank == min(members) else None
        group: LocalGroup = self._meet("split", made)[min(members)]
        return group.comms[members.index(self.rank)]

    def alltoallv(
        self,
        send: NDArray[np.uint8],
        send_counts: Sequence[int],
        recv: NDArray[np.uint8],
        recv_counts: Sequence[int],
        timeout_s: float | None = None,
    ) -> None:
        check_segments("send", send, send_counts, self.size)
        check_segments("recv", recv, recv_counts, self.size)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        offers = self._meet("alltoallv", (send, list(send_counts)), timeout_s)
        offered = [counts[self.rank] for _, counts in offers]
        if offered == list(recv_counts):
            starts = accumulate(recv_counts, initial=0)
            for (source, counts), start, count in zip(offers, starts, recv_counts, strict=False):
                first = sum(counts[: self.rank])
                recv[start : start + count] = source[first : first + count]
        # Nobody may touch its `send` before everybody has read it, so ranks with wrong counts come here too.
        self._meet("alltoallv", None, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if offered != list(recv_counts):
            raise BootstrapError("alltoallv", got=f"{offered} bytes from the ranks", wanted=f"{list(recv_counts)}")

    def abort(self, code: int) -> None:
        error = BootstrapError("the in-process job", got=f"abort({code}) on rank {self.rank}")
        self.group.poison(error)
        raise error

    def _meet(self, operation: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        sequence, self._num_calls = self._num_calls, self._num_calls + 1
        return self.group.meet(self.rank, sequence, operation, value, timeout_s)


def run_local(size: int, fn: Callable[..., T], *args: Any, timeout_s: float = 60.0) -> list[T]:
    """Run ``fn(comm, *args)`` on `size` ranks that are threads of this process.

    Args:
        size: number of ranks.
        fn: the program of one rank; its first argument is the rank's `LocalCommunicator`.
        *args: passed on, the same objects on every rank.
        timeout_s: seconds the whole run may take.

    Returns:
        The results, by rank.

    Raises:
        Exception: the first error of a rank, with a note that names the rank. The other ranks' pending and
            later calls raise `BootstrapError`.
        TimeoutError: ranks were still running after `timeout_s`; names them and shows where they are.
    """
    group = LocalGroup(size)
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []
    ended = threading.Condition()
    running = set(range(size))

    def rank_main(rank: int) -> None:
        try:
            results[rank] = fn(group.comms[rank], *args)
        except BaseException as error:  # SystemExit and pytest's outcomes too: a thread would lose them
            with ended:
                failures.append((rank, error))
            group.poison(error)
        finally:
            with ended:
                running.discard(rank)
                ended.notify_all()

    threads = [threading.Thread(target=rank_main, args=(r,), name=f"rank {r}", daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    try:
        with ended:
            ended.wait_for(lambda: not running or bool(failures), timeout_s)
            if failures:
                ended.wait_for(lambda: not running, FAILURE_GRACE_S)
            hung = sorted(running)
    except BaseException as interrupt:
        group.poison(interrupt)
        raise
    if failures:
        rank, error = failures[0]
        error.add_note(f"raised on rank {rank} of {size} (run_local)" + (f"; still running: {hung}" if hung else ""))
        raise error
    if hung:
        late = TimeoutError(f"run_local: ranks {hung} of {size} are still running after {timeout_s} s")
        for rank in hung:
            late.add_note(f"rank {rank} is at:\n{_stack_of(threads[rank])}")
        group.poison(late)
        raise late
    return results


def _stack_of(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)[-8:]) if frame is not None else "(ended)"
