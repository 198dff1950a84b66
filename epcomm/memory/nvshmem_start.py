"""Starting NVSHMEM: one instance a process, which every Buffer that needs it joins.

The first call in a job starts it, among the ranks of that call, and it lasts until the processes end: NVSHMEM cannot be
started twice with other ranks.

Nothing ends it. Its own end is a barrier of all PEs, which would hang when a rank is gone, or late, or still holding
results: so no finalizer and no handler at interpreter exit calls the library. When a process ends, its context goes,
and the driver unmaps the heap and ends the connections; peers that map a part of it keep that memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from epcomm import env
from epcomm.bootstrap import Communicator, host_identity
from epcomm.errors import BootstrapError, CapacityError, ForkedProcess, RankMismatch, UnsupportedOption
from epcomm.jit import installed_nvshmem
from epcomm.memory import driver
from epcomm.memory.nvshmem_heap import UNIT, SymmetricHeap
from epcomm.memory.nvshmem_library import DEFAULT_QUEUE_PAIR, STATUS_NAMES, NvshmemLibrary
from epcomm.memory.together import agree

__all__ = ["Instance", "add_block", "dotted", "no_room", "start_or_join"]

_PAGE = 2 << 20  # of GPU memory
_SIZE_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", re.IGNORECASE)
_SIZE_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass
class Instance:
    """What a process has of NVSHMEM.

    Attributes:
        library: its host library.
        name: equal exactly on the ranks that were started together.
        pe: this process's number among them.
        num_pes: how many they are.
        device: CUDA device number.
        status: index into `STATUS_NAMES`.
        process: id of the process, which a fork does not have.
        heap: who has which part of the symmetric heap.
        modules: registered modules.
        queue_pairs: handles of those that were made; none: NVSHMEM chooses from its own.
    """

    library: NvshmemLibrary
    name: str
    pe: int
    num_pes: int
    device: int
    status: int
    process: int
    heap: SymmetricHeap = field(default_factory=SymmetricHeap)
    modules: set[int] = field(default_factory=set)
    queue_pairs: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Rank:
    """What a rank tells the others before they start or join."""

    host: str
    version: tuple[int, int, int]
    name: str | None
    heap_bytes: int
    num_queue_pairs: int


_instance: Instance | None = None
_library: NvshmemLibrary | None = None
_failure = ""  # of the start of this process, which cannot be repeated


def start_or_join(comm: Communicator, device: int, heap_bytes: int, num_queue_pairs: int) -> Instance:
    """See `epcomm.memory.nvshmem.nvshmem_group`. Collective, blocks the host."""
    failure: Exception | None = None
    own: _Rank | None = None
    try:
        own = _introduce(device, heap_bytes, num_queue_pairs)
    except Exception as error:
        failure = error
    agree(comm, failure, "NVSHMEM", wanted="NVSHMEM on every rank")
    ranks: list[_Rank] = comm.allgather(own)
    versions = [dotted(rank.version) for rank in ranks]
    if len(set(versions)) > 1:
        raise RankMismatch("NVSHMEM", {"version": versions})
    if all(rank.name is None for rank in ranks):
        return _start(comm, device, ranks)
    if len({rank.name for rank in ranks}) > 1:
        others = [str(r) for r, rank in enumerate(ranks) if rank.name != ranks[0].name]
        raise UnsupportedOption(
            "NVSHMEM",
            got=f"ranks {', '.join(others)} of this Buffer, which did not start it together with rank 0",
            wanted="all ranks from one start",
            do="make the first Buffer that crosses nodes with all ranks of the job",
        )
    assert _instance is not None
    return _instance


def _introduce(device: int, symmetric_bytes: int, num_queue_pairs: int) -> _Rank:
    """Look at what this process has; the library is loaded, but nothing is started."""
    global _library
    if _failure:
        do = "correct that, and start the processes again: NVSHMEM can be started once in each"
        raise BootstrapError("NVSHMEM", got=f"an earlier start that failed ({_failure})", do=do)
    if _instance is None:
        wheel = installed_nvshmem()
        _library = _library or NvshmemLibrary(wheel.host_library)
        if _library.status() > 0:
            raise UnsupportedOption(
                "NVSHMEM",
                got="a process in which another library has started it",
                wanted="to start it",
                do="make the Buffer in processes without that library",
            )
        if _library.version() != wheel.version:
            # The library of another wheel or system package was in the process under the same name.
            got = f"{dotted(_library.version())} loaded, {dotted(wheel.version)} installed"
            raise BootstrapError("NVSHMEM", got=got, wanted="one version", do="look at what else this process imports")
        with driver.in_context(device):  # a rank that cannot do that must not keep the others waiting in the library
            pass
        return _Rank(host_identity(), wheel.version, None, max(1, symmetric_bytes), num_queue_pairs)
    if _instance.process != os.getpid():
        raise ForkedProcess("NVSHMEM", got="a fork of the process that started it", do="start new processes instead")
    if _instance.device != device:
        got = f"cuda:{device}, started on cuda:{_instance.device}"
        raise UnsupportedOption("NVSHMEM", got=got, wanted="one GPU for a process", do="use the same device")
    return _Rank(host_identity(), _instance.library.version(), _instance.name, 0, 0)


def _start(comm: Communicator, device: int, ranks: Sequence[_Rank]) -> Instance:
    """Start NVSHMEM among the ranks of `comm`, allocate its heap, and make queue pairs."""
    global _instance, _failure
    wanted = max(rank.heap_bytes for rank in ranks)
    num_queue_pairs = max(rank.num_queue_pairs for rank in ranks)
    chosen = _bytes_of(env.lookup("NVSHMEM_SYMMETRIC_SIZE")) or 0
    _set_environment(wanted, num_queue_pairs, is_one_host=len({rank.host for rank in ranks}) == 1)
    failure: Exception | None = None
    try:
        _instance = _bootstrap(comm, device)
    except Exception as error:
        failure, _failure = error, str(error)
    try:
        agree(comm, failure, "NVSHMEM", wanted="NVSHMEM on every rank")
    except BaseException as error:
        _instance, _failure = None, _failure or str(error)
        raise
    assert _instance is not None
    try:
        start = add_block(comm, _instance, sorted({wanted, *comm.allgather(max(wanted, chosen))}, reverse=True))
        if num_queue_pairs > 0 and _instance.library.has_queue_pairs:
            _make_queue_pairs(comm, _instance, start, num_queue_pairs)
    except BaseException as error:
        _failure = str(error)
        raise
    return _instance


def _bootstrap(comm: Communicator, device: int) -> Instance:
    """The collective part of a start."""
    assert _library is not None
    unique_id = comm.bcast(_library.unique_id() if comm.rank == 0 else None)
    if unique_id is None:
        raise BootstrapError("NVSHMEM", got="no unique id on rank 0", do="set NVSHMEM_DEBUG=INFO and read what it says")
    with driver.in_context(device):
        started = _library.start(unique_id, comm.rank, comm.size)
        if not started.is_usable:
            status = STATUS_NAMES[started.status] if 0 <= started.status < len(STATUS_NAMES) else "unknown"
            raise BootstrapError(
                f"NVSHMEM {dotted(_library.version())} on cuda:{device}",
                got=f"code {started.code} and status {started.status} ({status})",
                wanted="code 0 and status 2, 3 or 4",
                do="set NVSHMEM_DEBUG=INFO and read what it says; if the ranks do not meet because it takes the wrong "
                "network interface, set NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",
            )
        name = hashlib.sha256(unique_id).hexdigest()
        pe, num_pes = _library.my_pe(), _library.num_pes()
    if (pe, num_pes) != (comm.rank, comm.size):
        raise BootstrapError("NVSHMEM", got=f"PE {pe} of {num_pes}", wanted=f"PE {comm.rank} of {comm.size}")
    return Instance(_library, name, pe, num_pes, device, started.status, os.getpid())


def _set_environment(heap_bytes: int, num_queue_pairs: int, *, is_one_host: bool) -> None:
    """Options that NVSHMEM reads when it starts; those that the user has set stay."""
    assert _library is not None
    size = -(-(heap_bytes + UNIT) // _PAGE) * _PAGE
    defaults = {"NVSHMEM_SYMMETRIC_SIZE": str(size), "NVSHMEM_DISABLE_NVLS": "1"}
    if num_queue_pairs > 0 and not _library.has_queue_pairs:
        # Where they are made, these would come on top, unused, and each takes some hundred kilobytes of the GPU.
        defaults["NVSHMEM_IBGDA_NUM_RC_PER_PE"] = str(num_queue_pairs)
    if is_one_host:
        defaults["NVSHMEM_REMOTE_TRANSPORT"] = "none"  # else it looks for NICs, and fails where a plugin is missing
    env.provide(defaults)


def _make_queue_pairs(comm: Communicator, instance: Instance, heap: int, count: int) -> None:
    """Make `count` queue pairs to every PE, if anything in the heap, which starts there, goes through the network."""
    library = instance.library
    with driver.in_context(instance.device):
        is_in_use = any(library.is_behind_network(heap, pe) for pe in range(instance.num_pes))
        # All or none: making them is collective. On one host NVSHMEM would say in a warning that it has made none.
        if not any(comm.allgather(is_in_use)):
            return
        made = library.create_queue_pairs(count)
    failure: Exception | None = None
    if made.code:
        failure = BootstrapError(
            f"NVSHMEM {dotted(library.version())}, {count} queue pairs to each of {instance.num_pes} PEs",
            got=f"code {made.code}",
            do="pass a smaller num_qps_per_rank, 0 for those that NVSHMEM has anyway; set NVSHMEM_DEBUG=INFO and read "
            "what it says",
        )
    agree(comm, failure, "NVSHMEM, queue pairs", wanted="them on every rank")
    instance.queue_pairs = tuple(handle for handle in made.handles if handle != DEFAULT_QUEUE_PAIR)


def add_block(comm: Communicator, instance: Instance, sizes: Sequence[int]) -> int:
    """Let the heap grow by the first of `sizes` for which there is room; collective over all PEs.

    Returns:
        Where the new block starts.

    Raises:
        CapacityError: there is room for none of them. On all ranks.
    """
    for wanted in sizes:
        num_bytes = -(-wanted // UNIT) * UNIT
        with driver.in_context(instance.device):
            start = instance.library.malloc(num_bytes + UNIT)
        starts = comm.allgather(start)
        if all(starts):
            # One step for all, or parts at the same offset were not symmetric; all heaps start at a page.
            step: int = -max(address % UNIT for address in starts) % UNIT
            instance.heap.add_block(start + step, num_bytes)
            return start + step
    raise no_room(sizes[-1], 0, sum(instance.heap.sizes))


def no_room(num_bytes: int, largest: int, total: int) -> CapacityError:
    """The error for a part that the heap does not have."""
    return CapacityError(
        "NVSHMEM, symmetric heap",
        got=f"a request for {num_bytes} bytes",
        wanted=f"at most {largest}, the largest free part of its {total} bytes that is not reserved for other ranks",
        do=f"set NVSHMEM_SYMMETRIC_SIZE to {total + num_bytes} or more before the first Buffer, make the Buffer of all "
        "ranks that needs most the first one, or pass a smaller num_rdma_bytes",
    )


def _bytes_of(text: str | None) -> int | None:
    """A size as NVSHMEM writes it: ``"1073741824"``, ``"512M"``, ``"1.5G"``. None: there is none."""
    match = _SIZE_TEXT.fullmatch((text or "").strip())
    return None if match is None else int(float(match[1]) * (1 << _SIZE_UNITS[match[2].lower()]))


def dotted(version: Sequence[int]) -> str:
    """A version as text."""
    return ".".join(map(str, version))
