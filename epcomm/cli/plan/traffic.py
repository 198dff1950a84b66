"""What one rank of a job sends in expectation: the rows of `routing` in the messages of `messages`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from epcomm.cli.plan.messages import Sizes, Traffic, combine_sends, dispatch_sends
from epcomm.cli.plan.routing import Rows, expected_rows

__all__ = ["Expected", "Job", "combine_traffic", "dispatch_traffic"]

_SCALE_CHANNELS, _SCALE_BYTES = 128, 4
_BF16_BYTES = 2


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

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Of its rows and of what travels beside them."""
        is_fp8 = self.dtype == "fp8"
        return Sizes(
            num_nodes=self.num_nodes,
            gpus=self.gpus,
            experts=self.experts,
            topk=self.topk,
            dispatch_row_bytes=self.hidden if is_fp8 else _BF16_BYTES * self.hidden,
            scales_bytes=_SCALE_BYTES * self.hidden // _SCALE_CHANNELS if is_fp8 else 0,
            combine_row_bytes=_BF16_BYTES * self.hidden,
        )


@dataclass(frozen=True)
class Expected:
    """`Moved` in expectation: as much is sent as received."""

    job: Job

    @property
    def crossing(self) -> float:
        return self.job.rows.crossing

    @property
    def over_nvlink(self) -> float:
        return self.job.rows.over_nvlink

    def messages(self, unit_tokens: int) -> tuple[int, float]:
        """Tokens choose independently, so a unit of u of them has nothing for a node with probability (1 - P)^u."""
        num_full, rest = divmod(self.job.tokens, unit_tokens)
        miss, num_others = 1 - self.job.rows.node_hit, self.job.num_nodes - 1
        filled = num_full * (1 - miss**unit_tokens) + (1 - miss**rest)
        return num_others * (num_full + (rest > 0)), num_others * filled


def dispatch_traffic(job: Job) -> Traffic:
    """Of a whole dispatch, counts included."""
    return dispatch_sends(job.sizes, Expected(job))


def combine_traffic(job: Job) -> Traffic:
    """Of a combine without weights."""
    return combine_sends(job.sizes, Expected(job), Expected(job))
