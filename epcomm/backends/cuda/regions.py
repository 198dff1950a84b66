"""The memory of a Buffer's ranks that peers write: where its parts lie, and who reaches it how.

On one host all of it is one region, which all ranks map. Where ranks of other nodes are behind a network, words and
messages go to NVSHMEM's symmetric heap, and only ranks of a node map each other's region. See ``common/layout.cuh``.
"""

from __future__ import annotations

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
from epcomm.kernels.window import WINDOW_BYTES
from epcomm.memory import SymmetricMemory, driver
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
        low_latency_offset: of the low-latency area, among words and messages.
        rings_offset, rings_bytes: of the rings, likewise; no bytes on one node.

    Raises:
        CapacityError: no room on the GPU, or in the symmetric heap.
        DeviceError: GPUs of a node that cannot reach each other.
        MissingDependency, UnsupportedOption, BootstrapError: there is no NVSHMEM between the ranks.
    """

    def __init__(
        self, comm: Communicator, topology: Topology, settings: Settings, device: int, has_network: bool
    ) -> None:
        has_nodes = topology.num_nodes > 1
        self.arena_bytes = round_up(settings.num_arena_bytes, UNIT)
        self.rings_bytes = round_up(settings.num_network_bytes, UNIT) if has_nodes else 0
        low_latency_bytes = round_up(settings.num_low_latency_bytes, UNIT) if settings.low_latency_mode else 0
        window_bytes = 0 if has_nodes else WINDOW_BYTES
        self._group: NvshmemGroup | None = None
        if has_network:
            self.arena_offset, self.low_latency_offset = window_bytes, WORKSPACE_BYTES
        else:
            self.arena_offset = WORKSPACE_BYTES + window_bytes
            self.low_latency_offset = self.arena_offset + self.arena_bytes
        self.rings_offset = self.low_latency_offset + low_latency_bytes
        end = self.rings_offset + self.rings_bytes
        if not has_network:
            self._memory = SymmetricMemory(comm, end, device, timeout_s=settings.timeout_s)
            self.bases = self.control = self._memory.bases
            self.pes: tuple[int, ...] = ()
        else:
            self._group = nvshmem_group(comm, device, end, min(settings.num_queue_pairs, MAX_QUEUE_PAIRS))
            self._heap_part = self._group.allocate(end)
            self.pes = self._group.pe_of_rank
            self._map_node(comm, topology, settings, device)
        self.region_bytes = min(self._memory.sizes)

    def _map_node(self, comm: Communicator, topology: Topology, settings: Settings, device: int) -> None:
        """Regions and words of the ranks of the own node; and what kernels choose queue pairs from for the others."""
        assert self._group is not None
        first, count = topology.node * topology.ranks_per_node, topology.ranks_per_node
        failure: Exception | None = None
        self.bases, self.control = [0] * comm.size, [0] * comm.size
        node = comm.split(topology.node, comm.rank)
        try:
            num_bytes = max(UNIT, self.arena_offset + self.arena_bytes)
            self._memory = SymmetricMemory(node, num_bytes, device, timeout_s=settings.timeout_s)
            self.bases[first : first + count] = self._memory.bases
            for rank in range(first, first + count):
                self.control[rank] = self._group.ptr(self._heap_part, self.pes[rank])
                if self.control[rank] == 0:
                    raise DeviceError(
                        f"cuda:{device}",
                        got=f"the memory of rank {rank}, which NVSHMEM does not reach by loads and stores",
                        wanted="GPUs of a node that can address each other",
                        do="look at `nvidia-smi topo -p2p rw`; unset NVSHMEM_DISABLE_P2P",
                    )
            handles = self._group.queue_pairs[: settings.num_queue_pairs]
            with driver.in_context(device):
                driver.write(self._heap_part + QUEUE_PAIRS_OFFSET, queue_pairs_bytes(handles))
        except Exception as error:
            failure = error
        agree(comm, failure, "device memory of the nodes", wanted="a region on every rank")

    def register(self, modules: list[int]) -> None:
        """Before the first launch of kernels in these modules that talk to other ranks."""
        for module in modules:
            if self._group is not None:
                self._group.register_module(module)

    def close(self) -> None:
        """Give the memory back. Local; never waits. The caller knows that no kernel of this rank uses any of it.

        What peers still write to a part of the heap reaches nobody else: a part is given out again when all ranks have
        given it back, and a rank that has no kernel under way has sent nothing that its peers have not seen.
        """
        self._memory.close()
        if self._group is not None:
            self._group.free(self._heap_part)
