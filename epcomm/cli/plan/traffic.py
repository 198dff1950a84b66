"""What one rank sends in one dispatch or combine: bytes over the network and NVLink, operations of its NIC.

The messages are those of the kernels (``epcomm.kernels.internode_dispatch`` and ``internode_combine``): a unit of
consecutive tokens has one for each other node. Per message and rank, on the network:

    dispatch, rows      for each row 4 bytes a local rank (where it goes), rounded up to 128 a message, and the row
    dispatch, beside    for each row 4 bytes a local rank, scales, indices (int64), weights, the source token
    combine, questions  for each token, wanted or not, 4 bytes a local rank
    combine, answers    the sums, one for each token that chose the node

Each message has a word of 8 bytes that says it is there, also when it is empty, and in dispatch a word comes back that
it was taken. So the words grow with the nodes while the rows do not: N - 1 of them for each unit of 2 or 4 tokens. What
is counted as operations of the NIC: a put for each message that is not empty (an answer: for each row, they need not be
neighbours), one signal for each word, and for each rank of another node one in the exchange of counts, one as the call
begins and one as it ends.

The counts go from every rank to every other, all of them: 8 bytes for each rank, expert of the receiver, and agreed
value. That is how the kernel for one node does it; its tables end at 32 ranks.

On NVLink a row is its bytes and, in dispatch, scales, indices, weights and source, without gaps.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from epcomm.cli.plan.routing import Rows, expected_rows
from epcomm.kernels import internode_combine, internode_dispatch
from epcomm.kernels.layout import NUM_AGREED
from epcomm.kernels.rings import Message

__all__ = ["Job", "Messages", "Traffic", "combine_traffic", "dispatch_traffic", "messages_of"]

_WORD_BYTES = 8
_INDEX_BYTES, _WEIGHT_BYTES, _SOURCE_BYTES = 8, 4, 4
_SCALE_CHANNELS, _SCALE_BYTES = 128, 4
_BF16_BYTES = 2
_FIXED_CELLS = 2  # of an exchange: status, capacity


@dataclass(frozen=True)
class Job:
    """Sizes, as in the options.

    Attributes:
        num_nodes: N.
        gpus: L, ranks of a node.
        tokens: T, of every rank.
        hidden: H.
        topk: k.
        wanted_experts: E, before it is rounded up to a multiple of the ranks.
        dtype: "bf16", or "fp8" with a float32 scale for each 128 channels; combine is in bf16.
        node_limit: M, the most nodes on which a token has experts; None: no limit.
    """

    num_nodes: int
    gpus: int
    tokens: int
    hidden: int
    topk: int
    wanted_experts: int
    dtype: str
    node_limit: int | None = None

    def with_nodes(self, num_nodes: int) -> Job:
        """The same on another number of nodes."""
        return dataclasses.replace(self, num_nodes=num_nodes)

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus

    @property
    def experts(self) -> int:
        """The smallest multiple of the ranks that is no less than was wanted."""
        return -(-self.wanted_experts // self.num_ranks) * self.num_ranks

    @functools.cached_property
    def rows(self) -> Rows:
        """What it moves."""
        return expected_rows(self.num_nodes, self.gpus, self.tokens, self.experts, self.topk, self.node_limit)

    @property
    def dispatch_row_bytes(self) -> int:
        return self.hidden if self.dtype == "fp8" else _BF16_BYTES * self.hidden

    @property
    def scales_bytes(self) -> int:
        return _SCALE_BYTES * self.hidden // _SCALE_CHANNELS if self.dtype == "fp8" else 0

    @property
    def beside_bytes(self) -> int:
        """What a received row has beside it: scales, indices, weights and source."""
        return self.scales_bytes + self.topk * (_INDEX_BYTES + _WEIGHT_BYTES) + _SOURCE_BYTES

    @property
    def combine_row_bytes(self) -> int:
        return _BF16_BYTES * self.hidden


@dataclass(frozen=True)
class Messages:
    """Of the kernels, for the sizes of a job."""

    rows: Message
    beside: Message
    asked: Message
    answered: Message


def messages_of(job: Job) -> Messages:
    """Those that the kernels would send; a combine without weights."""
    weights_bytes = job.topk * _WEIGHT_BYTES
    beside = internode_dispatch.beside(job.gpus, job.scales_bytes, job.topk * _INDEX_BYTES, weights_bytes)
    combine = internode_combine.messages(job.combine_row_bytes, 0, job.gpus)
    rows = internode_dispatch.rows(job.dispatch_row_bytes, job.gpus)
    return Messages(rows, beside.message, combine.asked, combine.answered)


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one call; in expectation as much as it receives.

    Attributes:
        row_bytes: over the network, rows alone.
        other_bytes: over the network, all else: places, what is beside rows, questions, words, counts.
        nic_operations: puts and signals.
        nvlink_bytes: to other GPUs of the node.
    """

    row_bytes: float
    other_bytes: float
    nic_operations: float
    nvlink_bytes: float

    @property
    def network_bytes(self) -> float:
        return self.row_bytes + self.other_bytes


def dispatch_traffic(job: Job) -> Traffic:
    """Of a whole dispatch, counts included."""
    rows, sent, num_others = job.rows, messages_of(job), job.num_nodes - 1
    payload = rows.crossing * sent.rows.row_bytes
    other, operations = rows.crossing * sent.beside.row_bytes, 0.0
    for message in (sent.rows, sent.beside):
        num_units, num_filled = _num_messages(job, message)
        other += num_filled * message.head_bytes + 2 * num_units * num_others * _WORD_BYTES
        operations += num_filled + 2 * num_units * num_others
    num_far = job.num_ranks - job.gpus
    cells = job.num_ranks + NUM_AGREED + _FIXED_CELLS + job.experts // job.num_ranks
    other += num_far * cells * _WORD_BYTES
    operations += 3 * num_far
    return Traffic(payload, other, operations, rows.over_nvlink * (job.dispatch_row_bytes + job.beside_bytes))


def combine_traffic(job: Job) -> Traffic:
    """Of a combine without weights."""
    rows, sent, num_others = job.rows, messages_of(job), job.num_nodes - 1
    num_units = -(-job.tokens // sent.asked.unit_tokens)
    questions = num_others * (job.tokens * sent.asked.row_bytes + num_units * _WORD_BYTES)
    words = num_others * num_units * _WORD_BYTES
    operations = num_others * num_units * 3 + rows.crossing + 2 * (job.num_ranks - job.gpus)
    payload = rows.crossing * sent.answered.row_bytes
    return Traffic(payload, questions + words, operations, rows.over_nvlink * job.combine_row_bytes)


def _num_messages(job: Job, message: Message) -> tuple[int, float]:
    """(units of a rank's tokens, expected messages of them to all other nodes that have a row).

    Tokens choose independently, so a unit of u of them has nothing for a node with probability (1 - P)^u.
    """
    num_full, rest = divmod(job.tokens, message.unit_tokens)
    miss = 1 - job.rows.node_hit
    filled = num_full * (1 - miss**message.unit_tokens) + (1 - miss**rest)
    return num_full + (rest > 0), (job.num_nodes - 1) * filled
