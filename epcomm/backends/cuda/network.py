"""A look at NVSHMEM between the ranks: messages around a ring of them, compared word by word, and timed."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import Communicator, host_identity
from epcomm.errors import BufferBroken, ShapeError
from epcomm.jit import Kernel, current_device, device_architecture, load_cupy, share_cubins
from epcomm.kernels import network_probe
from epcomm.kernels.arguments import Arguments
from epcomm.memory.nvshmem import NvshmemGroup

__all__ = ["NetworkProbe", "ProbeResult"]

_UNIT = 16


class ProbeResult(NamedTuple):
    """What one rank has seen.

    Attributes:
        problem: what went wrong, ``""`` if nothing did.
        num_done: rounds that ended well.
        elapsed_ns: `[num_done]`, uint64: from the put until the next rank's answer, a message there and a word back.
    """

    problem: str
    num_done: int
    elapsed_ns: NDArray[np.uint64]


class NetworkProbe:
    """Room and kernel for messages of up to `max_bytes`. Collective, blocks the host; so are its methods.

    Args:
        comm: the ranks, at least one. In the ring, the rank after the last one is the first.
        group: NVSHMEM among them.
        max_bytes: rounded up to a multiple of 16.

    Raises:
        CompileError, MissingDependency: the kernel cannot be made.
        CapacityError: the symmetric heap has no room for three messages.
    """

    def __init__(self, comm: Communicator, group: NvshmemGroup, max_bytes: int) -> None:
        self._comm, self._group, self._max_bytes = comm, group, -(-max_bytes // _UNIT) * _UNIT
        hosts = comm.allgather(host_identity())
        program, device = network_probe.PROGRAM, group.device
        cubin = share_cubins(comm, hosts, [program], device_architecture(device))[program]
        self._kernel = Kernel(cubin, network_probe.ENTRY, device)
        group.register_module(self._kernel.module)
        self._cells = group.allocate(network_probe.heap_bytes(self._max_bytes))
        self._arguments = Arguments(b"", network_probe.FIELDS)
        self._num_rounds = 0  # so far
        self._is_broken = False

    @property
    def received(self) -> int:
        """Address of the last message that came."""
        return self._cells + network_probe.CELLS_BYTES + self._num_rounds % 2 * self._max_bytes

    def expected(self, num_bytes: int) -> NDArray[np.uint64]:
        """What that message says."""
        return network_probe.pattern(num_bytes, self._num_rounds, (self._comm.rank - 1) % self._comm.size)

    def run(self, num_bytes: int, num_rounds: int, *, by_block: bool = False, timeout_s: float = 10.0) -> ProbeResult:
        """Send `num_rounds` messages of `num_bytes` to the next rank, and receive as many.

        Args:
            num_bytes: a multiple of 16, at most `max_bytes`; the same on all ranks, as is `num_rounds`.
            num_rounds: at least 1.
            by_block: all threads of a block send; otherwise one warp does.
            timeout_s: longest wait for a message or its answer.

        Raises:
            BufferBroken: an earlier run ended badly: late words may still come.
        """
        if self._is_broken:
            raise BufferBroken("network probe", got="an earlier run that ended badly", do="make a new one")
        if not 0 < num_bytes <= self._max_bytes or num_bytes % _UNIT:
            raise ShapeError("num_bytes", got=num_bytes, wanted=f"a multiple of {_UNIT} up to {self._max_bytes}")
        cupy, rank, size = load_cupy(), self._comm.rank, self._comm.size
        pes, areas = self._group.pe_of_rank, self._cells + network_probe.CELLS_BYTES
        ring = (rank, (rank - 1) % size, pes[(rank + 1) % size], pes[rank - 1])
        with current_device(self._group.device), cupy.cuda.Stream(non_blocking=True) as stream:
            report = cupy.empty(network_probe.REPORT.size, np.uint8)
            elapsed_ns = cupy.zeros(num_rounds, np.uint64)
            where = (areas, areas + 2 * self._max_bytes, self._cells, report.data.ptr, elapsed_ns.data.ptr)
            what = (self._max_bytes, num_bytes, math.ceil(timeout_s * 1e9), self._num_rounds + 1, num_rounds)
            arguments = self._arguments.fill((*where, *what, *ring, by_block))
            self._kernel.launch(1, network_probe.THREADS, 0, stream.ptr, arguments)
            seen = network_probe.Report.read(report.get().tobytes())
            times = elapsed_ns.get()
        self._num_rounds += num_rounds
        problem = network_probe.ERRORS[seen.error]
        if problem:
            problem += f" (PE {seen.awaited_pe}) within {timeout_s:g} s, in round {seen.num_done + 1}"
        elif seen.num_wrong:
            problem = f"{seen.num_wrong} words of {seen.num_done} messages did not arrive as they were sent"
        self._is_broken = seen.error != 0
        return ProbeResult(problem, seen.num_done, times[: seen.num_done])

    def close(self) -> None:
        """Give the heap back when all ranks are through; after a bad run it stays, since late words may come."""
        self._comm.barrier()
        if not any(self._comm.allgather(self._is_broken)):
            self._group.free(self._cells)
