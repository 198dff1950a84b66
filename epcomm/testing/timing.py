"""Timing over ranks, and how a test program starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epcomm.errors import ShapeError

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator

__all__ = ["BenchResult", "bench", "init_dist", "run_local"]


@dataclass(frozen=True)
class BenchResult:
    """Times of one function; every repeat counts with its slowest rank.

    Attributes:
        p50_s: median, in seconds.
        p99_s: 99th percentile.
        mean_s: mean.
        min_s: fastest repeat.
        max_s: slowest repeat.
        slowest_rank: the rank that was last in the most repeats.
        times_s: all repeats, in the order they ran.
    """

    p50_s: float
    p99_s: float
    mean_s: float
    min_s: float
    max_s: float
    slowest_rank: int
    times_s: tuple[float, ...]


def bench(
    fn: Callable[[], object],
    *,
    warmup: int = 3,
    repeats: int = 20,
    comm: Communicator | None = None,
    before: Callable[[], object] | None = None,
) -> BenchResult:
    """Time a function on the host clock.

    Collective when `comm` is given: all ranks must use the same `warmup` and `repeats`, and get the same
    result.

    Args:
        fn: what is timed; must return when its work is done, so on a GPU it ends with a synchronisation.
        warmup: runs that are not counted.
        repeats: runs that are, at least 1.
        comm: ranks that run `fn` together; they meet in a barrier before each run.
        before: called before each run, and its barrier, untimed; to empty caches, say.

    Raises:
        ShapeError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ShapeError("repeats", got=repeats, wanted="at least 1")
    own_times = []
    for _ in range(warmup + repeats):
        if before is not None:
            before()
        if comm is not None:
            comm.barrier()
        start = time.perf_counter()
        fn()
        own_times.append(time.perf_counter() - start)
    own_times = own_times[warmup:]
    by_rank = np.array(comm.allgather(own_times) if comm is not None else [own_times])
    times = by_rank.max(axis=0)
    return BenchResult(
        p50_s=float(np.percentile(times, 50)),
        p99_s=float(np.percentile(times, 99)),
        mean_s=float(times.mean()),
        min_s=float(times.min()),
        max_s=float(times.max()),
        slowest_rank=int(np.bincount(by_rank.argmax(axis=0)).argmax()),
        times_s=tuple(times.tolist()),
    )


def init_dist(comm: Any = None) -> tuple[int, int, Communicator]:
    """Start MPI if need be and say who we are.

    Args:
        comm: an mpi4py communicator, an object with the `Communicator` protocol, or None for all ranks.

    Returns:
        ``(rank, size, communicator)``.

    Raises:
        BootstrapError: the ranks cannot find each other.
    """
    from epcomm.bootstrap import as_communicator

    communicator = as_communicator(comm)
    return communicator.rank, communicator.size, communicator


def run_local(n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
    """Run ``fn(comm, *args)`` on n ranks that are threads of this process: `epcomm.bootstrap.run_local`.

    Returns:
        The results, by rank.

    Raises:
        TimeoutError: a rank did not return in `timeout_s` seconds.
    """
    from epcomm import bootstrap

    return bootstrap.run_local(n, fn, *args, timeout_s=timeout_s)
