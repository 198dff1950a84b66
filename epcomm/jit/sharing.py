"""One rank of a host compiles for all of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from epcomm.errors import BootstrapError, EpcommError
from epcomm.jit.cache import cached_cubin, held_cubin, hold
from epcomm.jit.compiler import Program
from epcomm.jit.source import source_digest

__all__ = ["share_cubins"]

# NVRTC compiles in several threads at once, up to a point.
_MAX_THREADS = 4


class Ranks(Protocol):
    """What is used of a communicator."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def allgather(self, obj: Any) -> list[Any]: ...


@dataclass(frozen=True)
class _Offer:
    """What one rank tells the others: what it lacks, or has compiled, or why it cannot."""

    group: tuple[str, str]
    sources: str = ""
    lacking: tuple[Program, ...] = ()
    cubins: tuple[tuple[Program, bytes], ...] = ()
    error: Exception | None = None


def share_cubins(
    comm: Ranks, hosts: Sequence[str], programs: Iterable[Program], architecture: str
) -> dict[Program, bytes]:
    """The cubins of `programs`, for this rank's GPU. Collective, blocks the host.

    Among the ranks with the same host and architecture the lowest one compiles (or finds in the disk cache) what any
    of them lacks. When none lacks anything, because an earlier Buffer had it, this is one small allgather.

    Args:
        comm: the ranks.
        hosts: the host of every rank of `comm`.
        programs: what this rank needs; ranks may need different ones.
        architecture: as for `compile_program`, of this rank's GPU.

    Raises:
        CompileError, MissingDependency: on all ranks, if it was raised on one.
        BootstrapError: another rank failed with an error that is not epcomm's.
    """
    wanted = tuple(dict.fromkeys(programs))
    group = (hosts[comm.rank], architecture)
    own = _attempt(group, lambda: _look(group, wanted))
    offers = _exchange(comm, own)
    sources = own.sources
    if any(offer.lacking for offer in offers):
        members = [rank for rank, offer in enumerate(offers) if offer.group == group]
        lacking = dict.fromkeys(program for rank in members for program in offers[rank].lacking)
        is_compiler = comm.rank == members[0]
        own = _attempt(group, lambda: _compile(group, sources, list(lacking))) if is_compiler else _Offer(group)
        for offer in _exchange(comm, own):
            for program, cubin in offer.cubins if offer.group == group else ():
                hold(program, architecture, sources, cubin)
    return {program: cached_cubin(program, architecture, sources) for program in wanted}


def _look(group: tuple[str, str], wanted: Iterable[Program]) -> _Offer:
    sources = source_digest()
    lacking = tuple(program for program in wanted if held_cubin(program, group[1], sources) is None)
    return _Offer(group, sources, lacking)


def _compile(group: tuple[str, str], sources: str, programs: list[Program]) -> _Offer:
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), max(1, len(programs)))
    with ThreadPoolExecutor(num_threads, "epcomm-nvrtc") as threads:
        cubins = list(threads.map(lambda program: cached_cubin(program, group[1], sources), programs))
    return _Offer(group, sources, cubins=tuple(zip(programs, cubins, strict=True)))


def _attempt(group: tuple[str, str], work: Callable[[], _Offer]) -> _Offer:
    """Errors are told to the others first: they wait for this rank."""
    try:
        return work()
    except Exception as error:
        return _Offer(group, error=error)


def _exchange(comm: Ranks, own: _Offer) -> list[_Offer]:
    """The offers of all ranks; raises on every rank if one of them failed."""
    told = own if own.error is None else _Offer(own.group, error=_portable(own.error, comm.rank))
    offers: list[_Offer] = comm.allgather(told)
    if own.error is not None:
        raise own.error
    for offer in offers:
        if offer.error is not None:
            raise copy.copy(offer.error)  # ranks that are threads must not share one exception
    return offers


def _portable(error: Exception, rank: int) -> EpcommError:
    """`error` as the other ranks will raise it; an object that survives the way there."""
    try:
        portable = copy.copy(error) if isinstance(error, EpcommError) else None
    except TypeError:  # its constructor takes something else than a message
        portable = None
    if portable is None:
        text = f"{type(error).__name__} on rank {rank}: {error}"
        return BootstrapError("kernels", got=text, do="look at that error first")
    portable.add_note(f"raised on rank {rank}")
    return portable
