"""The memory of a Buffer's ranks that peers write: where its parts lie, and who reaches it how.

On one host all of it is one region, which all ranks map. Where ranks of other nodes are behind a network, words and
messages go to NVSHMEM's symmetric heap, and only ranks of a node map each other's region. See ``common/layout.cuh``.
"""

from __future__ import annotations

from collections.abc import Sequence

from epcomm.backends.cuda.settings import Settings
from epcomm.bootstrap import Communicator, Topology
from epcomm.errors import DeviceError
from epcomm.kernels.layout import (
    MAX_QUEUE_PAIRS,
    QUEUE_PAIRS_OFFSET,
    UNIT,
    WORKSPACE_BYTES,
    queue_pairs_bytes,
    round_up,
)
from epcomm.kernels.low_latency import Area
from epcomm.kernels.rings import Rings
from epcomm.kernels.window import WINDOW_BYTES
from epcomm.memory import SymmetricMemory, driver
from epcomm.memory.nvshmem import NvshmemGroup, nvshmem_group
from epcomm.memory.together import agree

__all__ = ["Regions"]


class Regions:
    """Collective, blocks the host; all ranks raise if one fails, and nothing stays allocated.

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
        rings: for what goes to other nodes and comes from there, behind it; None on one node.
        handover: on several nodes, for rows of arrays that lie outside of the arena; behind that.

    Raises:
        CapacityError: no room on the GPU, in the symmetric heap, or in the rings.
        DeviceError: GPUs of a node that cannot reach each other.
        MissingDependency, UnsupportedOption, BootstrapError: there is no NVSHMEM between the ranks.
    """

    def __init__(
        self, comm: Communicator, topology: Topology, settings: Settings, device: int, has_network: bool
    ) -> None:
        self._comm, self._topology, self._device, self._timeout_s = comm, topology, device, settings.timeout_s
        self._node, self._heap_part = comm, 0
        self._group: NvshmemGroup | None = None
        self._held: list[SymmetricMemory] = []
        self.pes: Sequence[int] = ()
        end = self._cut(settings, has_network)
        try:
            if not has_network:
                self.bases, memory = self._share(end)
                self.control = self.bases
            else:
                self._join_network(settings, end)
                self.bases, memory = self._share(max(UNIT, self.arena_offset + self.arena_bytes))
                self.control = self._words_of_node(settings)
        except BaseException:
            self.close()
            raise
        self.region_bytes = min(memory.sizes)

    def _cut(self, settings: Settings, has_network: bool) -> int:
        """Where the parts lie; where the last one ends of those that hold words and messages."""
        topology = self._topology
        has_nodes = topology.num_nodes > 1
        self.arena_bytes = round_up(settings.num_arena_bytes, UNIT)
        self.arena_offset = 0 if has_network else WORKSPACE_BYTES + (0 if has_nodes else WINDOW_BYTES)
        own_node = ((1 << topology.ranks_per_node) - 1) << topology.node * topology.ranks_per_node
        self.low_latency = Area(
            WORKSPACE_BYTES if has_network else self.arena_offset + self.arena_bytes,
            settings.num_low_latency_bytes if settings.low_latency_mode else 0,
            topology.size,
            ((1 << topology.size) - 1) & ~own_node if has_network else 0,
        )
        end = self.low_latency.end
        self.rings: Rings | None = None
        self.handover: Rings | None = None
        if has_nodes:
            num_bytes = round_up(settings.num_network_bytes, UNIT)
            where = (end, num_bytes, topology.rank, topology.ranks_per_node, topology.num_nodes)
            self.rings = Rings(*where, is_staged=has_network)
            end += num_bytes
            # A ring for each rank, as if it were a node.
            self.handover = Rings(end, WINDOW_BYTES, topology.rank, 1, topology.size, is_staged=False)
            end += WINDOW_BYTES
        return end

    def _join_network(self, settings: Settings, num_bytes: int) -> None:
        self._group = group = nvshmem_group(
            self._comm, self._device, num_bytes, min(settings.num_queue_pairs, MAX_QUEUE_PAIRS)
        )
        self._heap_part = group.allocate(num_bytes)
        self.pes = group.pe_of_rank
        self._node = self._comm.split(self._topology.node, self._comm.rank)

    def share(self, num_bytes: int) -> list[int]:
        """More memory that all ranks map, or all of a node: by rank its address, or 0.

        Collective, blocks the host; raises as the constructor does. It is given back with all the rest.
        """
        return self._share(num_bytes)[0]

    def _share(self, num_bytes: int) -> tuple[list[int], SymmetricMemory]:
        bases = [0] * self._comm.size
        memory: SymmetricMemory | None = None
        failure: Exception | None = None
        try:
            memory = SymmetricMemory(self._node, num_bytes, self._device, timeout_s=self._timeout_s)
            bases[self._ranks_of_node if self._group is not None else slice(None)] = memory.bases
        except Exception as error:
            failure = error
        if self._group is not None:  # other nodes
            try:
                agree(self._comm, failure, "device memory of the nodes", wanted="memory on every rank")
            except BaseException:
                if memory is not None:
                    memory.close()
                raise
        elif failure is not None:
            raise failure
        assert memory is not None
        self._held.append(memory)
        return bases, memory

    @property
    def _ranks_of_node(self) -> slice:
        first = self._topology.node * self._topology.ranks_per_node
        return slice(first, first + self._topology.ranks_per_node)

    def _words_of_node(self, settings: Settings) -> list[int]:
        """Addresses of the words and messages of the node's ranks; kernels hear of the queue pairs for the others."""
        assert self._group is not None
        addresses = [0] * self._comm.size
        failure: Exception | None = None
        try:
            for rank in range(self._comm.size)[self._ranks_of_node]:
                addresses[rank] = self._group.ptr(self._heap_part, self.pes[rank])
                if addresses[rank] == 0:
                    raise DeviceError(
                        f"cuda:{self._device}",
                        got=f"the memory of rank {rank}, which NVSHMEM does not reach by loads and stores",
                        wanted="GPUs of a node that can address each other",
                        do="look at `nvidia-smi topo -p2p rw`; unset NVSHMEM_DISABLE_P2P",
                    )
            handles = self._group.queue_pairs[: settings.num_queue_pairs]
            with driver.in_context(self._device):
                driver.write(self._heap_part + QUEUE_PAIRS_OFFSET, queue_pairs_bytes(handles))
        except Exception as error:
            failure = error
        agree(self._comm, failure, "words and messages of the nodes", wanted="memory of the node within reach")
        return addresses

    def register(self, modules: Sequence[int]) -> None:
        """Before the first launch of kernels in these modules that talk to other ranks. Local."""
        for module in modules:
            if self._group is not None:
                self._group.register_module(module)

    def close(self) -> None:
        """Give the memory back. Local; never waits. The caller knows that no kernel of this rank uses any of it.

        What peers still write to a part of the heap reaches nobody else: see `NvshmemGroup.free`.
        """
        for memory in self._held:
            memory.close()
        self._held.clear()
        if self._group is not None and self._heap_part:
            self._group.free(self._heap_part)
            self._heap_part = 0
