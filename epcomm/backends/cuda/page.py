"""The page of host memory that kernels write and the host reads: results of exchanges, and error records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.errors import ConcurrentUse, EpcommError, PeerTimeout
from epcomm.kernels.layout import HOST_PAGE, NUM_AGREED, NUM_ENTRY_AGREED, OPERATIONS, PHASES

__all__ = ["HostPage"]

_TIMEOUT, _POISONED, _ABORTED, _CONCURRENT, _BAD_OFFSET = 1, 2, 3, 4, 5
_MOVE, _VOID = 0, 1
_SPIN_S = 200e-6  # the exchange of ranks that are there takes less
_SPIN_AS_THREAD_S = 20e-6  # the other ranks of the process need the interpreter lock to launch
# What a rank adds to the GPU's bound before it stops waiting for its own GPU, which may be busy with other work.
_GRACE_S = 30.0


def _word(name: str) -> int:
    return int(HOST_PAGE.fields[name][1]) // 4  # type: ignore[index]


_TAG, _KIND, _ABORT = _word("tag"), _word("error_kind"), _word("abort")
_VERDICT, _RECEIVED, _SENT, _EXPERT = _word("verdict"), _word("num_received"), _word("num_sent"), _word("expert")
_DROPPED, _REJECTIONS = _word("dropped"), _word("num_rejections")
_MISMATCHES, _SEEN_MISMATCHES = _word("num_mismatches"), _word("seen_mismatches")
_LEFT_BEHIND = _word("num_left_behind")
_OTHER_CHOICES = _word("other_choices")
_VOIDS, _SEEN_VOIDS = _word("num_voids"), _word("seen_voids")


class HostPage:
    """One rank's page, in pinned memory that the GPU addresses.

    Args:
        cupy: the module.
        rank: this rank.
        num_ranks: ranks of the job.
        timeout_s: bound of the waits on the GPU.
        in_process: the ranks are threads of one process.
    """

    def __init__(self, cupy: Any, rank: int, num_ranks: int, timeout_s: float, in_process: bool) -> None:
        self._memory = cupy.cuda.alloc_pinned_memory(HOST_PAGE.itemsize)
        self.address = int(self._memory.ptr)
        self._record = np.frombuffer(self._memory, HOST_PAGE, 1)[0:1].reshape(())
        raw = np.frombuffer(self._memory, np.uint8, HOST_PAGE.itemsize)
        raw[:] = 0
        self._words = memoryview(raw.data).cast("I")
        self._spin_s = _SPIN_AS_THREAD_S if in_process else _SPIN_S
        self._rank, self._num_ranks, self._timeout_s = rank, num_ranks, timeout_s
        self._seen_rejections = [0] * num_ranks
        self._seen_left_behind = self._seen_other_choices = 0

    @property
    def failed(self) -> bool:
        """Whether a kernel has left an error record."""
        return self._words[_KIND] != 0

    def abort(self) -> None:
        """Make the waits of this rank's kernels end."""
        self._words[_ABORT] = 1

    def await_tag(self, tag: int, check_job: Callable[[], None]) -> None:
        """Block the host until the exchange `tag` has ended, well or badly.

        Raises:
            PeerTimeout: the GPU did not get to it, or ranks did not answer.
        """
        words = self._words
        start = time.perf_counter()
        while words[_TAG] != tag:
            elapsed = time.perf_counter() - start
            if elapsed < self._spin_s:
                continue
            check_job()
            if self.failed:
                raise self.error()
            if elapsed > self._timeout_s + _GRACE_S:
                raise PeerTimeout(
                    OPERATIONS[0],
                    phase="launch",
                    waiting_rank=self._rank,
                    awaited_ranks=[self._rank],
                    elapsed_s=elapsed,
                    reason="no answer of the own GPU",
                    do="look for work on this GPU that does not end",
                )
            time.sleep(0 if elapsed < 0.01 else 50e-6)  # lets other thread-ranks run
        if self.failed:
            raise self.error()

    @property
    def is_void(self) -> bool:
        """Whether the last exchange found that no row may move: `status` and `agreed` say why."""
        return self._words[_VERDICT] == _VOID

    @property
    def has_room(self) -> bool:
        """Whether the last exchange found room on all ranks: the dispatch behind it moves their rows."""
        return self._words[_VERDICT] == _MOVE

    @property
    def num_received(self) -> int:
        """Rows for this rank, of the last exchange."""
        return self._words[_RECEIVED]

    @property
    def num_sent(self) -> int:
        """Rows from this rank, of the last exchange."""
        return self._words[_SENT]

    def agreed(self) -> NDArray[np.uint32]:
        """uint32 ``[R, NUM_AGREED]``: what the ranks said that must be equal."""
        return self._by_rank("agreed", NUM_AGREED)

    def status(self) -> NDArray[np.uint32]:
        """uint32 ``[R]``: 0, or why a rank rejected its input."""
        return self._record["status"][: self._num_ranks]  # type: ignore[no-any-return]

    def experts(self, num_local_experts: int) -> list[int]:
        """Tokens of this rank's experts."""
        return self._words[_EXPERT : _EXPERT + num_local_experts].tolist()

    @property
    def rows_to_nodes(self) -> tuple[int, int]:
        """Rows of this rank's tokens that dispatches have sent to other nodes, and that combines have brought back."""
        sent, returned = self._record["rows_to_nodes"].tolist()
        return sent, returned

    @property
    def dropped(self) -> int:
        """Rows dropped on this rank since construction."""
        return int(self._words[_DROPPED])

    def take_rejections(self) -> list[int]:
        """The ranks that rejected a call which exchanges no counts, since the last look."""
        counts = self._words[_REJECTIONS : _REJECTIONS + self._num_ranks].tolist()
        seen, self._seen_rejections = self._seen_rejections, counts
        return [rank for rank in range(self._num_ranks) if counts[rank] != seen[rank]]

    def take_left_behind(self) -> bool:
        """Whether peers were ahead of this rank in a low-latency call, since the last look."""
        number = self._words[_LEFT_BEHIND]
        seen, self._seen_left_behind = self._seen_left_behind, number
        return number != seen

    def take_other_choices(self) -> bool:
        """Whether a low-latency combine had another topk_idx than its dispatch, since the last look."""
        number = self._words[_OTHER_CHOICES]
        seen, self._seen_other_choices = self._seen_other_choices, number
        return number != seen

    def take_mismatch(self) -> tuple[str, list[list[int]]] | None:
        """The first call without exchange whose ranks disagreed, since the last look: its name, and all values."""
        number = self._words[_MISMATCHES]
        if number == self._words[_SEEN_MISMATCHES]:
            return None
        operation = OPERATIONS[int(self._record["mismatch_operation"])]
        values = self._by_rank("mismatch", NUM_ENTRY_AGREED).tolist()
        self._words[_SEEN_MISMATCHES] = number  # from here on the kernels use the record again
        return operation, values

    def take_void(self) -> tuple[list[int], list[list[int]]] | None:
        """The first exchange that nobody waited for and that went wrong, since the last look: `status`, `agreed`."""
        number = self._words[_VOIDS]
        if number == self._words[_SEEN_VOIDS]:
            return None
        status = self._record["void_status"][: self._num_ranks].tolist()
        agreed = self._by_rank("void_agreed", NUM_AGREED).tolist()
        self._words[_SEEN_VOIDS] = number  # likewise
        return status, agreed

    def _by_rank(self, field: str, columns: int) -> NDArray[np.uint32]:
        return self._record[field][: self._num_ranks * columns].reshape(-1, columns)  # type: ignore[no-any-return]

    def error(self) -> EpcommError:
        """The error record as an exception."""
        record = self._record
        kind, operation = int(record["error_kind"]), OPERATIONS[int(record["operation"])]
        awaited = [rank for rank in range(self._num_ranks) if int(record["awaited"]) >> rank & 1]
        if kind == _CONCURRENT:
            return ConcurrentUse(
                operation,
                got="two operations of one Buffer on the GPU at the same time",
                wanted="one after the other",
                do="do not replay a graph while an eager call of the same Buffer is running, or use two Buffers",
            )
        if kind == _BAD_OFFSET:
            return EpcommError(
                operation, got=f"offsets outside of their memory from ranks {awaited}", do="look at those ranks first"
            )
        reason = {
            _TIMEOUT: "no answer",
            _POISONED: "no answer (that rank gave up)",
            _ABORTED: "no answer (this rank was told to stop)",
        }[kind]
        return PeerTimeout(
            operation,
            phase=PHASES[int(record["phase"])],
            waiting_rank=self._rank,
            awaited_ranks=awaited,
            elapsed_s=math.floor(int(record["elapsed_us"]) / 1e4) / 100,
            reason=reason,
        )
