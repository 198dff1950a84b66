"""Check, measure, check again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from epcomm import env
from epcomm.bootstrap import Communicator
from epcomm.bootstrap.topology import host_identity
from epcomm.buffer import Buffer
from epcomm.cli.bench.case import DTYPES, Case
from epcomm.cli.bench.cuda.calls import Calls, Operation
from epcomm.cli.bench.cuda.checks import gather_routing
from epcomm.cli.bench.cuda.construction import construction_s
from epcomm.cli.bench.cuda.link_speed import RowSpeeds, peer_copy_speed, row_speeds
from epcomm.cli.bench.cuda.timing import Timer, copy_speed
from epcomm.cli.bench.links import Crossing
from epcomm.config import Config

__all__ = ["CudaRun", "Machine", "Measured", "machine_of", "run"]

_PYTHON_TIMES = ("get_dispatch_layout", "dispatch, cached", "combine, in the arena")
_RING_BYTES = 256 << 20  # num_rdma_bytes, on several nodes
_MPS_ENABLED = 133  # cudaDevAttrMpsEnabled


@dataclass(frozen=True)
class Measured:
    """One operation with one number of SMs, in microseconds of the slowest rank.

    Attributes:
        operation: what was measured.
        num_sms: SMs of an operation of a rank.
        calls_us: one time for each call.
        chain_us: the mean of a chain.
        python_us: the host's time of a call, for those whose host time is told.
        row_speeds: what as many SMs move between the GPUs if they do nothing else; None unless each rank has a GPU of
            its own, all on one host.
    """

    operation: Operation
    num_sms: int
    calls_us: list[float]
    chain_us: float
    python_us: float | None
    row_speeds: RowSpeeds | None = None

    @property
    def p50_us(self) -> float:
        """Median of the calls."""
        return float(np.percentile(self.calls_us, 50))

    @property
    def p99_us(self) -> float:
        """99th percentile of the calls."""
        return float(np.percentile(self.calls_us, 99))

    @property
    def telling_us(self) -> float:
        """The time that rates are computed from: that of the chain, for a call that blocks the host the median."""
        return self.p50_us if self.operation.waits else self.chain_us


@dataclass(frozen=True)
class Machine:
    """GPU and software of rank 0.

    Attributes:
        gpu: its name.
        num_sms: of the GPU, as this process sees it.
        ranks_on_gpu: largest number of ranks on one GPU.
        mps: whether they are clients of an MPS daemon.
        copy_bytes_per_s: measured speed of a copy, read and written.
        peer_bytes_per_s: of one to the next rank, all ranks at once; None where all are on one GPU or on several hosts.
    """

    gpu: str
    num_sms: int
    ranks_on_gpu: int
    num_gpus: int
    mps: bool
    driver: str
    cuda: str
    cupy: str
    copy_bytes_per_s: float
    peer_bytes_per_s: float | None


@dataclass(frozen=True)
class CudaRun:
    """What came out; on rank 0 all of it.

    Attributes:
        differences: results that are wrong; if there are any, nothing counts.
        arena_bytes: ``num_nvl_bytes``.
        construct_s: seconds to construct the first Buffer of all ranks, kernels as they were found, and another.
        construction: seconds (compiling, from disk) for one rank, or None.
        crossing: rows between nodes, of one dispatch.
    """

    differences: list[str]
    machine: Machine
    arena_bytes: int
    construct_s: tuple[float, float]
    construction: tuple[float, float] | None
    crossing: Crossing
    measured: list[Measured] = field(default_factory=list)


def run(comm: Communicator, case: Case) -> CudaRun:
    """All of it. Collective, blocks the host."""
    import cupy

    routing = gather_routing(comm, case)
    row_bytes = case.hidden * max(case.combine_dtype.itemsize, 2)
    arena_bytes = _arena_bytes(case, row_bytes, int(routing.rows.sum(axis=0).max()))
    with ExitStack() as stack:
        buffer, first_s = _construct(comm, case, arena_bytes, stack)
        outside, again_s = _construct(comm, case, 0, stack)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            calls = Calls(cupy, buffer, outside, case, routing)
            differences = _check(comm, cupy, calls, "before")
            machine = machine_of(comm, cupy, stream)
            construct_s = first_s, again_s
            result = CudaRun(differences, machine, arena_bytes, construct_s, _construction(comm), calls.links.crossing)
            if not differences:
                timer = Timer(cupy, comm, buffer, stream, machine.copy_bytes_per_s)
                for num_sms in case.sms or (None,):
                    calls.config = None if num_sms is None else Config(num_sms=num_sms)
                    speeds = None
                    if machine.peer_bytes_per_s is not None and machine.ranks_on_gpu == 1:
                        rows = [case.hidden * dtype.itemsize for dtype in (DTYPES[case.dtype], case.combine_dtype)]
                        speeds = row_speeds(cupy, comm, stream, buffer._num_sms(calls.config), *rows)
                    result.measured.extend(_measure(timer, calls, buffer, case, speeds))
                    differences.extend(_check(comm, cupy, calls, f"after measuring with {num_sms or 'default'} SMs"))
            stream.synchronize()
            del calls
        return result


def _construct(comm: Communicator, case: Case, arena_bytes: int, stack: ExitStack) -> tuple[Buffer, float]:
    """A Buffer that `stack` destroys, and how long it took on the slowest rank."""
    comm.barrier()
    start = time.perf_counter()
    ring_bytes = _RING_BYTES if case.num_nodes > 1 else 0
    per_node = case.ranks_per_node
    buffer = stack.enter_context(
        Buffer(comm, arena_bytes, num_rdma_bytes=ring_bytes, backend="cuda", ranks_per_node=per_node)
    )
    return buffer, max(comm.allgather(time.perf_counter() - start))


def _arena_bytes(case: Case, row_bytes: int, num_rows: int) -> int:
    """The usual hint, or what this routing needs: results held, another one, and a copy of the experts' output."""
    hint = Config().get_nvl_buffer_size_hint(row_bytes, case.ranks)
    beside = 4 + case.topk * (8 + 4) + case.scale_bytes
    return max(hint, (3 * num_rows * (row_bytes + beside) + (32 << 20)) >> 21 << 21)


