"""The `Communicator` over mpi4py. Importing this module initialises MPI.

epcomm never talks on the user's communicator: it duplicates it, once, and keeps the duplicate as an MPI
attribute of it. All Buffers on one communicator share that duplicate, because MPICH has room for about 2000
communicators; it is freed together with the user's. So Buffers that different threads use at the same time
need a communicator each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from mpi4py import MPI

from epcomm import env
from epcomm.bootstrap.communicator import check_colors, check_root, check_segments
from epcomm.bootstrap.launcher import find_mpirun
from epcomm.errors import BootstrapError, EpcommError, InputError, MpiMissing, PeerTimeout, WrongLauncher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CHUNK_BYTES", "MpiCommunicator", "adapt"]

# MPI counts are C ints: a longer segment travels as several messages. MPI keeps their order.
CHUNK_BYTES = 1 << 30

# A wait first polls for a short answer time, then lets other ranks of an oversubscribed host run.
SPIN_S = 20e-6

_TAG = 1

# (peer, bytes, request) of a message under way
_Message = tuple[int, "NDArray[np.uint8]", MPI.Request]

# What exchanges that did not end left behind, until the process exits: MPI may still read and write these arrays.
_quarantine: list[Any] = []


class MpiCommunicator:
    """All ranks of an mpi4py communicator, on epcomm's own duplicate of it. Made by `adapt`."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._mpi_comm = comm
        self._splits: dict[tuple[tuple[int, int], ...], MpiCommunicator] = {}
        self._broken: EpcommError | None = None

    def __repr__(self) -> str:
        return f"MpiCommunicator(rank={self.rank}, size={self.size})"

    def allgather(self, obj: Any) -> list[Any]:
        return self._usable().allgather(obj)

    def bcast(self, obj: Any, root: int = 0) -> Any:
        check_root(root, self.size)
        return self._usable().bcast(obj, root)

    def barrier(self) -> None:
        self._usable().Barrier()

    def split(self, color: int, key: int) -> MpiCommunicator:
        # Every rank sees the whole table, so all of them agree on whether this split was made before.
        table = tuple(self._usable().allgather((int(color), int(key))))
        check_colors([c for c, _ in table])
        if table not in self._splits:
            self._splits[table] = MpiCommunicator(_prepare(cast("MPI.Intracomm", self._mpi_comm.Split(color, key))))
        return self._splits[table]

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
        comm, started = self._usable(), time.monotonic()
        # Messages, not MPI_Ialltoallv: no agreement on a number of rounds, and it is known who did not answer.
        # Every pair exchanges at least one, if empty, so that counts which disagree show up in this very call.
        receives = [
            (peer, piece, comm.Irecv([piece, MPI.BYTE], peer, _TAG)) for peer, piece in _pieces(recv, recv_counts)
        ]
        sends = [(peer, piece, comm.Isend([piece, MPI.BYTE], peer, _TAG)) for peer, piece in _pieces(send, send_counts)]
        pending = receives + sends
        statuses = [MPI.Status() for _ in pending]
        is_done = False
        try:
            is_done = _wait_all([request for _, _, request in pending], statuses, timeout_s)
        except MPI.Exception as error:
            self._broken = _counts_disagree(str(error))
            raise self._broken from error
        finally:
            if not is_done:  # also interrupted
                _quarantine.append((send, recv, pending))
                self._broken = self._broken or BootstrapError("alltoallv", got="an interrupt while it waited")
        if not is_done:
            self._broken = self._timeout(pending, time.monotonic() - started)
            raise self._broken
        for (peer, piece, _), status in zip(receives, statuses, strict=False):
            if status.Get_count(MPI.BYTE) != piece.size:
                self._broken = _counts_disagree(
                    f"{status.Get_count(MPI.BYTE)} bytes from rank {peer}, not {piece.size}"
                )
                raise self._broken

    def abort(self, code: int) -> None:
        """End the whole job, not only this communicator's ranks."""
        MPI.COMM_WORLD.Abort(code)

    @property
    def is_broken(self) -> bool:
        """An exchange did not end on this rank, so that peers' messages may arrive at a later call."""
        return self._broken is not None or any(child.is_broken for child in self._splits.values())

    def free(self) -> None:
        """Free the duplicate and everything split from it. Collective.

        MPI keeps what unfinished messages need. Later calls raise BootstrapError.
        """
        for child in self._splits.values():
            child.free()
        self._splits.clear()
        self._mpi_comm.Free()

    def _usable(self) -> MPI.Intracomm:
        if self._broken is not None:
            raise BootstrapError(
                "communicator", got="an earlier exchange that failed", do="make a new Buffer on all ranks"
            ) from self._broken
        if self._mpi_comm == MPI.COMM_NULL:
            raise BootstrapError(
                "communicator", got="one that was freed", do="free a communicator after the Buffers that use it"
            )
        _require_thread_level()
        return self._mpi_comm

    def _timeout(self, pending: Sequence[_Message], elapsed_s: float) -> PeerTimeout:
        late = {peer for peer, _, request in pending if not request.Test()}
        return PeerTimeout(
            "alltoallv", phase="messages", waiting_rank=self.rank, awaited_ranks=sorted(late), elapsed_s=elapsed_s
        )


