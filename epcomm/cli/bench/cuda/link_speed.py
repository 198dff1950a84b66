"""What the links between the GPUs of one host give: to plain copies, and to rows that SMs write or read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from epcomm.bootstrap import Communicator
from epcomm.bootstrap.topology import host_identity
from epcomm.errors import BootstrapError
from epcomm.jit import Kernel, device_architecture, max_shared_bytes, share_cubins
from epcomm.kernels import link_probe
from epcomm.kernels.arguments import Arguments
from epcomm.kernels.layout import MAX_RANKS
from epcomm.kernels.rows import stage_memory
from epcomm.memory import SymmetricMemory

__all__ = ["RowSpeeds", "peer_copy_speed", "row_speeds"]

_PEER_BYTES, _NUM_COPIES = 256 << 20, 8
_DEFAULT_KIND = 4  # cudaMemcpyDefault: the addresses tell where memory is
_BULK_ARCHITECTURE = 90  # the first with a copy engine in the SM


class RowSpeeds(NamedTuple):
    """Bytes a second of rows that SMs move between GPUs, all ranks at once: of the slowest."""

    written: float
    read: float


def peer_copy_speed(cupy: Any, comm: Communicator, stream: Any) -> float:
    """Bytes a second of a large copy to the memory of the next rank, all ranks at once: of the slowest.

    Collective, blocks the host.
    """
    device = cupy.cuda.Device().id
    with SymmetricMemory(comm, _PEER_BYTES, device) as memory:
        source = cupy.zeros(_PEER_BYTES, np.uint8)
        target = memory.bases[(comm.rank + 1) % comm.size]

        def copy() -> None:
            cupy.cuda.runtime.memcpyAsync(target, source.data.ptr, _PEER_BYTES, _DEFAULT_KIND, stream.ptr)

        return _NUM_COPIES * _PEER_BYTES / _slowest_s(cupy, comm, stream, copy)


def row_speeds(cupy: Any, comm: Communicator, stream: Any, num_sms: int, row_bytes: int) -> RowSpeeds:
    """Rows to and from all other ranks by turns, moved by `num_sms` SMs of each GPU; the bytes that arrive are checked.

    Collective, blocks the host.

    Args:
        cupy: the module.
        comm: the ranks, on GPUs that reach each other.
        stream: in which it runs.
        num_sms: blocks of the kernel.
        row_bytes: of a row, a multiple of 16.

    Raises:
        BootstrapError: a row did not arrive, or is of another rank.
    """
    device = cupy.cuda.Device().id
    architecture = device_architecture(device)
    cubins = share_cubins(comm, comm.allgather(host_identity()), [link_probe.PROGRAM], architecture)
    kernel = Kernel(cubins[link_probe.PROGRAM], link_probe.ENTRY, device)
    memory_bytes = stage_memory(max_shared_bytes(device)) if int(architecture) >= _BULK_ARCHITECTURE else 0
    shape, num_rows = link_probe.shape(row_bytes, memory_bytes), _PEER_BYTES // row_bytes
    if memory_bytes:
        kernel.allow_shared(shape.shared_bytes)
    arguments = Arguments(b"", link_probe.FIELDS)
    peers = cupy.asarray(link_probe.peers_of(comm.rank, comm.size, num_rows))
    speeds = []
    with SymmetricMemory(comm, _PEER_BYTES, device) as memory, stream:
        region = cupy.cuda.UnownedMemory(memory.bases[comm.rank], _PEER_BYTES, memory, device)
        words = num_rows, row_bytes // 8
        there = cupy.ndarray(words, np.uint64, cupy.cuda.MemoryPointer(region, 0))
        here = cupy.zeros(words, np.uint64)
        for is_reading in (False, True):
            (there if is_reading else here)[:, -1] = comm.rank + 1  # whose it is
            (here if is_reading else there)[:, -1] = 0
            stream.synchronize()

            def move(is_reading: bool = is_reading) -> None:
                bases = (*memory.bases, *[0] * (MAX_RANKS - comm.size))
                fields = (*bases, here.data.ptr, *shape.pieces, num_rows, comm.rank, comm.size, is_reading, 0)
                kernel.launch(num_sms, shape.threads, shape.shared_bytes, stream.ptr, arguments.fill(fields))

            elapsed_s = _slowest_s(cupy, comm, stream, move)
            speeds.append(_NUM_COPIES * num_rows * row_bytes / elapsed_s)
            whose = (here if is_reading else there)[:, -1].copy()
            is_right = bool((whose == peers + 1).all()) if is_reading else _came_from_writers(cupy, comm, whose)
            if not all(comm.allgather(is_right)):
                raise BootstrapError("link probe", got="rows of the wrong ranks", wanted="each from where it was sent")
        stream.synchronize()
        comm.barrier()
    return RowSpeeds(*speeds)


def _came_from_writers(cupy: Any, comm: Communicator, whose: Any) -> bool:
    """Whether every row says that it is of a rank that writes there, or is empty where none does."""
    is_right = cupy.zeros(len(whose), np.bool_)
    is_written = cupy.zeros(len(whose), np.bool_)
    for rank in set(range(comm.size)) - {comm.rank}:
        writes = cupy.asarray(link_probe.peers_of(rank, comm.size, len(whose)) == comm.rank)
        is_written |= writes
        is_right |= writes & (whose == rank + 1)
    return bool((is_right | (~is_written & (whose == 0))).all())


def _slowest_s(cupy: Any, comm: Communicator, stream: Any, move: Any) -> float:
    """Seconds of `_NUM_COPIES` moves behind as many others, all ranks at once: of the slowest."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    comm.barrier()
    for number in range(2 * _NUM_COPIES):  # of which the second half counts
        if number == _NUM_COPIES:
            start.record(stream)
        move()
    end.record(stream)
    stream.synchronize()
    elapsed_ms = cupy.cuda.get_elapsed_time(start, end)
    return float(max(comm.allgather(elapsed_ms))) / 1e3  # nobody moves any more when all have answered
