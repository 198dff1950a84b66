"""What the links between the GPUs of one host give: to plain copies, and to rows that SMs write or read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class RowSpeeds(NamedTuple):
    """Bytes a second of rows that SMs move between GPUs and do nothing else, all ranks at once: of the slowest."""

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


def row_speeds(
    cupy: Any, comm: Communicator, stream: Any, num_sms: int, written_bytes: int, read_bytes: int
) -> RowSpeeds:
    """Rows to, and from, all other ranks, in an order that looks random; all bytes that arrive are checked.

    Collective, blocks the host.

    Args:
        cupy: the module.
        comm: the ranks, on GPUs that reach each other.
        stream: in which it runs.
        num_sms: blocks of the kernel.
        written_bytes, read_bytes: of a row that is written, or read; multiples of 16.

    Raises:
        BootstrapError: a row did not arrive, or is another one.
    """
    device = cupy.cuda.Device().id
    architecture = device_architecture(device)
    cubins = share_cubins(comm, comm.allgather(host_identity()), [link_probe.PROGRAM], architecture)
    kernel = Kernel(cubins[link_probe.PROGRAM], link_probe.ENTRY, device)
    stages = stage_memory(max_shared_bytes(device), architecture)
    if stages:
        kernel.allow_shared(stages)
    arguments = Arguments(b"", link_probe.FIELDS)
    speeds = []
    with SymmetricMemory(comm, _PEER_BYTES, device) as memory, stream:
        bases = (*memory.bases, *[0] * (MAX_RANKS - comm.size))
        region = cupy.cuda.UnownedMemory(memory.bases[comm.rank], _PEER_BYTES, memory, device)
        for row_bytes, is_reading in ((written_bytes, False), (read_bytes, True)):
            shape, num_rows = link_probe.shape(row_bytes, stages), _PEER_BYTES // row_bytes
            there = cupy.ndarray((num_rows, row_bytes // 8), np.uint64, cupy.cuda.MemoryPointer(region, 0))
            here = cupy.zeros(there.shape, np.uint64)
            source, target = (there, here) if is_reading else (here, there)
            source[...] = cupy.asarray(_rows_of(comm.rank, num_rows))[:, None]
            target[...] = 0
            stream.synchronize()
            fields = (*bases, here.data.ptr, *shape.pieces, num_rows, comm.rank, comm.size, is_reading, 0)
            launch = num_sms, shape.threads, shape.shared_bytes, stream.ptr, arguments.fill(fields)
            elapsed_s = _slowest_s(cupy, comm, stream, partial(kernel.launch, *launch))
            speeds.append(_NUM_COPIES * num_rows * row_bytes / elapsed_s)
            if not all(comm.allgather(_is_right(cupy, comm, target, is_reading))):
                raise BootstrapError("link probe", got="rows of the wrong ranks", wanted="each from where it was sent")
        stream.synchronize()
        comm.barrier()
    return RowSpeeds(*speeds)


def _rows_of(rank: int | NDArray[np.int64], num_rows: int) -> NDArray[np.uint64]:
    """``[num_rows]``: what every word of each row of a rank is, or of a rank for each row; never 0."""
    numbers: NDArray[np.uint64] = np.arange(num_rows, dtype=np.uint64) + (np.uint64(rank + 1) << np.uint64(32))
    return numbers


def _is_right(cupy: Any, comm: Communicator, target: Any, is_reading: bool) -> bool:
    """Whether every row is that of the rank it came from; a row to which nobody has written is empty."""
    num_rows = len(target)
    if is_reading:
        wanted = _rows_of(link_probe.peers_of(comm.rank, comm.size, num_rows), num_rows)
        return bool((target == cupy.asarray(wanted)[:, None]).all())
    writers = [rank for rank in range(comm.size) if rank != comm.rank]
    writes = [link_probe.peers_of(rank, comm.size, num_rows) == comm.rank for rank in writers]
    found = cupy.asnumpy(target[:, 0])
    is_right = ~np.any(writes, axis=0) & (found == 0)
    for rank, is_written in zip(writers, writes, strict=True):
        is_right |= is_written & (found == _rows_of(rank, num_rows))
    return bool(is_right.all()) and bool((target == cupy.asarray(found)[:, None]).all())


def _slowest_s(cupy: Any, comm: Communicator, stream: Any, move: Callable[[], object]) -> float:
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
