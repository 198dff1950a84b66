"""What a Buffer's rank has on its GPU: memory that all ranks address, loaded kernels, a stream, the host's page."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from epcomm.backends.cuda.forecast import Forecast
from epcomm.backends.cuda.launcher import SCRATCH_BYTES, Launcher
from epcomm.backends.cuda.page import HostPage
from epcomm.backends.cuda.placement import (
    Placement,
    agree_on_device,
    default_num_sms,
    has_network,
    low_latency_num_sms,
)
from epcomm.backends.cuda.regions import Regions
from epcomm.backends.cuda.settings import Settings
from epcomm.backends.cuda.slots import LowLatency, LowLatencyLauncher
from epcomm.backends.cuda.streams import Streams
from epcomm.bootstrap import Communicator, LocalCommunicator, Topology
from epcomm.errors import BufferDestroyed, UnsupportedOption
from epcomm.jit import Program, current_device, device_architecture, load_cupy, share_cubins
from epcomm.kernels import programs_of
from epcomm.kernels.arguments import comm_bytes
from epcomm.kernels.layout import UNIT
from epcomm.kernels.window import Window
from epcomm.memory import BlockPool, CudaTimeline, LocalPool, close_or_park, sweep
from epcomm.memory.together import agree

__all__ = ["Job"]

_Plan = TypeVar("_Plan")


class Job:
    """One rank's part. Construction is collective and blocks the host.

    Args:
        comm: all ranks.
        topology: of the job.
        settings: of the Buffer.

    Attributes:
        has_low_latency: there are low-latency operations, and `low_latency`.
        rings, handover: see `Regions`; None on one node.

    Raises:
        UnsupportedOption: too many ranks, nodes that cannot be reached, or masks of ranks on several hosts.
        DeviceError: no such device, or GPUs that cannot reach each other.
        CapacityError: no room on the GPU.
        CompileError, MissingDependency: the kernels cannot be made.
    """

    def __init__(self, comm: Communicator, topology: Topology, settings: Settings) -> None:
        self._has_network = has_network(topology)
        if settings.masks_on_timeout and len(set(topology.hosts)) > 1:
            raise UnsupportedOption(
                "enable_shrink",
                got=f"ranks on {len(set(topology.hosts))} hosts",
                wanted="ranks of one host: waits for a network that a dead rank no longer answers have no bound",
            )
        self.cupy = cupy = load_cupy()
        self.runtime = cupy.cuda.runtime
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.in_process = isinstance(comm, LocalCommunicator) and comm.size > 1
        self.device = device = agree_on_device(comm, cupy, topology, settings.device)
        cupy.cuda.Device(device).use()
        with contextlib.suppress(IndexError):  # other ranks of this process empty the list, too
            while True:
                _dropped.pop().close()
        sweep(synchronize=not self.in_process)
        architecture = device_architecture(device)
        self.num_nodes, self.ranks_per_node = topology.num_nodes, topology.ranks_per_node
        programs = programs_of(self.num_nodes, settings.low_latency_mode, self._has_network)
        cubins = share_cubins(comm, topology.hosts, programs, architecture)
        problem: Exception | None = None
        try:
            self._prepare(cubins, architecture, settings.timeout_s)
        except Exception as error:  # the others wait for this rank
            problem = error
        self.placement = Placement.agree(comm, device, problem)
        share = self.placement.num_sms, self.placement.ranks_on_gpu
        self.default_num_sms = default_num_sms(*share)
        self.low_latency_num_sms = low_latency_num_sms(*share, self._has_network)
        self._share_memory(topology, cubins, settings)
        self.window = Window(self.size)
        self.forecast = Forecast()
        self.counters: Counter[str] = Counter(
            dict.fromkeys(("dispatch_in_arena", "dispatch_by_window", "combine_in_arena", "combine_by_window"), 0)
        )
        self._has_warned = False
        self.is_in_step = True  # False between an exchange and the move behind it, where peers count on this rank
        self._num_exchanges = 0
        self._plans: dict[tuple[Any, ...], Any] = {}
        self._region_owner: Callable[[], object] = lambda: None
        self._is_closed = False

    def _prepare(self, cubins: Mapping[Program, bytes], architecture: str, timeout_s: float) -> None:
        """What this rank does by itself."""
        self.streams = Streams(self.cupy, self.device, self.in_process)
        self.page = HostPage(self.cupy, self.rank, self.size, timeout_s, self.in_process)
        self.timeline = CudaTimeline(self.device)
        self.outputs = LocalPool(self.device, self.timeline, may_synchronize=not self.in_process)
        scratch = self.outputs.allocate(SCRATCH_BYTES, self.streams.own.ptr)
        assert scratch is not None  # that pool grows
        self._scratch = scratch
        # Not in the default stream: kernels of other ranks of this process may be waiting for this one.
        self.runtime.memsetAsync(self._scratch.ptr, 0, SCRATCH_BYTES, self.streams.own.ptr)
        self.runtime.streamSynchronize(self.streams.own.ptr)
        has_nodes = self.num_nodes > 1
        self.launch = Launcher(cubins, architecture, self.device, has_nodes, self._has_network, self._scratch.ptr)

    def _share_memory(self, topology: Topology, cubins: Mapping[Program, bytes], settings: Settings) -> None:
        """Memory of all ranks, and what each then does by itself with its kernels. Collective."""
        self._regions = Regions(self.comm, topology, settings, self.device, self._has_network)
        failure: Exception | None = None
        try:
            self._use_memory(self._regions, cubins, settings)
        except Exception as error:  # the others wait for this rank
            failure = error
        try:
            agree(self.comm, failure, "Buffer", wanted="kernels on every rank")
        except BaseException:
            self._regions.close()
            raise

    def _use_memory(self, regions: Regions, cubins: Mapping[Program, bytes], settings: Settings) -> None:
        regions.register(self.launch.modules)
        self.rings, self.handover = regions.rings, regions.handover
        self.base = regions.bases[self.rank]
        self.arena_offset, self.arena_bytes = regions.arena_offset, regions.arena_bytes
        start, may_synchronize = self.base + self.arena_offset, not self.in_process
        self.arena = BlockPool(start, self.arena_bytes, self.timeline, may_synchronize=may_synchronize)
        addresses = (regions.bases, regions.control, regions.pes, self.page.address)
        fixed = comm_bytes(*addresses, regions.region_bytes, int(settings.timeout_s * 1e9), self.rank)
        self.launch.set_comm(fixed)
        self.has_low_latency = settings.low_latency_mode
        if settings.low_latency_mode:
            kernels = LowLatencyLauncher(cubins, self.device, self._has_network, fixed)
            regions.register(kernels.modules)
            self.low_latency = LowLatency(regions, self.rank, kernels, settings.masks_on_timeout)

    # -- memory ---------------------------------------------------------------------------------------------------

    def offset_of(self, ptr: int, num_bytes: int) -> int | None:
        """Offset of memory in this rank's region in units of `UNIT`, None if it is not in the arena, or unaligned."""
        offset = ptr - self.base
        if offset < self.arena_offset or offset + num_bytes > self.arena_offset + self.arena_bytes or offset % UNIT:
            return None
        return offset // UNIT

    def note_reader(self, ptr: int, stream: int, keep: object) -> None:
        """`stream` uses the block around `ptr`, if that is one."""
        for pool in (self.arena, self.outputs):
            pool.note_reader(ptr, stream, keep)

    def region_owner(self) -> object:
        """The owner of views of this rank's memory that are no blocks: the memory stays as long as they."""
        owner = self._region_owner()
        if owner is None:
            owner = _RegionOwner()
            self._region_owner = weakref.ref(owner)
        return owner

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def plan(self, kind: Callable[..., _Plan], *terms: Any) -> _Plan:
        """``kind(job, *terms)``, made once: what calls have in common that differ in addresses only.

        Args:
            kind: makes a plan.
            terms: what it depends on: `ArraySpec`, sizes, options.
        """
        key = (kind, *terms)
        plan: _Plan | None = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MANY_PLANS:
                self._plans.clear()
            plan = self._plans[key] = kind(self, *terms)
        return plan

    def next_tag(self) -> int:
        """Number of the next exchange, never 0; equal on all ranks, which make the same calls, rejected ones too."""
        self._num_exchanges += 1
        return self._num_exchanges & 0xFFFFFFFF or self.next_tag()

    def count(self, is_windowed: bool, operation: str) -> None:
        """Count a call; the first output without room in the arena is worth a warning."""
        self.counters[operation + ("_by_window" if is_windowed else "_in_arena")] += 1
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
            self.streams.release()
            del self._scratch
            close_or_park(self.outputs, self.outputs.release)
            # After a failure late peers may still write: keep the memory until the process ends.
            if not self.page.failed and self._region_owner() is None:
                close_or_park(self.arena, self._regions.close)


class _RegionOwner:
    """See `Job.region_owner`."""


_dropped: list[Job] = []
_MANY_PLANS = 1024
