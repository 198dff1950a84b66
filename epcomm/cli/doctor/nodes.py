"""``epcomm doctor --job``: the nodes of the job around this process, and whether its hosts have the same network.

Every rank of the job runs this. The first rank of each host looks at the host, by the probes of the doctor, and rank 0
prints what all have found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from epcomm import env
from epcomm.bootstrap import Communicator, Topology, as_communicator, discover
from epcomm.cli import EXIT_ERROR, job
from epcomm.cli.doctor import findings, runner
from epcomm.cli.doctor.findings import Finding
from epcomm.errors import RankMismatch, ShapeError

__all__ = ["JobReport", "gather", "show", "to_json", "to_text"]

_ONE_RANK_ONLY = ("nodes",)  # checks of the process and not of its host


@dataclass(frozen=True)
class JobReport:
    """What the ranks know together.

    Attributes:
        topology: of this rank; all else is equal on all ranks.
        local_ranks: by rank: its number on its host as the launcher says it, None where it does not.
        networks: by host identity, in the order of the ranks: the findings about its network.
    """

    topology: Topology
    local_ranks: tuple[int | None, ...]
    networks: dict[str, tuple[Finding, ...]]

    @property
    def alike(self) -> list[tuple[list[str], tuple[Finding, ...]]]:
        """Host identities that have the same findings, and these."""
        groups: dict[tuple[Finding, ...], list[str]] = {}
        for host, found in self.networks.items():
            groups.setdefault(found, []).append(host)
        return [(hosts, found) for found, hosts in groups.items()]


def show(*, as_json: bool, timeout_s: float | None) -> int:
    """Print the report on rank 0. Collective over the job, blocks the host for as long as the slowest host's probes.

    Args:
        as_json: as JSON, not as text.
        timeout_s: seconds that each probe may take; None: its own limit.

    Returns:
        0, or 1 where the ranks do not form nodes; the same on all ranks. A rank that fails by itself ends the job.

    Raises:
        MpiMissing, WrongLauncher: as `epcomm.bootstrap.as_communicator`.
    """
    comm = as_communicator(None)
    with job.failing_together(comm):
        try:
            report = gather(comm, lambda: runner.run_all(runner.NETWORK_PROBES, timeout_s=timeout_s))
        except (RankMismatch, ShapeError) as error:  # on all ranks, so one of them says it and nobody waits
            if comm.rank == 0:
                print(f"epcomm doctor: {error}", file=sys.stderr)
            return EXIT_ERROR
        if comm.rank == 0:
            print(to_json(report) if as_json else to_text(report, colour=findings.wants_colour()))
    return 0


def gather(comm: Communicator, look: Callable[[], Sequence[Finding]]) -> JobReport:
    """Topology and networks of the job. Collective, blocks the host.

    Args:
        comm: the ranks.
        look: findings about this host; called on the first rank of each host.

    Raises:
        RankMismatch, ShapeError: as `epcomm.bootstrap.discover`. On all ranks.
        InputError: ``EPCOMM_RANKS_PER_NODE`` is no number. On this rank alone; the others may wait for it.
    """
    topology = discover(comm)
    found = tuple(look()) if topology.same_host_ranks[0] == comm.rank else ()
    # Dictionaries, since classes of another copy of epcomm on another host need not be these.
    answers = comm.allgather((env.launcher_local_rank(), [asdict(finding) for finding in found]))
    networks = {}
    for host in dict.fromkeys(topology.hosts):
        _, records = answers[topology.hosts.index(host)]  # of its first rank, which looked
        kept = [record for record in records if record["check"] not in _ONE_RANK_ONLY]
        networks[host] = tuple(map(Finding.from_record, kept))
    return JobReport(topology, tuple(local_rank for local_rank, _ in answers), networks)


def to_text(report: JobReport, *, colour: bool = False) -> str:
    """A line a node, then the findings, once for all hosts that have the same."""
    topology = report.topology
    hosts = [_short(host) for host in topology.hosts]
    kind = "" if _nodes_are_hosts(topology) else ", virtual ones (EPCOMM_RANKS_PER_NODE)"
    counts = _count(topology.size, "rank"), _count(len(report.networks), "host"), _count(topology.num_nodes, "node")
    lines = ["{} on {}: {} of {}{}".format(*counts, topology.ranks_per_node, kind), ""]
    lines.append("node       ranks  numbers on the host  host")
    for node in range(topology.num_nodes):
        ranks = range(node * topology.ranks_per_node, (node + 1) * topology.ranks_per_node)
        numbers = ",".join("?" if (n := report.local_ranks[rank]) is None else str(n) for rank in ranks)
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
        lines.append(f"{node:4}  {f'{ranks[0]}-{ranks[-1]}':>10}  {numbers:>19}  {where}".rstrip())
    for same_hosts, found in report.alike:
        lines += ["", f"{', '.join(map(_short, same_hosts))}:", *findings.to_lines(found, colour=colour)]
    if len(report.alike) > 1:
        lines += ["", "The hosts differ; what one of them lacks, a job on all of them lacks."]
    return "\n".join(lines)


def to_json(report: JobReport) -> str:
    """``{"ranks", "nodes", "ranks_per_node", "hosts": [one a rank], "local_ranks", "networks": [...]}``."""
    topology = report.topology
    networks = [{"hosts": hosts, "findings": [asdict(finding) for finding in found]} for hosts, found in report.alike]
    record = {
        "ranks": topology.size,
        "nodes": topology.num_nodes,
        "ranks_per_node": topology.ranks_per_node,
        "hosts": list(topology.hosts),
        "local_ranks": list(report.local_ranks),
        "networks": networks,
    }
    return json.dumps(record, indent=2)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _nodes_are_hosts(topology: Topology) -> bool:
    by_node = [topology.hosts[rank] for rank in range(0, topology.size, topology.ranks_per_node)]
    own = all(topology.hosts[rank] == by_node[rank // topology.ranks_per_node] for rank in range(topology.size))
    return own and len(set(by_node)) == len(by_node)


def _short(host: str) -> str:
    """Name of a host without its boot id."""
    return host.partition("/")[0]
