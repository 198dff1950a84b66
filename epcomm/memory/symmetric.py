"""One region of device memory per rank of a node, at an address that every rank of the node can use."""

from __future__ import annotations

import os
import threading

from epcomm import env
from epcomm.bootstrap import Communicator, LocalCommunicator
from epcomm.errors import EpcommError
from epcomm.memory.descriptors import exchange_descriptors
from epcomm.memory.device import DeviceMemory
from epcomm.memory.together import agree

__all__ = ["SymmetricMemory"]


class SymmetricMemory:
    """The regions of all ranks, mapped by all ranks.

    Collective over `comm`, blocks the host; every rank raises if one fails. The regions start out as zero bytes on
    every rank before any rank returns. Ranks that are processes map each other's memory through file descriptors;
    ranks that are threads of one process use the same addresses.

    Args:
        comm: all ranks of one node, on one host.
        num_bytes: bytes of this rank's region; may differ between ranks. Rounded up to the device's granularity.
        device: CUDA device number of this process.
        timeout_s: seconds to wait for a peer's descriptor; None: ``EPCOMM_TIMEOUT_S``.

    Raises:
        CapacityError: the device has no room, on this rank.
        DeviceError: two GPUs of the node cannot address each other.
        PeerTimeout: descriptors of peers did not arrive; names the ranks.
        BootstrapError: another rank failed; names it and repeats what it said.

    Attributes:
        bases: address, in this process, of every rank's region.
        sizes: bytes of every rank's region, rounded up.
        num_bytes: bytes of the own region, rounded up.
    """

    def __init__(self, comm: Communicator, num_bytes: int, device: int, *, timeout_s: float | None = None) -> None:
        self._held: list[DeviceMemory | _Shared] = []
        self._is_closed = False
        if timeout_s is None:
            timeout_s = float(env.get("EPCOMM_TIMEOUT_S"))
        try:
            if isinstance(comm, LocalCommunicator):
                self._among_threads(comm, num_bytes, device)
            else:
                self._among_processes(comm, num_bytes, device, timeout_s)
        except BaseException:
            self.close()
            raise
        self.num_bytes = self.sizes[comm.rank]

    def _among_threads(self, comm: LocalCommunicator, num_bytes: int, device: int) -> None:
        devices = comm.allgather(device)
        own: _Shared | None = None
        failure: Exception | None = None
        try:
            memory = DeviceMemory.allocate(num_bytes, device, shareable=False, zeroed=True)
            # The last rank to close unmaps: a kernel of another rank may be at work in it when this one closes.
            own = _Shared(memory, holders=comm.size)
            memory.allow(sorted(set(devices)))
        except Exception as error:
            failure = error
        # The ranks of a `LocalGroup` hand each other objects, not copies.
        regions: list[_Shared | None] = comm.allgather(own)
        self._held.extend(region for region in regions if region is not None)
        agree(comm, failure, "device memory of the node", wanted="a region on every rank")
        memories = [region.memory for region in regions if region is not None]
        self.bases = [memory.ptr for memory in memories]
        self.sizes = [memory.num_bytes for memory in memories]

    def _among_processes(self, comm: Communicator, num_bytes: int, device: int, timeout_s: float) -> None:
        own: DeviceMemory | None = None
        fd = -1
        failure: Exception | None = None
        try:
            own = DeviceMemory.allocate(num_bytes, device, shareable=comm.size > 1, zeroed=True)
            self._held.append(own)
            if comm.size > 1:
                fd = own.export_fd()
        except Exception as error:
            failure = error
        try:
            agree(comm, failure, "device memory of the node", wanted="a region on every rank")
            assert own is not None
            self.sizes = comm.allgather(own.num_bytes)
            self.bases = [own.ptr] * comm.size
            if comm.size > 1:
                self._map_peers(comm, fd, device, timeout_s)
        finally:
            if fd >= 0:
                os.close(fd)

    def _map_peers(self, comm: Communicator, fd: int, device: int, timeout_s: float) -> None:
        failure: Exception | None = None
        received: dict[int, int] = {}
        try:
            received = exchange_descriptors(comm, fd, timeout_s)
            for rank in sorted(received):
                try:
                    memory = DeviceMemory.import_fd(received[rank], self.sizes[rank], device)
                except EpcommError as error:
                    error.add_note(f"while rank {comm.rank} mapped the memory of rank {rank}")
                    raise
                self._held.append(memory)
                self.bases[rank] = memory.ptr
        except Exception as error:
            failure = error
        finally:
            for descriptor in received.values():
                os.close(descriptor)
        agree(comm, failure, "device memory of the node", wanted="a region on every rank")

    def close(self) -> None:
        """Unmap all regions here. Local; never waits; a second call does nothing.

        The caller knows that no kernel of this rank uses any region, and that nobody holds an array in the own one.
        A peer that still maps the own region keeps its memory.
        """
        if self._is_closed:
            return
        self._is_closed = True
        held, self._held = self._held, []
        for memory in held:
            memory.close()

    def __enter__(self) -> SymmetricMemory:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


class _Shared:
    """Memory that several thread-ranks hold; the last one to close it unmaps it."""

    def __init__(self, memory: DeviceMemory, holders: int) -> None:
        self.memory = memory
        self._holders = holders
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._holders -= 1
            is_last = self._holders == 0
        if is_last:
            self.memory.close()
