"""Nodes x local ranks: which ranks share a host, and which form a node of the two-hop path."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epcomm import env
from epcomm.bootstrap.communicator import Communicator
from epcomm.bootstrap.local import LocalCommunicator
from epcomm.errors import RankMismatch, ShapeError

__all__ = ["Topology", "discover", "host_identity"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Topology:
    """Where this rank is among all ranks.

    Attributes:
        rank: this rank.
        size: number of ranks.
        ranks_per_node: ranks of one node; rank r is local rank ``r % ranks_per_node`` of node
            ``r // ranks_per_node``.
        num_nodes: number of nodes.
        node: this rank's node.
        local_rank: this rank within its node.
        hosts: the host identity of every rank. A virtual node may be a part of a host or span several.
        in_process: the ranks are threads of one process.
    """

    rank: int
    size: int
    ranks_per_node: int
    num_nodes: int
    node: int
    local_rank: int
    hosts: tuple[str, ...]
    in_process: bool

    @property
    def same_host_ranks(self) -> tuple[int, ...]:
        """The ranks on this rank's host, itself included, ascending."""
        return tuple(rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank])


def host_identity() -> str:
    """A text that is equal for two processes exactly if they run on the same booted host.

    The host name alone is not enough (cloned machines, containers with a fixed name); nor is the boot id
    (containers of one host do not see each other's shared memory).
    """
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "no-boot-id"
    return f"{socket.gethostname()}/{boot_id}"


def discover(comm: Communicator, ranks_per_node: int | None = None) -> Topology:
    """Agree on the topology. Collective, blocks the host.

    Args:
        comm: the ranks.
        ranks_per_node: make virtual nodes of this many consecutive ranks; the same on all ranks. None:
            ``EPCOMM_RANKS_PER_NODE`` if set, else the ranks of each host form a node.

    Raises:
        RankMismatch: the ranks gave different `ranks_per_node`.
        ShapeError: `ranks_per_node` does not divide the number of ranks, or the hosts do not have equal
            numbers of consecutive ranks. All ranks raise alike.
    """
    requested = ranks_per_node if ranks_per_node is not None else env.get("EPCOMM_RANKS_PER_NODE") or None
    # Validated after the exchange, so that a bad value raises on all ranks instead of leaving some waiting.
    answers = comm.allgather((host_identity(), requested))
    hosts = tuple(host for host, _ in answers)
    requests = [request for _, request in answers]
    if any(request != requests[0] for request in requests):
        raise RankMismatch("ranks_per_node", {"ranks_per_node": requests})
    per_node = _from_hosts(hosts) if requested is None else _virtual(requested, comm.size)
    return Topology(
        rank=comm.rank,
        size=comm.size,
        ranks_per_node=per_node,
        num_nodes=comm.size // per_node,
        node=comm.rank // per_node,
        local_rank=comm.rank % per_node,
        hosts=hosts,
        in_process=isinstance(comm, LocalCommunicator),
    )


def _virtual(ranks_per_node: int, size: int) -> int:
    if ranks_per_node < 1 or size % ranks_per_node:
        raise ShapeError(
            "ranks_per_node",
            got=ranks_per_node,
            wanted=f"a divisor of the number of ranks, {size}",
            do="nodes must have equal numbers of ranks",
        )
    return ranks_per_node


def _from_hosts(hosts: Sequence[str]) -> int:
    runs = [(host, len(list(ranks))) for host, ranks in itertools.groupby(hosts)]
    lengths = {length for _, length in runs}
    if len(lengths) > 1 or len(runs) != len(set(hosts)):
        found = ", ".join(f"{length} on {host.partition('/')[0]}" for host, length in runs)
        raise ShapeError(
            "ranks per host",
            got=found,
            wanted="equal numbers of consecutive ranks on every host",
            do="pass ranks_per_node=, or start equal numbers of consecutive ranks on each host",
        )
    return lengths.pop()
