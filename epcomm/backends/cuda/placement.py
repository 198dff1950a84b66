"""Which GPU a rank works on, who shares it, and how many SMs of it an operation may take."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epcomm import env
from epcomm.bootstrap import Communicator, Topology
from epcomm.errors import BootstrapError, DeviceError, PeerError, UnsupportedOption
from epcomm.jit import Footprint, Launch, device_uuid, num_sms, plan_residency
from epcomm.kernels.layout import MAX_RANKS

__all__ = ["Placement", "agree_on_device", "choose_device", "default_num_sms", "has_network", "low_latency_num_sms"]

# SMs an operation takes by default where a GPU belongs to one rank: enough to fill NVLink (pieces of 200 KB under way
# on each), and few enough to leave the GPU to the model.
_DEFAULT_NUM_SMS, _LOW_LATENCY_NUM_SMS = 24, 64  # measured over NVLink, with a GPU for each rank


def choose_device(cupy: Any, topology: Topology, device: int | None) -> int:
    """The CUDA device of this rank.

    That is what the caller says, else the one that is current, if the program has chosen it, else one by the number
    that the launcher gave this process on its host, else by its place among the ranks on its host.

    Raises:
        DeviceError: there is no such device.
    """
    count = int(cupy.cuda.runtime.getDeviceCount())
    if device is None:
        current, number = int(cupy.cuda.runtime.getDevice()), env.launcher_local_rank()
        if number is None:
            number = topology.same_host_ranks.index(topology.rank)
        device = current if current != 0 or topology.in_process else number % count
    if not 0 <= device < count:
        raise DeviceError("device", got=f"cuda:{device}", wanted=f"one of the {count} devices of this process")
    return device


def agree_on_device(comm: Communicator, cupy: Any, topology: Topology, device: int | None) -> int:
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


def low_latency_num_sms(sms: int, ranks_on_gpu: int, has_network: bool) -> int:
    """The same of the low-latency mode, whose warps wait for memory and not for links: 64 of a GPU of its own, and at
    most half of it, so that two Buffers have room.

    Args:
        sms, ranks_on_gpu: as above.
        has_network: other nodes are reached through NVSHMEM, whose queue pairs more SMs would have to share.
    """
    if ranks_on_gpu > 1 or has_network:
        return default_num_sms(sms, ranks_on_gpu)
    return max(1, min(_LOW_LATENCY_NUM_SMS, sms // 2))


def has_network(topology: Topology) -> bool:
    """Whether ranks of other nodes are reached through NVSHMEM: if there are several hosts, or the user says so.

    Raises:
        UnsupportedOption: a job that this backend is not for. On all ranks.
    """
    num_hosts, wanted = len(set(topology.hosts)), env.get("EPCOMM_TRANSPORT")
    if topology.size > MAX_RANKS:
        raise UnsupportedOption("backend='cuda'", got=f"{topology.size} ranks", wanted=f"at most {MAX_RANKS}")
    per_node = topology.ranks_per_node
    for first in range(0, topology.size, per_node):
        if len(set(topology.hosts[first : first + per_node])) > 1:
            raise UnsupportedOption(
                "ranks_per_node",
                got=f"{per_node}, with ranks {first} to {first + per_node - 1} of one node on several hosts",
                wanted="ranks of one host",
                do="leave it to the hosts: ranks_per_node=None",
            )
    if wanted == "ipc" and num_hosts > 1:
        raise UnsupportedOption(
            "EPCOMM_TRANSPORT", got=f"ipc, on {num_hosts} hosts", wanted="nvshmem, or auto", do="unset it"
        )
    return topology.num_nodes > 1 and (num_hosts > 1 or wanted == "nvshmem")


@dataclass(frozen=True)
class Placement:
    """This rank's GPU among those of the job.

    Attributes:
        uuid: of the GPU.
        num_sms: SMs that every rank on it may use. Partitions of MPS may overlap: that of the smallest one.
        ranks_on_gpu: how many ranks share it.
    """

    uuid: str
    num_sms: int
    ranks_on_gpu: int

    @classmethod
    def agree(cls, comm: Communicator, device: int, problem: Exception | None) -> Placement:
        """Compare the GPUs of all ranks, after what each did by itself; `problem` is what went wrong there.

        Collective, blocks the host; all ranks raise if one has a problem.

        Raises:
            BootstrapError: another rank has one; its own is raised as it is.
        """
        uuid, sms = device_uuid(device), num_sms(device)
        text = "" if problem is None else f"{type(problem).__name__}: {problem}"
        facts: Sequence[tuple[str, int, str]] = comm.allgather((uuid, sms, text))
        if problem is not None:
            raise problem
        for rank, (_, _, text) in enumerate(facts):
            if text:
                raise BootstrapError("Buffer", got=f"on rank {rank}: {text}", do="look at that error first")
        sharers = [sms for other, sms, _ in facts if other == uuid]
        return cls(uuid, min(sharers), len(sharers))

    def blocks(self, num_blocks: int) -> int:
        """`num_blocks`, if that many blocks of all ranks of the GPU can wait for each other.

        Raises:
            CapacityError: they would never all run.
        """
        _check_residency(self, num_blocks)
        return num_blocks


@functools.lru_cache(maxsize=256)
def _check_residency(placement: Placement, num_blocks: int) -> None:
    footprint = Footprint(placement.uuid, placement.num_sms, (Launch(num_blocks, 1),))
    plan_residency([footprint] * placement.ranks_on_gpu)
