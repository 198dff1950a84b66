"""What a Buffer's rank has on its GPU: memory that all ranks address, loaded kernels, a stream, the host's page."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import Counter
from typing import Any

from epcomm.backends.cuda.page import HostPage
from epcomm.backends.cuda.streams import Streams
from epcomm.bootstrap import Communicator, LocalCommunicator, Topology
from epcomm.errors import BufferDestroyed, CapacityError, DeviceError, PeerError, UnsupportedOption
from epcomm.jit import (
    Footprint,
    Kernel,
    Launch,
    current_device,
    device_architecture,
    device_uuid,
    load_cupy,
    num_sms,
    plan_residency,
    share_cubins,
)
from epcomm.kernels import PROGRAMS, barrier, combine, dispatch, dispatch_layout, exchange
from epcomm.kernels.arguments import Arguments, comm_bytes
from epcomm.kernels.layout import MAX_RANKS, UNIT, WORKSPACE_BYTES, round_up
from epcomm.kernels.rows import SHARED_BYTES
from epcomm.kernels.window import WINDOW_BYTES, Window
from epcomm.memory import Block, BlockPool, CudaTimeline, LocalPool, SymmetricMemory, close_or_park, sweep

__all__ = ["Job", "choose_device", "default_num_sms"]

# SMs an operation takes by default where a GPU belongs to one rank: enough to fill NVLink (pieces of 200 KB under way
# on each), and few enough to leave the GPU to the model.
_DEFAULT_NUM_SMS = 24


def choose_device(cupy: Any, topology: Topology, device: int | None) -> int:
    """The CUDA device of this rank: what the caller says, else the one that is current, else one by local rank.

    Raises:
        DeviceError: there is no such device.
    """
    count = int(cupy.cuda.runtime.getDeviceCount())
    if device is None:
        current = int(cupy.cuda.runtime.getDevice())
        local_rank = topology.same_host_ranks.index(topology.rank)
        device = current if current != 0 or topology.in_process else local_rank % count
    if not 0 <= device < count:
        raise DeviceError("device", got=f"cuda:{device}", wanted=f"one of the {count} devices of this process")
    return device


def _agree_on_device(comm: Communicator, cupy: Any, topology: Topology, device: int | None) -> int:
    """`choose_device`; all ranks raise when one of them cannot. Collective."""
    problem: DeviceError | None = None
    chosen = 0
    try:
        chosen = choose_device(cupy, topology, device)
    except DeviceError as error:
        problem = error
    texts = comm.allgather("" if problem is None else str(problem))
    if problem is not None:
        raise problem
    if any(texts):
        raise PeerError("Buffer", {rank: text for rank, text in enumerate(texts) if text})
    return chosen


def default_num_sms(sms: int, ranks_on_gpu: int) -> int:
    """SMs of an operation when nobody says how many: an equal part of a shared GPU, at most 24.

    Args:
        sms: SMs of the GPU that this process may use.
        ranks_on_gpu: ranks whose kernels must be on it at once.
    """
    return max(1, min(_DEFAULT_NUM_SMS, sms // ranks_on_gpu))


class Job:
    """One rank's part. Construction is collective and blocks the host.

    Args:
        comm: all ranks, on one host.
        topology: of the job.
        num_arena_bytes: bytes of this rank's arena; the same on all ranks.
        timeout_s: bound of the waits on the GPU.
        device: CUDA device number, or None.

    Raises:
        UnsupportedOption: several nodes, or too many ranks.
        DeviceError: no such device, or GPUs that cannot reach each other.
        CapacityError: no room on the GPU.
        CompileError, MissingDependency: the kernels cannot be made.
    """

    def __init__(
        self, comm: Communicator, topology: Topology, num_arena_bytes: int, timeout_s: float, device: int | None
    ) -> None:
        _check_topology(comm, topology)
        self.cupy = cupy = load_cupy()
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.in_process = isinstance(comm, LocalCommunicator) and comm.size > 1
        self.device = device = _agree_on_device(comm, cupy, topology, device)
        cupy.cuda.Device(device).use()
        with contextlib.suppress(IndexError):  # other ranks of this process empty the list, too
            while True:
                _dropped.pop().close()
        sweep(synchronize=not self.in_process)
        architecture = device_architecture(device)
        self.has_bulk = int(architecture) >= 90
        cubins = share_cubins(comm, topology.hosts, PROGRAMS, architecture)
        self._layout = Kernel(cubins[dispatch_layout.PROGRAM], dispatch_layout.ENTRY, device)
        self._exchange = Kernel(cubins[exchange.PROGRAM], exchange.ENTRY, device)
        self._barrier = Kernel(cubins[barrier.PROGRAM], barrier.ENTRY, device)
        self._dispatch = Kernel(cubins[dispatch.PROGRAM], dispatch.ENTRY, device)
        self._combine = {
            dtype: Kernel(cubins[program], combine.ENTRY, device) for dtype, program in combine.PROGRAMS.items()
        }
        for kernel in (self._dispatch, *self._combine.values()):
            if self.has_bulk:
                kernel.allow_shared(SHARED_BYTES)
        self.uuid = device_uuid(device)
        sharers = [sms for uuid, sms in comm.allgather((self.uuid, num_sms(device))) if uuid == self.uuid]
        # Partitions of MPS may overlap: all ranks of a GPU share the SMs of the smallest one.
        self.num_sms, self.ranks_on_gpu = min(sharers), len(sharers)
        self.default_num_sms = default_num_sms(self.num_sms, self.ranks_on_gpu)
        self.streams = Streams(cupy, device, self.in_process)
        self.page = HostPage(cupy, comm.rank, comm.size, timeout_s, self.in_process)
        self._share_memory(num_arena_bytes, timeout_s)
        self.counters: Counter[str] = Counter(
            dict.fromkeys(("dispatch_in_arena", "dispatch_by_window", "combine_in_arena", "combine_by_window"), 0)
        )
        self._has_warned = False
        self.is_in_step = True  # False between an exchange and the move behind it, where peers count on this rank
        self._num_exchanges = self._num_dispatches = 0
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._arena_views: weakref.WeakSet[object] = weakref.WeakSet()
        self._is_closed = False
        comm.barrier()

    def _share_memory(self, num_arena_bytes: int, timeout_s: float) -> None:
        self.arena_offset = WORKSPACE_BYTES + WINDOW_BYTES
        wanted = self.arena_offset + round_up(num_arena_bytes, UNIT)
        self._memory = SymmetricMemory(self.comm, wanted, self.device, timeout_s=timeout_s)
        self.base = self._memory.bases[self.rank]
        self.region_bytes = min(self._memory.sizes)
        self.arena_bytes = wanted - self.arena_offset
        timeline = CudaTimeline(self.device)
        may_synchronize = not self.in_process
        self.arena = BlockPool(
            self.base + self.arena_offset, self.arena_bytes, timeline, may_synchronize=may_synchronize
        )
        self.outputs = LocalPool(self.device, timeline, may_synchronize=may_synchronize)
        fixed = comm_bytes(
            self._memory.bases, self.page.address, self.region_bytes, int(timeout_s * 1e9), self.rank, self.size
        )
        self._scratch = self.outputs.allocate(_SCRATCH_BYTES, self.streams.own)
        # Not in the default stream: kernels of other ranks of this process may be waiting for this one.
        self.cupy.cuda.runtime.memsetAsync(self._scratch.ptr, 0, _SCRATCH_BYTES, self.streams.own)
        self.cupy.cuda.runtime.streamSynchronize(self.streams.own)
        self.layout_arguments = Arguments(b"", dispatch_layout.FIELDS)
        self.exchange_arguments = Arguments(fixed, exchange.FIELDS)
        self.dispatch_arguments = Arguments(fixed, dispatch.FIELDS)
        self.combine_arguments = Arguments(fixed, combine.FIELDS)
        self._barrier_arguments = Arguments(fixed, barrier.FIELDS)
        self.window = Window(self.size)

    # -- launches -------------------------------------------------------------------------------------------------

    def blocks(self, num_blocks: int) -> int:
        """`num_blocks`, if that many blocks of all ranks of the GPU can wait for each other.

        Raises:
            CapacityError: they would never all run.
        """
        _check_residency(self.uuid, self.num_sms, self.ranks_on_gpu, num_blocks)
        return num_blocks

    def launch_layout(self, stream: int, num_tokens: int, num_counts: int, *fields: int) -> None:
        """`fields`: those of `dispatch_layout.FIELDS` before and after ``partial, ticket``."""
        if num_counts * 4 > _MAX_LAYOUT_BYTES:
            raise CapacityError(
                "num_experts", got=f"{num_counts} counts", wanted=f"at most {_MAX_LAYOUT_BYTES // 4} experts and ranks"
            )
        blocks = min(dispatch_layout.num_blocks(num_tokens), (_SCRATCH_BYTES - UNIT) // (4 * num_counts))
        partial = (self._scratch.ptr + UNIT, self._scratch.ptr)
        arguments = self.layout_arguments.fill(*fields[:5], *partial, *fields[5:])
        self._layout.launch(blocks, dispatch_layout.THREADS, 4 * num_counts, stream, arguments)

    def launch_exchange(self, stream: int, *fields: int) -> None:
        self._exchange.launch(1, exchange.THREADS, 0, stream, self.exchange_arguments.fill(*fields))

    def launch_dispatch(self, stream: int, blocks: int, shape: dispatch.Shape, *fields: int) -> None:
        arguments = self.dispatch_arguments.fill(*fields)
        self._dispatch.launch(blocks, shape.threads, shape.shared_bytes, stream, arguments)

    def launch_combine(self, stream: int, dtype: str, blocks: int, shape: combine.Shape, *fields: int) -> None:
        arguments = self.combine_arguments.fill(*fields)
        self._combine[dtype].launch(blocks, shape.threads, shape.shared_bytes, stream, arguments)

    def launch_barrier(self, stream: int) -> None:
        self._barrier.launch(1, barrier.THREADS, 0, stream, self._barrier_arguments.fill())

    # -- memory ---------------------------------------------------------------------------------------------------

    def offset_of(self, ptr: int, num_bytes: int) -> int | None:
        """Offset of memory in this rank's region in units of `UNIT`, None if it is not in the arena, or unaligned."""
        offset = ptr - self.base
        if offset < self.arena_offset or offset + num_bytes > self.arena_offset + self.arena_bytes or offset % UNIT:
            return None
        return offset // UNIT

    def note(self, block: Block) -> None:
        """`block` was handed to the user, who may name it by an address."""
        self._blocks[block.ptr] = block

    def note_reader(self, ptr: int, stream: int, keep: object) -> None:
        """`stream` uses the block around `ptr`, if that is one."""
        for block in list(self._blocks.values()):
            if block.ptr <= ptr < block.ptr + max(block.num_bytes, 1):
                block.note_reader(stream, keep)

    def note_arena_view(self, owner: object) -> None:
        """The arena must stay as long as `owner`."""
        self._arena_views.add(owner)

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def next_tag(self) -> int:
        """Number of the next exchange; never 0."""
        self._num_exchanges += 1
        return self._num_exchanges & 0xFFFFFFFF or self.next_tag()

    def next_dispatch_id(self) -> int:
        """Number of a dispatch; equal on all ranks, which make the same calls."""
        self._num_dispatches += 1
        return self._num_dispatches

    def count(self, is_windowed: bool, operation: str) -> None:
        """Count a call; the first output without room in the arena is worth a warning."""
        self.counters[f"{operation}_by_window" if is_windowed else f"{operation}_in_arena"] += 1
        if is_windowed and operation == "dispatch" and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"no room in the arena of {self.arena_bytes} bytes for a dispatch's outputs: rows go through a window, "
                "which is slower; raise num_nvl_bytes, or hold fewer outputs",
                stacklevel=2,
            )

    def check_job(self) -> None:
        """Raise if another rank of this process has failed."""
        if isinstance(self.comm, LocalCommunicator):
            self.comm.group.raise_if_poisoned()

    def drop(self) -> None:
        """The Buffer is gone without being closed: the next one of this process does that, or the driver at exit."""
        _dropped.append(self)

    def close(self) -> None:
        """Give back what nobody uses any more; the rest when it can be. Local; waits for this rank's own kernels."""
        if self._is_closed:
            return
        self._is_closed = True
        with current_device(self.device):
            try:
                self.streams.synchronize()
            except Exception as error:  # the driver frees everything at exit
                raise BufferDestroyed("destroy", got=str(error), do="end this process") from error
            del self._scratch
            close_or_park(self.outputs, self.outputs.release)
            if (
                not self.page.failed and not self._arena_views
            ):  # after a failure late peers may still write: keep it until the process ends
                close_or_park(self.arena, self._memory.close)


_dropped: list[Job] = []
_SCRATCH_BYTES = 1 << 20
_MAX_LAYOUT_BYTES = 48 * 1024


def _check_topology(comm: Communicator, topology: Topology) -> None:
    if topology.num_nodes > 1 or len(topology.same_host_ranks) != comm.size:
        raise UnsupportedOption(
            "backend='cuda'",
            got=f"{comm.size} ranks on {topology.num_nodes} nodes",
            wanted="ranks of one node",
            do="pass backend='host', or one node's communicator",
        )
    if comm.size > MAX_RANKS:
        raise UnsupportedOption("backend='cuda'", got=f"{comm.size} ranks on a node", wanted=f"at most {MAX_RANKS}")


@functools.lru_cache(maxsize=256)
def _check_residency(uuid: str, sms: int, ranks_on_gpu: int, num_blocks: int) -> None:
    plan_residency([Footprint(uuid, sms, (Launch(num_blocks, 1),))] * ranks_on_gpu)
