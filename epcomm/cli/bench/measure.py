"""Comparison with the reference, and the interleaved measurement of several operations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from epcomm.bootstrap import Communicator, Topology
from epcomm.cli.bench.links import Crossing, LinkTraffic
from epcomm.testing import bench

__all__ = ["Measured", "Operation", "Run", "digest", "find_differences", "measure"]

_WARMUP = 3


@dataclass(frozen=True)
class Operation:
    """One thing to measure.

    Attributes:
        name: its row in the table.
        run: the measured call. Collective.
        logical_bytes: bytes that it delivers to all ranks together, from their own memory included.
        wire_bytes: those of them that come from other ranks.
        baseline: name of the operation that it is compared with.
        before: called before each measured call; its time does not count.
        links: what it moves between ranks; None: nothing.
    """

    name: str
    run: Callable[[], object]
    logical_bytes: int
    wire_bytes: int
    baseline: str | None = None
    before: Callable[[], object] | None = None
    links: LinkTraffic | None = None


@dataclass(frozen=True)
class Measured:
    """The result for one operation; every repeat counts with its slowest rank, in seconds."""

    operation: Operation
    times_s: tuple[float, ...]

    @property
    def p50_s(self) -> float:
        """Median."""
        return float(np.percentile(self.times_s, 50))

    @property
    def p99_s(self) -> float:
        """99th percentile; nearly the largest when there are less than 100 repeats."""
        return float(np.percentile(self.times_s, 99))


@dataclass(frozen=True)
class Run:
    """What came out; the same on all ranks.

    Attributes:
        topology: of the job.
        backend: the backend that ran it.
        differences: what is wrong with results and counts; if there is anything, nothing was measured.
        measured: the operations, in the order of the table.
        crossing: rows between nodes; None in low-latency mode.
    """

    topology: Topology
    backend: str
    differences: Sequence[str]
    measured: Sequence[Measured]
    crossing: Crossing | None = None


def measure(operations: Sequence[Operation], comm: Communicator, repeats: int) -> list[Measured]:
    """Run all operations in turn, `repeats` times, so that a disturbance hits all of them alike. Collective."""
    times_s: list[list[float]] = [[] for _ in operations]
    for turn in range(_WARMUP + repeats):
        for operation, times in zip(operations, times_s, strict=True):
            result = bench(operation.run, warmup=0, repeats=1, comm=comm, before=operation.before)
            if turn >= _WARMUP:
                times.extend(result.times_s)
    return [Measured(operation, tuple(times)) for operation, times in zip(operations, times_s, strict=True)]


def digest(*arrays: Any) -> str:
    """A text that is equal for arrays of equal dtypes, shapes and bits."""
    found = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        found.update(f"{array.dtype.name} {array.shape} ".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def find_differences(
    comm: Communicator, got: Mapping[str, str], reference: Callable[[], Sequence[Mapping[str, str]]]
) -> list[str]:
    """Compare the digests of all ranks with those of the reference, which rank 0 computes. Collective.

    Args:
        comm: the ranks.
        got: this rank's digests, by name of the result.
        reference: the wanted ones, by rank; called on rank 0 only, which so needs the memory for all ranks' data.

    Returns:
        A line for every result that differs, on all ranks.
    """
    everyone = comm.allgather(dict(got))
    differences: list[str] = []
    if comm.rank == 0:
        for rank, (theirs, wanted) in enumerate(zip(everyone, reference(), strict=True)):
            names = sorted(theirs.keys() | wanted.keys())
            wrong = [name for name in names if theirs.get(name) != wanted.get(name)]
            differences += [f"{name} on rank {rank} differs from epcomm.reference" for name in wrong]
    return list(comm.bcast(differences))