def _check(comm: Communicator, cupy: Any, calls: Calls, when: str) -> list[str]:
    """Differences on any rank, on all ranks."""
    found = comm.allgather(calls.differences())
    cupy.get_default_memory_pool().free_all_blocks()
    return [f"rank {rank}, {when}: {text}" for rank, texts in enumerate(found) for text in texts]


def _measure(timer: Timer, calls: Calls, buffer: Buffer, case: Case, speeds: RowSpeeds | None) -> Iterator[Measured]:
    num_sms = buffer._num_sms(calls.config)
    for operation, call in calls.operations():
        python_us = timer.python_us(call, case.repeats) if operation.name in _PYTHON_TIMES else None
        chain_us = timer.chain_us(call, case.repeats, waits=operation.waits)
        calls_us = timer.calls_us(call, case.repeats, waits=operation.waits)
        yield Measured(operation, num_sms, calls_us, chain_us, python_us, speeds)


def machine_of(comm: Communicator, cupy: Any, stream: Any) -> Machine:
    """The machine of rank 0. Collective, blocks the host."""
    runtime, device = cupy.cuda.runtime, cupy.cuda.Device().id
    properties = runtime.getDeviceProperties(device)
    uuids = comm.allgather(bytes(properties["uuid"])[:16])
    speed = copy_speed(cupy, stream) if comm.rank == 0 else 0.0
    cupy.get_default_memory_pool().free_all_blocks()
    speed = comm.bcast(speed)  # the others wait here, so that the GPU has nothing else to do
    num_hosts = len(set(comm.allgather(host_identity())))  # a plain copy reaches no other
    peer_speed = peer_copy_speed(cupy, comm, stream) if len(set(uuids)) > 1 and num_hosts == 1 else None
    cupy.get_default_memory_pool().free_all_blocks()
    version = runtime.runtimeGetVersion()
    return Machine(
        gpu=properties["name"].decode(),
        num_sms=int(properties["multiProcessorCount"]),
        ranks_on_gpu=max(map(uuids.count, uuids)),
        num_gpus=len(set(uuids)),
        mps=_has_mps(runtime, device),
        driver=_driver_version(),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
        cupy=cupy.__version__,
        copy_bytes_per_s=speed,
        peer_bytes_per_s=peer_speed,
    )


def _has_mps(runtime: Any, device: int) -> bool:
    try:
        return bool(runtime.deviceGetAttribute(_MPS_ENABLED, device))
    except runtime.CUDARuntimeError:  # CUDA before 12.4 does not tell; a pipe folder does
        return env.lookup("CUDA_MPS_PIPE_DIRECTORY") is not None


def _driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", path.read_text()) if path.exists() else None
    return found[1] if found else "unknown"


def _construction(comm: Communicator) -> tuple[float, float] | None:
    found: tuple[float, float] | None = comm.bcast(construction_s() if comm.rank == 0 else None)
    return found
