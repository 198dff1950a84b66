"""The one thing epcomm asks of a launcher: a `Communicator` between the ranks.

`as_communicator` turns whatever the user has (nothing, an mpi4py communicator, an own object) into one.
MPI is loaded there and nowhere else, because importing ``mpi4py.MPI`` initialises MPI.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from epcomm import env
from epcomm.errors import BootstrapError, InputError, MpiMissing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Communicator", "SoloCommunicator", "as_communicator"]

MPI_PIP_LINE = "pip install 'epcomm[mpi]'"


@runtime_checkable
class Communicator(Protocol):
    """A fixed group of ranks that make the same calls in the same order.

    Every method but `abort` is collective and blocks the host. One thread at a time per communicator.
    """

    @property
    def rank(self) -> int:
        """This rank, 0 <= rank < size."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def allgather(self, obj: Any) -> list[Any]:
        """The objects of all ranks, in rank order. They must be picklable."""

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """The object of rank `root`; the others' `obj` is ignored."""

    def barrier(self) -> None:
        """Return when every rank has called."""

    def split(self, color: int, key: int) -> Communicator:
        """The communicator of the ranks with the same `color` (>= 0), ordered by `key`, then by rank."""

    def alltoallv(
        self,
        send: NDArray[np.uint8],
        send_counts: Sequence[int],
        recv: NDArray[np.uint8],
        recv_counts: Sequence[int],
        timeout_s: float | None = None,
    ) -> None:
        """Exchange one segment of bytes with every rank.

        Args:
            send: 1-D uint8, contiguous: the segments for ranks 0, 1, ... one after another.
            send_counts: bytes for each rank; ``send_counts[d]`` here equals ``recv_counts[s]`` at rank d.
            recv: 1-D uint8, contiguous, written: the segments from ranks 0, 1, ... one after another.
            recv_counts: bytes from each rank.
            timeout_s: seconds to wait for the peers, None: for ever.

        Raises:
            TimeoutError: the time ran out. The communicator is out of step with its peers from then on, and
                `send` and `recv` may still be read and written by them: do not reuse that memory.
        """

    def abort(self, code: int) -> None:
        """End all ranks with exit status `code`. Does not return. Not collective."""


class SoloCommunicator:
    """A world of one rank, without MPI."""

    rank = 0
    size = 1

    def __repr__(self) -> str:
        return "SoloCommunicator()"

    def allgather(self, obj: Any) -> list[Any]:
        return [obj]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        check_root(root, self.size)
        return obj

    def barrier(self) -> None:
        return

    def split(self, color: int, key: int) -> SoloCommunicator:
        check_colors([color])
        return self

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
        if send_counts[0] != recv_counts[0]:
            raise InputError("alltoallv", got=f"send_counts {send_counts}, recv_counts {recv_counts}", wanted="equal")
        recv[: recv_counts[0]] = send[: send_counts[0]]

    def abort(self, code: int) -> None:
        sys.exit(code)


def as_communicator(comm: object = None) -> Communicator:
    """The `Communicator` for what the user passed as ``comm``.

    Collective over an mpi4py communicator (it is duplicated once, and the ranks agree that the duplicate
    is still in step). Loads MPI only for None and for mpi4py communicators.

    Args:
        comm: None for all ranks of the job (the MPI world, or this process alone where there is no MPI),
            an mpi4py intracommunicator, or an object with the methods of `Communicator`.

    Raises:
        InputError: something else was passed, or an intercommunicator, or ``COMM_NULL``.
        MpiMissing: the launcher started several ranks and no MPI library was found.
        WrongLauncher: the launcher belongs to another MPI, so that every rank is alone.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(comm, mpi.Comm):
        return _from_mpi(comm)
    if comm is None:
        return _world()
    if isinstance(comm, Communicator):
        return comm
    raise InputError(
        "comm",
        got=f"an object of type {type(comm).__name__}",
        wanted="None, an mpi4py communicator, or an object with rank, size, allgather, bcast, barrier, split, "
        "alltoallv and abort",
        do="leave it out to use all ranks of the job",
    )


def check_root(root: int, size: int) -> None:
    """Raise InputError unless `root` is a rank."""
    if not 0 <= root < size:
        raise InputError("root", got=root, wanted=f"a rank, 0 to {size - 1}")


def check_colors(colors: Sequence[int]) -> None:
    """Raise InputError on negative colours; given those of all ranks, all ranks raise alike."""
    if min(colors) < 0:
        raise InputError("split", got=f"colors {list(colors)} (by rank)", wanted="colors >= 0", do="use 0, 1, 2, ...")


def check_segments(name: str, array: NDArray[np.uint8], counts: Sequence[int], size: int) -> None:
    """Raise InputError unless `array` is contiguous bytes with room for `counts`, one count a rank."""
    if array.ndim != 1 or array.dtype.str != "|u1" or not array.flags.c_contiguous:
        raise InputError(name, got=f"{array.dtype} of shape {array.shape}", wanted="contiguous 1-D uint8")
    if len(counts) != size or min(counts) < 0 or sum(counts) > array.size:
        raise InputError(
            f"{name}_counts",
            got=f"{list(counts)} for {array.size} bytes",
            wanted=f"{size} counts >= 0 that fit",
        )


def _world() -> Communicator:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheel says RuntimeError: cannot load MPI library
        num_started = env.launcher_size()
        if num_started == 1:
            return SoloCommunicator()
        raise MpiMissing(
            "MPI",
            got=f"a launcher that started {num_started} ranks, and: {str(error).splitlines()[0]}",
            wanted="an MPI library that mpi4py can load",
            do=MPI_PIP_LINE,
        ) from error
    if not MPI.Is_initialized():
        raise BootstrapError("MPI", got="mpi4py loaded but not initialised", do="call MPI.Init_thread() before epcomm")
    return _from_mpi(MPI.COMM_WORLD)


def _from_mpi(comm: Any) -> Communicator:
    from epcomm.bootstrap.mpi import adapt

    return adapt(comm)
