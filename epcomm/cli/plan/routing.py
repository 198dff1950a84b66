"""How many rows dispatch moves, in expectation, when every set of k different experts is equally likely.

E experts lie on R = N * L ranks, E / R on each; a rank or node that owns m of them is chosen by a token with the
hypergeometric probability of at least one hit,

    P(m) = 1 - C(E - m, k) / C(E, k),    m = E / R for a rank, m = E / N for a node.

A sum of expectations needs no independence, so with T tokens of every rank the expected rows of a rank are

    crossing    T * (N - 1) * P(E / N)          once for each token and other node that it chose
    near        T * (L - 1) * P(E / R)          of own tokens, to the other GPUs of the node
    forwarded   T * (N - 1) * (L - 1) * P(E / R)   come over the network, written to the other GPUs of the node
    own         T * N * P(E / R)                the same to the rank itself: its memory, and no link
    received    T * N * L * P(E / R)

and as many come in as go out, since all ranks are alike. Combine moves the same numbers of rows the other way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from epcomm.errors import InputError

__all__ = ["Rows", "expected_rows", "hit_probability"]


def hit_probability(num_experts: int, num_owned: int, num_topk: int) -> float:
    """Probability that `num_topk` different experts of `num_experts` have one among `num_owned` given ones.

    Raises:
        InputError: a number of experts that there are not.
    """
    for name, value in (("num_owned", num_owned), ("num_topk", num_topk)):
        if not 0 <= value <= num_experts:
            raise InputError(name, got=value, wanted=f"0 to {num_experts}, the number of experts")
    every = math.comb(num_experts, num_topk)
    # Integers until the division: 1 - x would lose the digits of a small probability.
    return (every - math.comb(num_experts - num_owned, num_topk)) / every


class Rows(NamedTuple):
    """Expected rows of one rank in one dispatch; see above. Combine: the same, back.

    Attributes:
        node_hit: probability that a token chose a given node.
        rank_hit: that it chose a given rank.
        crossing: sent to other nodes.
        near: of own tokens, over NVLink.
        forwarded: of other nodes' tokens, over NVLink.
        own: written to this rank's memory by itself.
        received: by this rank's experts.
        for_each_rank: what would cross if a row went to every rank by itself.
    """

    node_hit: float
    rank_hit: float
    crossing: float
    near: float
    forwarded: float
    own: float
    received: float
    for_each_rank: float

    @property
    def over_nvlink(self) -> float:
        """Rows that this rank writes to other GPUs of its node."""
        return self.near + self.forwarded


def expected_rows(num_nodes: int, gpus: int, num_tokens: int, num_experts: int, num_topk: int) -> Rows:
    """Of one rank, with `num_tokens` on every one.

    Raises:
        InputError: `num_experts` is not a multiple of the ranks, or `num_topk` not in 0 .. `num_experts`.
    """
    num_ranks = num_nodes * gpus
    if num_experts < 1 or num_experts % num_ranks:
        raise InputError("num_experts", got=num_experts, wanted=f"a multiple of the {num_ranks} ranks")
    node_hit = hit_probability(num_experts, num_experts // num_nodes, num_topk)
    rank_hit = hit_probability(num_experts, num_experts // num_ranks, num_topk)
    near = num_tokens * (gpus - 1) * rank_hit
    return Rows(
        node_hit=node_hit,
        rank_hit=rank_hit,
        crossing=num_tokens * (num_nodes - 1) * node_hit,
        near=near,
        forwarded=(num_nodes - 1) * near,
        own=num_tokens * num_nodes * rank_hit,
        received=num_tokens * num_ranks * rank_hit,
        for_each_rank=num_tokens * (num_ranks - gpus) * rank_hit,
    )
