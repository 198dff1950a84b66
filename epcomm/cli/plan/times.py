"""How long the links take for it, and which of them decides.

Rows stream: while some cross, others are forwarded. So a call takes as long as the slowest of

    network     bytes / nic_gbs
    NIC ops     puts and signals / nic_mops
    rings       units / groups of the ring * (2 * nic_us + nvlink_us): a group is used again when it was taken
    NVLink      bytes / nvlink_gbs

and, before and after it, its latencies, which nothing hides:

    dispatch    4 hops: the counts, the entry (where the outputs lie), the first row, the end
    combine     4 hops: the entry (rows are ready), the first question, its answer, the end

of nic_us each on several nodes, with one more nvlink_us of the forwarder; on one node of nvlink_us each, where a
combine loads the row, which is there and back, instead of asking. These latencies and the rate of the NIC are
assumptions, not measurements.

Left out: memory (on GPUs with NVLink it is several times as fast), SMs (enough of them are assumed), the launch of
kernels, the host's wait for the counts, ranks that are late, uneven routing, and other traffic in the network. So, with
the right numbers for the links, a call takes no less than predicted, and rather more.
"""

from __future__ import annotations

from dataclasses import dataclass

from epcomm.cli.plan.buffers import Buffers, buffers_of
from epcomm.cli.plan.messages import Traffic
from epcomm.cli.plan.traffic import Job, combine_traffic, dispatch_traffic

__all__ = ["Links", "Plan", "Prediction", "link_s", "predict"]

_HOPS = 4


@dataclass(frozen=True)
class Links:
    """What one GPU has; each way.

    Attributes:
        nic_gbs, nvlink_gbs: 1e9 bytes a second.
        nic_mops: 1e6 operations of its NIC a second.
        nic_us, nvlink_us: microseconds until a write is seen at the other end.
    """

    nic_gbs: float
    nvlink_gbs: float
    nic_mops: float
    nic_us: float
    nvlink_us: float


@dataclass(frozen=True)
class Prediction:
    """One call, in seconds.

    Attributes:
        operation: "dispatch" or "combine".
        traffic: of a rank.
        bounds_s: by name of the bound; see above.
        latency_s: what comes on top of the largest.
    """

    operation: str
    traffic: Traffic
    bounds_s: dict[str, float]
    latency_s: float

    @property
    def bottleneck(self) -> str:
        """The bound that decides; "latency" if that is longer than any, or all there is."""
        name = max(self.bounds_s, key=lambda name: self.bounds_s[name])
        return name if self.bounds_s[name] >= self.latency_s else "latency"

    @property
    def total_s(self) -> float:
        return max(self.bounds_s.values()) + self.latency_s


@dataclass(frozen=True)
class Plan:
    """All that is said of one job."""

    job: Job
    buffers: Buffers
    dispatch: Prediction
    combine: Prediction


def link_s(num_bytes: float, gbs: float) -> float:
    """Seconds that a link of `gbs`, 1e9 bytes a second, takes for them."""
    return num_bytes / (gbs * 1e9)


def predict(job: Job, links: Links) -> Plan:
    """Times and sizes of `job`."""
    buffers = buffers_of(job)
    is_alone = job.num_nodes == 1
    hop = links.nvlink_us if is_alone else links.nic_us
    forward = 0.0 if is_alone else links.nvlink_us
    round_trip_s = (2 * links.nic_us + links.nvlink_us) * 1e-6

    def prediction(operation: str, traffic: Traffic, turns: float) -> Prediction:
        bounds = {
            "network": link_s(traffic.network_bytes, links.nic_gbs),
            "NIC ops": traffic.nic_operations / (links.nic_mops * 1e6),
            "rings": turns * round_trip_s,
            "NVLink": link_s(traffic.nvlink_bytes, links.nvlink_gbs),
        }
        latency = 0.0 if job.num_ranks == 1 else (_HOPS * hop + forward) * 1e-6
        return Prediction(operation, traffic, bounds, latency)

    dispatch = prediction("dispatch", dispatch_traffic(job), buffers.dispatch_turns)
    combine = prediction("combine", combine_traffic(job), buffers.combine_turns)
    return Plan(job, buffers, dispatch, combine)
