"""The memory of a Buffer's ranks that peers write: where its parts lie, and who reaches it how.

On one host all of it is one region, which all ranks map. Where ranks of other nodes are behind a network, words and
messages go to NVSHMEM's symmetric heap, and only ranks of a node map each other's region. See ``common/layout.cuh``.
"""

from __future__ import annotations

from epcomm.backends.cuda.settings import Settings
from epcomm.bootstrap import Communicator, Topology
from epcomm.errors import DeviceError
from epcomm.kernels.layout import UNIT, WORKSPACE_BYTES, round_up
from epcomm.kernels.low_latency import Area
from epcomm.kernels.window import WINDOW_BYTES
from epcomm.memory import SymmetricMemory
from epcomm.memory.nvshmem import NvshmemGroup, nvshmem_group
from epcomm.memory.together import agree

__all__ = ["Regions"]


class Regions:
    """Collective, blocks the host; all ranks raise if one fails.

    Args:
        comm: all ranks.
        topology: of the job.
        settings: of the Buffer.
        device: CUDA device number.
        has_network: ranks of other nodes are reached through NVSHMEM.

    Attributes:
        bases: address, in this process, of every rank's region; 0: it is out of reach.
        control: likewise, of its words and messages.
        pes: every rank's number in NVSHMEM; empty without it.
        region_bytes: of the smallest region.
        arena_offset, arena_bytes: of the arena, in a region.
        low_latency: the low-latency area, among words and messages; empty without low-latency operations.
        rings_offset, rings_bytes: of the rings, likewise; no bytes on one node.

    Raises:
        CapacityError: no room on the GPU, or in the symmetric heap.
        DeviceError: GPUs of a node that cannot reach each other.
        MissingDependency, UnsupportedOption, BootstrapError: there is no NVSHMEM between the ranks.
    """

    def __init__(
        self, comm: Communicator, topology: Topology, settings: Settings, device: int, has_network: bool
    ) -> None:
        self._comm, self._topology, self._device, self._timeout_s = comm, topology, device, settings.timeout_s
        has_nodes = topology.num_nodes > 1
        window_bytes = 0 if has_nodes else WINDOW_BYTES
        self.arena_bytes = round_up(settings.num_arena_bytes, UNIT)
        self.arena_offset = window_bytes if has_network else WORKSPACE_BYTES + window_bytes
        own_node = ((1 << topology.ranks_per_node) - 1) << topology.node * topology.ranks_per_node
        self.low_latency = Area(
            WORKSPACE_BYTES if has_network else self.arena_offset + self.arena_bytes,
            settings.num_low_latency_bytes if settings.low_latency_mode else 0,
            comm.size,
            ((1 << comm.size) - 1) & ~own_node if has_network else 0,
        )
        self.rings_offset = self.low_latency.end
        self.rings_bytes = round_up(settings.num_network_bytes, UNIT) if has_nodes else 0
        end = self.rings_offset + self.rings_bytes
        self._group: NvshmemGroup | None = None
        self._node = comm
        self.pes: tuple[int, ...] = ()
        if not has_network:
            self.bases, self._memory = self.share(end)
            self.control = self.bases
        else:
            self._group = nvshmem_group(comm, device, end)
            self._heap_part = self._group.allocate(end)
            self.pes = self._group.pe_of_rank
            self._node = comm.split(topology.node, comm.rank)
            self.bases, self._memory = self.share(max(UNIT, self.arena_offset + self.arena_bytes))
            self.control = self._words_of_node()
        self.region_bytes = min(self._memory.sizes)

    def share(self, num_bytes: int) -> tuple[list[int], SymmetricMemory]:
        """More memory that all ranks map, or all of a node: by rank its address, or 0; and what to close in the end.

        Collective, blocks the host; raises as the constructor does.
        """
        if self._group is None:
            memory = SymmetricMemory(self._comm, num_bytes, self._device, timeout_s=self._timeout_s)
            return memory.bases, memory
        bases, failure = [0] * self._comm.size, None
        try:
            memory = SymmetricMemory(self._node, num_bytes, self._device, timeout_s=self._timeout_s)
            bases[self._ranks_of_node] = memory.bases
        except Exception as error:
            failure = error
        agree(self._comm, failure, "device memory of the nodes", wanted="memory on every rank")
        return bases, memory

    @property
    def _ranks_of_node(self) -> slice:
        first = self._topology.node * self._topology.ranks_per_node
        return slice(first, first + self._topology.ranks_per_node)

    def _words_of_node(self) -> list[int]:
        """Addresses of the words and messages of the node's ranks."""
        assert self._group is not None
        addresses, failure = [0] * self._comm.size, None
        for rank in range(self._comm.size)[self._ranks_of_node]:
            addresses[rank] = self._group.ptr(self._heap_part, self.pes[rank])
            if addresses[rank] == 0:
                failure = DeviceError(
                    f"cuda:{self._device}",
                    got=f"the memory of rank {rank}, which NVSHMEM does not reach by loads and stores",
                    wanted="GPUs of a node that can address each other",
                    do="look at `nvidia-smi topo -p2p rw`; unset NVSHMEM_DISABLE_P2P",
                )
        agree(self._comm, failure, "words and messages of the nodes", wanted="memory of the node within reach")
        return addresses

    def register(self, modules: list[int]) -> None:
        """Before the first launch of kernels in these modules that talk to other ranks."""
        for module in modules:
            if self._group is not None:
                self._group.register_module(module)

    def close(self) -> None:
        """Give the memory back. Local; never waits. The caller knows that no kernel of this rank uses any of it.

        What peers still write to a part of the heap reaches nobody else: a part is given out again when all ranks have
        given it back.
        """
        self._memory.close()
        if self._group is not None:
            self._group.free(self._heap_part)