def adapt(comm: MPI.Comm) -> MpiCommunicator:
    """The adapter of an mpi4py communicator, always the same one for one MPI handle.

    Collective over `comm`, on which the ranks agree that the duplicate is still in step; after a timeout on
    any rank they make a new one.

    Raises:
        InputError: an intercommunicator, or ``COMM_NULL``.
        WrongLauncher: the launcher started several ranks and MPI sees one.
        BootstrapError: MPI is not initialised, already finalised, or was initialised without the thread
            support that calls from this thread need.
    """
    if not MPI.Is_initialized() or MPI.Is_finalized():
        state = "finalised" if MPI.Is_finalized() else "not initialised"
        raise BootstrapError("MPI", got=f"MPI {state}", wanted="MPI running", do="call MPI.Init_thread() before epcomm")
    if comm == MPI.COMM_NULL or isinstance(comm, MPI.Intercomm):
        got = "COMM_NULL" if comm == MPI.COMM_NULL else "an intercommunicator"
        raise InputError("comm", got=got, wanted="an intracommunicator", do="use comm.Merge() on an intercommunicator")
    if comm != MPI.COMM_SELF:
        _check_launcher()
    _require_thread_level()
    known = cast("MpiCommunicator | None", comm.Get_attr(_keyval()))
    is_unusable = known is None or known.is_broken
    if comm.allreduce(is_unusable, MPI.LOR) or known is None:
        known = MpiCommunicator(_prepare(MPI.Intracomm(comm).Dup()))
        comm.Set_attr(_keyval(), known)
    return known


def _prepare(comm: MPI.Intracomm) -> MPI.Intracomm:
    comm.Set_errhandler(MPI.ERRORS_RETURN)  # as Python exceptions
    return comm


def _keyval() -> int:
    global _keyval_handle
    if _keyval_handle is None:
        _keyval_handle = MPI.Comm.Create_keyval(delete_fn=_free_with_owner)
    return _keyval_handle


_keyval_handle: int | None = None


def _free_with_owner(_comm: MPI.Comm, _keyval: int, adapter: MpiCommunicator) -> None:
    """MPI frees the user's communicator (collective, so ours may follow), or the attribute was replaced."""
    adapter.free()


def _check_launcher() -> None:
    num_started = env.launcher_size()
    if MPI.COMM_WORLD.Get_size() > 1 or num_started == 1:
        return
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    try:
        advice = f"start with the mpirun of that library, such as {find_mpirun().path}"
    except MpiMissing:
        advice = "start with the mpirun of that library"
    raise WrongLauncher(
        "MPI",
        got=f"a world of one rank from a launcher that started {num_started}",
        wanted=f"the launcher of the MPI library in use, {library}",
        do=f"{advice}, or use `epcomm run`",
    )


def _require_thread_level() -> None:
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
        raise BootstrapError(
            "MPI thread support",
            got="a call from another thread than the one that initialised MPI",
            wanted="MPI_THREAD_SERIALIZED or MPI_THREAD_MULTIPLE",
            do="set mpi4py.rc.thread_level = 'multiple' before importing MPI, or call from the main thread",
        )


def _counts_disagree(found: str) -> BootstrapError:
    return BootstrapError("alltoallv", got=found, wanted="recv_counts equal to what the peers send")


def _pieces(array: NDArray[np.uint8], counts: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(peer, piece) over the segments of `array`, in order: one or more a peer, none longer than `CHUNK_BYTES`."""
    start = 0
    for peer, count in enumerate(counts):
        for first in range(start, start + max(count, 1), CHUNK_BYTES):
            yield peer, array[first : min(first + CHUNK_BYTES, start + count)]
        start += count


def _wait_all(requests: list[MPI.Request], statuses: list[MPI.Status], timeout_s: float | None) -> bool:
    """True when all are complete, False when the time ran out first."""
    started = time.monotonic()
    while not MPI.Request.Testall(requests, statuses):
        elapsed_s = time.monotonic() - started
        if timeout_s is not None and elapsed_s > timeout_s:
            return False
        if elapsed_s > SPIN_S:
            # Testall has released the GIL; time.sleep(0) would add the kernel's timer slack (50 us) to every poll.
            os.sched_yield()
    return True
