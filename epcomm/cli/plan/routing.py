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

With a limit of M nodes (group-limited gates, a group for each node: DeepSeek-V3, arXiv:2412.19437, section 2.1.2) the
experts have random scores, a node that of its best expert, and the k experts are the best ones of the M best nodes, as
`epcomm.testing.grouped_routing` draws them. In the order of their scores experts are drawn one by one: until M nodes
have come up, from all E; after that from these M only. `_chosen_of_node` follows the draws. So a token meets as many
nodes as without a limit, but no more than M. DeepSeek-V3 scores a node by the sum of its two best experts instead; with
random scores that changes both probabilities by less than 1 % (k = 8 of 256, M = 4, 8 to 32 nodes).
"""

from __future__ import annotations

import math
from collections import defaultdict
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


def expected_rows(
    num_nodes: int, gpus: int, num_tokens: int, num_experts: int, num_topk: int, node_limit: int | None = None
) -> Rows:
    """Of one rank, with `num_tokens` on every one.

    Args:
        num_nodes, gpus, num_tokens, num_experts, num_topk: N, L, T, E, k.
        node_limit: M, the most nodes on which a token has experts; None: no limit.

    Raises:
        InputError: `num_experts` is not a multiple of the ranks, or `num_topk` not in 0 .. `num_experts`, or
            `node_limit` nodes have fewer experts than that.
    """
    num_ranks = num_nodes * gpus
    if num_experts < 1 or num_experts % num_ranks:
        raise InputError("num_experts", got=num_experts, wanted=f"a multiple of the {num_ranks} ranks")
    of_node, of_rank = num_experts // num_nodes, num_experts // num_ranks
    if node_limit is None or node_limit >= num_nodes:
        node_hit = hit_probability(num_experts, of_node, num_topk)
        rank_hit = hit_probability(num_experts, of_rank, num_topk)
    else:
        chances = _chosen_of_node(num_nodes, of_node, num_topk, node_limit)
        node_hit = 1 - chances[0]
        # Of a node's experts every set is equally likely.
        rank_hit = sum(chance * hit_probability(of_node, of_rank, count) for count, chance in enumerate(chances))
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


def _chosen_of_node(num_nodes: int, of_node: int, num_topk: int, node_limit: int) -> list[float]:
    """Probabilities that a token chose 0, 1, ... experts of a given node, where `node_limit` < `num_nodes`.

    Follows the draws by the number of other nodes that have come up, and of experts that came from the given one.

    Raises:
        InputError: `node_limit` nodes have fewer than `num_topk` experts.
    """
    if node_limit < 1 or num_topk > node_limit * of_node:
        wanted = f"enough nodes of {of_node} experts for the {num_topk} of a token"
        raise InputError("node_limit", got=node_limit, wanted=wanted)
    now = {(0, 0): 1.0}
    for num_drawn in range(num_topk):
        after: dict[tuple[int, int], float] = defaultdict(float)
        for (others, count), chance in now.items():
            is_open = others + (count > 0) < node_limit
            # Experts that the next draw can take: of the given node, of others that have come up, of the rest.
            own = of_node - count if is_open or count > 0 else 0
            known = others * of_node - (num_drawn - count)
            rest = (num_nodes - 1 - others) * of_node if is_open else 0
            total = own + known + rest
            for state, ways in (((others, count + 1), own), ((others, count), known), ((others + 1, count), rest)):
                if ways:
                    after[state] += chance * ways / total
        now = after
    chances = [0.0] * (min(num_topk, of_node) + 1)
    for (_, count), chance in now.items():
        chances[count] += chance
    return chances
