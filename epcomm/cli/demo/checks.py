"""What the demo proves: the transport bit for bit, the layer within the error of its roundings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import Topology
from epcomm.cli.demo.arrays import Received
from epcomm.cli.demo.model import BFLOAT16, MoeLayer
from epcomm.testing import assert_bitwise

__all__ = ["LayerError", "Routing", "check_combine", "check_dispatch", "compare_layers"]

_UNIT_ROUNDOFF = 2.0**-8  # of bfloat16


@dataclass(frozen=True, eq=False)
class Routing:
    """The gate's choices of all tokens, gathered from the ranks by other means than the Buffer.

    Attributes:
        topk_idx, topk_weights: ``[tokens, K]`` in global order.
        first_token: global index of the first token of every rank, and the number of tokens at the end.
        num_local_experts: experts of one rank.
    """

    topk_idx: NDArray[np.int64]
    topk_weights: NDArray[np.float32]
    first_token: Sequence[int]
    num_local_experts: int

    def is_token_in_rank(self, num_ranks: int) -> NDArray[np.bool_]:
        """bool ``[tokens, R]``."""
        owners = self.topk_idx // self.num_local_experts
        visited: NDArray[np.bool_] = (owners[:, :, None] == np.arange(num_ranks)).any(axis=1)
        return visited


def check_dispatch(layer: MoeLayer, routing: Routing, rank: int, received: Received) -> str:
    """Compare what `rank` received with what the text says it should have; the first difference, or ""."""
    num_local = routing.num_local_experts
    tokens = np.flatnonzero((routing.topk_idx // num_local == rank).any(axis=1))
    is_local = routing.topk_idx[tokens] // num_local == rank
    sources = np.searchsorted(np.asarray(routing.first_token[1:]), tokens, side="right")
    wanted = {
        "rows": (received.rows, layer.embed(tokens)),
        "expert indices": (
            received.topk_idx,
            np.where(is_local, routing.topk_idx[tokens] - rank * num_local, -1),
        ),
        "weights": (
            received.topk_weights,
            np.where(is_local, routing.topk_weights[tokens], np.float32(0)),
        ),
        "source tokens": (
            received.sources,
            (tokens - np.asarray(routing.first_token)[sources]).astype(np.int32),
        ),
        "tokens per expert": (
            received.per_expert,
            np.bincount(routing.topk_idx[tokens][is_local] - rank * num_local, minlength=num_local),
        ),
    }
    return _first_difference(wanted)


def check_combine(x: NDArray[Any], routing: Routing, topology: Topology, combined: NDArray[Any]) -> str:
    """Compare the combine of the received rows as they are with copies of `x` summed; the first difference, or "".

    A token that visited n ranks of a node comes from there as n x, rounded; the nodes are then added in order.

    Args:
        x: bfloat16 ``[T, H]``, this rank's tokens.
        routing: of all tokens.
        topology: where this rank is.
        combined: what ``buffer.combine(recv_x, handle)`` returned.
    """
    own = slice(routing.first_token[topology.rank], routing.first_token[topology.rank + 1])
    visited = routing.is_token_in_rank(topology.size)[own].reshape(len(x), topology.num_nodes, topology.ranks_per_node)
    visits = visited.sum(axis=2, dtype=np.float32)
    total = np.zeros(x.shape, np.float32)
    for node in range(topology.num_nodes):
        # n x is exact in float32 (8 bits times a small integer), in whatever order the copies were added.
        from_node = visits[:, node, None] * x.astype(np.float32)
        total += from_node if topology.num_nodes == 1 else from_node.astype(BFLOAT16).astype(np.float32)
    return _first_difference({"rows": (combined, total.astype(BFLOAT16))})


def _first_difference(pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> str:
    for what, (got, want) in pairs.items():
        try:
            assert_bitwise(got, want, what)
        except AssertionError as difference:
            return " ".join(str(difference).split("\n")[:2])
    return ""


@dataclass(frozen=True)
class LayerError:
    """How far two outputs of the layer are apart.

    Attributes:
        largest: the largest difference of two elements.
        tolerance: what is allowed for that element.
        worst_share: the largest share of its tolerance that any element uses; at most 1 when the check holds.
        equal_share: elements with equal bits, of all.
    """

    largest: float
    tolerance: float
    worst_share: float
    equal_share: float

    @property
    def holds(self) -> bool:
        """Every element is within its tolerance; False when one is NaN."""
        return self.worst_share <= 1


def compare_layers(got: NDArray[Any], want: NDArray[Any], magnitude: NDArray[np.float32]) -> LayerError:
    """Compare the output of the ranks with that of the dense layer.

    With u = 2^-8, the unit roundoff of bfloat16, and m the sum of the experts' magnitudes: the ranks round their own
    sums, and nodes theirs (2 u m together), then each side rounds the sum over the experts (at most u m each) and the
    residual (u |out| each). The tolerance is 5 u m + 3 u |out|; the excess covers float32 sums in another order.

    Args:
        got: bfloat16 ``[T, H]``.
        want: bfloat16 ``[T, H]``, the dense layer's.
        magnitude: float32 ``[T, H]``, m.
    """
    a, b = got.astype(np.float64), want.astype(np.float64)
    error = np.abs(a - b)
    tolerance = _UNIT_ROUNDOFF * (5 * magnitude + 3 * np.abs(b)) + np.finfo(np.float32).tiny
    share = error / tolerance
    largest = np.unravel_index(np.argmax(error), error.shape)  # argmax takes the first NaN for the largest
    return LayerError(
        largest=float(error[largest]),
        tolerance=float(tolerance[largest]),
        worst_share=float(np.max(share)),
        equal_share=float(np.mean(got.view(np.uint16) == want.view(np.uint16))),
    )
