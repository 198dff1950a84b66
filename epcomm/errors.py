"""Every exception epcomm raises on purpose.

::

    EpcommError
    ├── InputError (ValueError)        an argument of this call, on this rank
    │   ├── DtypeError
    │   ├── ShapeError
    │   ├── DeviceError                array on a device the backend cannot use
    │   ├── LayoutError                not contiguous, or not 16-byte aligned
    │   ├── RoutingError               expert index out of range or repeated, counts that disagree
    │   ├── HandleError                handle of another Buffer, or of another shape
    │   ├── CapacityError              more tokens, or rows, than were declared
    │   └── ImmutableArray             an array that must not be written (JAX)
    ├── RankMismatch (ValueError)      ranks disagree about what must be equal on all of them
    ├── PeerError (RuntimeError)       another rank rejected its input in this same call
    ├── UnsupportedOption              an option this release does not have
    ├── MissingDependency (ImportError)
    ├── CompileError (RuntimeError)    a CUDA source was rejected by the compiler
    ├── BootstrapError (RuntimeError)
    │   ├── MpiMissing                 no MPI library was found
    │   └── WrongLauncher              N worlds of one rank instead of one world of N
    ├── BufferStateError (RuntimeError)
    │   ├── BufferDestroyed
    │   ├── BufferBroken               an earlier timeout or interrupt broke this Buffer for good
    │   ├── ConcurrentUse              two threads inside one Buffer
    │   ├── ForkedProcess              a Buffer made before os.fork()
    │   └── RingFull                   a third unreceived send
    └── PeerTimeout (TimeoutError)     peers did not answer in time; names them

A message says what was got, what was wanted and what to do:
``x: got dtype float64; wanted bfloat16, float16 or float32; cast it first``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "BootstrapError",
    "BufferBroken",
    "BufferDestroyed",
    "BufferStateError",
    "CapacityError",
    "CompileError",
    "ConcurrentUse",
    "DeviceError",
    "DtypeError",
    "EpcommError",
    "ForkedProcess",
    "HandleError",
    "ImmutableArray",
    "InputError",
    "LayoutError",
    "MissingDependency",
    "MpiMissing",
    "PeerError",
    "PeerTimeout",
    "RankMismatch",
    "RingFull",
    "RoutingError",
    "ShapeError",
    "UnsupportedOption",
    "WrongLauncher",
]


class EpcommError(Exception):
    """Base of every exception of this package.

    Args:
        what: the argument, call or thing that is wrong.
        got: what was found there.
        wanted: what was expected.
        do: what the caller can do about it.
    """

    def __init__(self, what: str, *, got: object = None, wanted: object = None, do: str | None = None) -> None:
        parts = [f"got {got}" if got is not None else "", f"wanted {wanted}" if wanted is not None else "", do or ""]
        tail = "; ".join(part for part in parts if part)
        super().__init__(f"{what}: {tail}" if tail else what)


class InputError(EpcommError, ValueError):
    """An argument of this call cannot be used."""


class DtypeError(InputError):
    """An array has a dtype the operation does not take."""


class ShapeError(InputError):
    """An array or a size has the wrong shape or value."""


class DeviceError(InputError):
    """An array lies on a device that the Buffer's backend cannot use."""


class LayoutError(InputError):
    """An array is not contiguous, or not aligned to 16 bytes."""


class RoutingError(InputError):
    """Expert indices or routing counts contradict each other or the number of experts."""


class HandleError(InputError):
    """A handle belongs to another Buffer, another mode, or other shapes."""


class CapacityError(InputError):
    """More tokens or rows than the size that was declared for them."""


class ImmutableArray(InputError):
    """The call would write into an array that its framework promises never changes."""


class RankMismatch(EpcommError, ValueError):
    """Ranks called the same operation with values that must be equal, and are not.

    Attributes:
        table: for each differing name, the value of every rank.
    """

    def __init__(self, what: str, table: Mapping[str, Sequence[Any]]) -> None:
        self.table = {name: list(values) for name, values in table.items()}
        rows = "; ".join(
            f"{name} = " + ", ".join(f"{value} (rank {rank})" for rank, value in enumerate(values))
            for name, values in self.table.items()
        )
        super().__init__(what, got=rows, wanted="the same value on every rank", do="make the ranks agree")


class PeerError(EpcommError, RuntimeError):
    """Another rank rejected its input, so the operation did not happen on any rank.

    Attributes:
        ranks: the ranks that rejected their input.
    """

    def __init__(self, what: str, messages: Mapping[int, str]) -> None:
        self.ranks = sorted(messages)
        listed = "; ".join(f"rank {rank}: {messages[rank]}" for rank in self.ranks)
        super().__init__(what, got=f"bad input on {listed}", do="correct it there; this Buffer stays usable")


class UnsupportedOption(EpcommError):
    """The option exists in the API but not in this release; nothing was done."""


class MissingDependency(EpcommError, ImportError):
    """An optional package is needed; the message has the pip line."""


class CompileError(EpcommError, RuntimeError):
    """The run-time compiler rejected a CUDA source; the message has the log's errors.

    Attributes:
        options: the options of the compiler.
        log: all that it said.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        wanted: object = None,
        do: str | None = None,
        options: Sequence[str] = (),
        log: str = "",
    ) -> None:
        self.options, self.log = list(options), log
        super().__init__(what, got=got, wanted=wanted, do=do)


class BootstrapError(EpcommError, RuntimeError):
    """The ranks could not find each other."""


class MpiMissing(BootstrapError):
    """mpi4py found no MPI library."""


class WrongLauncher(BootstrapError):
    """The launcher belongs to another MPI, so every process is alone in its world."""


class BufferStateError(EpcommError, RuntimeError):
    """The Buffer cannot be used in its present state."""


class BufferDestroyed(BufferStateError):
    """The Buffer was destroyed."""


class BufferBroken(BufferStateError):
    """A timeout or an interrupt left this Buffer out of step with its peers for good."""


class ConcurrentUse(BufferStateError):
    """A second thread entered the Buffer while a call was running."""


class ForkedProcess(BufferStateError):
    """The Buffer was made by the parent of this forked process."""


class RingFull(BufferStateError):
    """Both slots of a ring hold sends whose receive half has not run."""


class PeerTimeout(EpcommError, TimeoutError):
    """Peers did not reach a phase of an operation within the Buffer's timeout.

    Attributes:
        waiting_rank: the rank that gave up.
        awaited_ranks: the ranks it was waiting for.
        operation: name of the operation.
        phase: the phase it was waiting in.
        elapsed_s: seconds waited.
    """

    def __init__(
        self,
        operation: str,
        *,
        phase: str,
        waiting_rank: int,
        awaited_ranks: Sequence[int],
        elapsed_s: float,
        reason: str = "no answer",
        do: str = "look at those ranks first; raise EPCOMM_TIMEOUT_S if they are only slow",
    ) -> None:
        self.operation, self.phase, self.waiting_rank = operation, phase, waiting_rank
        self.awaited_ranks, self.elapsed_s = list(awaited_ranks), elapsed_s
        names = ", ".join(f"rank {rank}" for rank in self.awaited_ranks)
        super().__init__(
            f"{operation}, phase {phase!r}",
            got=f"{reason} from {names} after {elapsed_s:.1f} s (waiting: rank {waiting_rank})",
            wanted="every rank to make the same call",
            do=do,
        )
