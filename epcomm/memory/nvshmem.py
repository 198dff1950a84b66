"""NVSHMEM for the ranks of a Buffer: parts of the symmetric heap, and their numbers in NVSHMEM.

A process has one instance of it (see `epcomm.memory.nvshmem_start`); the ranks of a Buffer are some or all of those
that it was started with, under other numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from epcomm.bootstrap import Communicator, LocalCommunicator
from epcomm.errors import BootstrapError, InputError, RankMismatch, UnsupportedOption
from epcomm.memory import driver
from epcomm.memory.nvshmem_heap import first_fit, largest_gap
from epcomm.memory.nvshmem_library import STATUS_NAMES
from epcomm.memory.nvshmem_start import Instance, add_block, dotted, no_room, start_or_join
from epcomm.memory.together import agree

__all__ = ["NvshmemGroup", "nvshmem_group"]

_lock = threading.Lock()


def nvshmem_group(comm: Communicator, device: int, symmetric_bytes: int, num_queue_pairs: int = 0) -> NvshmemGroup:
    """NVSHMEM among the ranks of `comm`. Collective, blocks the host; every rank raises if one fails.

    The first call of a job starts it: its set-up of transports may take seconds, and has no bound. Of NVSHMEM's
    environment variables those that the user has not set are set then, and stay: ``NVSHMEM_SYMMETRIC_SIZE`` (from
    `symmetric_bytes`), ``NVSHMEM_DISABLE_NVLS=1`` (nothing here uses multicast, which fails where ranks share a GPU),
    ``NVSHMEM_REMOTE_TRANSPORT=none`` where all ranks are on one host, and before version 3.5
    ``NVSHMEM_IBGDA_NUM_RC_PER_PE`` (from `num_queue_pairs`).

    Args:
        comm: ranks that are processes, with one GPU each; several may share a GPU.
        device: CUDA device number of this process; the same in all calls.
        symmetric_bytes: what the ranks will allocate, at least; the maximum over them counts. Of the first call it is
            the size of the heap; ``NVSHMEM_SYMMETRIC_SIZE`` makes that larger. Later calls allocate more where all
            ranks of the job take part.
        num_queue_pairs: to each PE, for what kernels send through the network; the maximum over the ranks of the first
            call counts, and of later calls nothing. 0: what NVSHMEM has by itself. From version 3.5 on they are made
            here, and kernels choose from them, if some PE is behind a network; earlier ones choose themselves.

    Raises:
        UnsupportedOption: ranks that are threads; or NVSHMEM is there already, among other ranks or by somebody else.
        MissingDependency: NVSHMEM or the driver's bindings are not installed, or too old.
        RankMismatch: the ranks have different versions of it.
        BootstrapError: it did not start, here or on another rank.
        CapacityError: the GPU has no room for the heap.
        ForkedProcess: the parent of this forked process has started it.
    """
    if isinstance(comm, LocalCommunicator) and comm.size > 1:
        raise UnsupportedOption(
            "NVSHMEM",
            got="ranks that are threads of one process",
            wanted="a process for every rank",
            do="start the ranks with mpirun or `epcomm run`",
        )
    with _lock:
        instance = start_or_join(comm, device, symmetric_bytes, num_queue_pairs)
    return NvshmemGroup(comm, instance, comm.allgather(instance.pe))


class NvshmemGroup:
    """NVSHMEM as the ranks of one communicator see it; from `nvshmem_group`. One thread at a time.

    Attributes:
        pe: this rank's number in NVSHMEM, which has all ranks that it was started with.
        num_pes: how many these are.
        pe_of_rank: PE of each rank of the communicator.
        version: of NVSHMEM.
        device: CUDA device number.
        queue_pairs: handles that kernels may choose from; empty: NVSHMEM chooses.
    """

    def __init__(self, comm: Communicator, instance: Instance, pe_of_rank: Sequence[int]) -> None:
        self._comm, self._instance = comm, instance
        self.pe, self.num_pes, self.pe_of_rank = instance.pe, instance.num_pes, tuple(pe_of_rank)
        self.version, self.device = instance.library.version(), instance.device
        self.queue_pairs = instance.queue_pairs

    def __repr__(self) -> str:
        return f"NvshmemGroup({self._comm.size} of {self.num_pes} PEs, {STATUS_NAMES[self._instance.status]})"

    def allocate(self, num_bytes: int) -> int:
        """Symmetric memory on every rank. Collective over the communicator, blocks the host; all ranks raise alike.

        Args:
            num_bytes: the same on all ranks, at least 1.

        Returns:
            Address of the part on this rank, a multiple of 512. It holds zero bytes on all ranks when any rank returns.
            Kernels name a peer's by this rank's address and the peer's PE.

        Raises:
            InputError: `num_bytes` is not positive.
            RankMismatch: it differs between ranks.
            CapacityError: the heap has no such part, and cannot grow.
        """
        heap = self._instance.heap
        answers = self._comm.allgather((num_bytes, heap.taken_for(self.pe_of_rank)))
        sizes = [size for size, _ in answers]
        if len(set(sizes)) > 1:
            raise RankMismatch("NVSHMEM, allocate", {"num_bytes": sizes})
        if num_bytes < 1:
            raise InputError("num_bytes", got=num_bytes, wanted="at least 1")
        taken = [part for _, parts in answers for part in parts]
        part = first_fit(heap.sizes, taken, num_bytes)
        if part is None and self._comm.size == self.num_pes:
            add_block(self._comm, self._instance, [num_bytes])
            part = first_fit(heap.sizes, taken, num_bytes)
        if part is None:
            raise no_room(num_bytes, largest_gap(heap.sizes, taken), sum(heap.sizes))
        address = heap.take(part, self.pe_of_rank)
        failure: Exception | None = None
        try:
            with driver.in_context(self.device):
                driver.fill_zero(address, part.num_bytes)
        except Exception as error:
            failure = error
        try:
            agree(self._comm, failure, "NVSHMEM, allocate", wanted="memory on every rank")
        except BaseException:
            heap.free(address)
            raise
        return address

    def free(self, address: int) -> None:
        """Give a part back. Local; never waits.

        It is given out again when all ranks of the communicator have given it back, to all of them, or to them and
        others. Nobody waits for what this rank has under way to peers' parts: its last words, and the rows of a last
        call in which nothing was moved. They take microseconds, and all of these ranks have to meet on their hosts
        before the part is given out again.

        Raises:
            InputError: nothing was allocated at `address`, or it was freed.
        """
        self._instance.heap.free(address)

    def ptr(self, address: int, pe: int) -> int:
        """Address at which kernels of this rank reach the same place in the heap of `pe` by plain loads and stores.

        Returns:
            0 if they cannot: the PE is on another host, or its GPU out of reach.

        Raises:
            InputError: there is no such PE.
        """
        if not 0 <= pe < self.num_pes:
            raise InputError("pe", got=pe, wanted=f"a PE, 0 to {self.num_pes - 1}")
        with driver.in_context(self.device):
            return self._instance.library.ptr(address, pe)

    def register_module(self, module: int) -> None:
        """Tell a loaded module of NVSHMEM's state; before its first kernel is launched. Not collective.

        Args:
            module: ``Kernel.module`` of a program with ``nvshmem=True``. A second call does nothing.

        Raises:
            BootstrapError: the library refused: the module was linked with another version.
        """
        if module in self._instance.modules:
            return
        with driver.in_context(self.device):
            code = self._instance.library.register_module(module)
        if code:
            raise BootstrapError(
                "NVSHMEM, a module of kernels",
                got=f"code {code}",
                wanted=f"kernels that are linked with the library of version {dotted(self.version)}",
                do="look at what NVSHMEM_DEBUG=INFO says; remove the folder EPCOMM_CACHE_DIR",
            )
        self._instance.modules.add(module)

    def unregister_module(self, module: int) -> None:
        """Before a registered module is unloaded; kernels of `epcomm.jit` never are."""
        if module in self._instance.modules:
            with driver.in_context(self.device):
                self._instance.library.unregister_module(module)
            self._instance.modules.discard(module)
