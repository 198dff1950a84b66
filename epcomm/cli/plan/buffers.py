"""``num_nvl_bytes`` and ``num_rdma_bytes`` of a job: the size hints of ``Config``, beside what the kernels take.

An arena needs room for the rows of a dispatch (``received`` of `routing`, each with what is beside it), of which about
half of the ranks get more than expected, and again for the bfloat16 rows of a combine buffer, if one is taken. The hint
has room for 8192 tokens of each of 8 ranks. On one node what has no room goes another way; on several it is an error.

The network's memory holds two rings for each node: one that messages leave from, one where they come in; every group
of a ring has room for one message. The least is one group of each, the most is as many as the kernels have a use for.
The hint counts 8 ranks a node, as DeepEP V1 does.
"""

from __future__ import annotations

from typing import NamedTuple

from epcomm.cli.plan.messages import Messages
from epcomm.cli.plan.traffic import Job
from epcomm.config import Config, combine_config, dispatch_config
from epcomm.kernels import internode_combine, internode_dispatch
from epcomm.kernels.rings import Message, Ring, Rings, least_area_bytes, words_bytes

__all__ = ["Buffers", "buffers_of"]


class Buffers(NamedTuple):
    """Bytes of one rank.

    Attributes:
        nvl_hint: ``Config.get_nvl_buffer_size_hint``, the larger one of dispatch and combine.
        nvl_expected: of the rows that a dispatch brings in expectation.
        rdma_hint: ``Config.get_rdma_buffer_size_hint``, likewise.
        rdma_least: below that calls raise CapacityError.
        rdma_most: more is of no use.
        dispatch_groups: groups of the ring of rows with the hint, or with the most if that is too small; 0 on one node.
        combine_groups: of questions, likewise.
        dispatch_turns: how often a dispatch uses a group, of the ring where that is most; 0 on one node.
        combine_turns: likewise.
    """

    nvl_hint: int
    nvl_expected: float
    rdma_hint: int
    rdma_least: int
    rdma_most: int
    dispatch_groups: int
    combine_groups: int
    dispatch_turns: float
    combine_turns: float


def buffers_of(job: Job) -> Buffers:
    """Sizes for `job`, with the `Config` that its number of ranks has by default."""
    sizes, num_sms = job.sizes, Config().num_sms
    row_bytes = max(sizes.dispatch_row_bytes, sizes.combine_row_bytes)
    configs = dispatch_config(job.num_ranks, num_sms), combine_config(job.num_ranks, num_sms)
    nvl = max(config.get_nvl_buffer_size_hint(row_bytes, job.num_ranks) for config in configs)
    expected = job.rows.received * (sizes.dispatch_row_bytes + sizes.beside_bytes)
    if job.num_nodes == 1:
        return Buffers(nvl, expected, 0, 0, 0, 0, 0, 0.0, 0.0)
    hint = max(config.get_rdma_buffer_size_hint(row_bytes, job.num_ranks) for config in configs)
    sent = Messages(sizes)
    calls = (
        (sent.of_dispatch, internode_dispatch.WANTED_GROUPS),
        ((sent.asked, sent.answered), (internode_combine.WANTED_GROUPS,) * 2),
    )
    smallest = least_area_bytes(job.num_nodes, is_staged=True)
    asking = Rings(0, smallest, 0, job.gpus, job.num_nodes, is_staged=True)
    least = max(smallest, *(asking.least_bytes(*messages) for messages, _ in calls))
    most = max(least, *(_all_bytes(job.num_nodes, messages, wanted) for messages, wanted in calls))
    rings = Rings(0, hint if hint >= least else most, 0, job.gpus, job.num_nodes, is_staged=True)
    dispatch, combine = (rings.cut(messages, wanted) for messages, wanted in calls)
    groups, turns = (dispatch[0].num_groups, combine[0].num_groups), (_turns(job, dispatch), _turns(job, combine))
    return Buffers(nvl, expected, hint, least, most, *groups, *turns)


def _turns(job: Job, rings: tuple[Ring, ...]) -> float:
    return max(-(-job.tokens // ring.unit_tokens) / ring.num_groups for ring in rings)


def _all_bytes(num_nodes: int, messages: tuple[Message, ...], wanted: tuple[int, ...]) -> int:
    groups = zip(messages, wanted, strict=True)
    return words_bytes(num_nodes) + 2 * num_nodes * sum(message.group_bytes * count for message, count in groups)
