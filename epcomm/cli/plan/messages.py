"""What one rank sends in one dispatch or combine, from the rows that it moves: bytes over the network and NVLink, and
operations of its NIC.

The messages are those of the kernels (``epcomm.kernels.internode_dispatch`` and ``internode_combine``) between ranks
that reach each other over a network: a unit of consecutive tokens has one for each other node. On the network:

    dispatch, rows      for each row 128 bytes, which say where it goes, and the row
    dispatch, beside    for each row 4 bytes a local rank, scales, indices (int64), weights, the source token
    combine, questions  for each row 4 bytes a local rank
    combine, answers    the sums

Each message has a word of 8 bytes that says it is there, also when it is empty, and in dispatch a word comes back that
it was taken. So the words grow with the nodes while the rows do not: N - 1 of them for each unit of 2 to 8 tokens.
What is counted as operations of the NIC: a put for each message that is not empty, one signal for each word, and for
each rank of another node four signals as a call begins, and in the exchange of counts a put and its signal.

The counts go from every rank to every other, all of them: 8 bytes for each rank, expert of the receiver, and agreed
value. That is how the kernel for one node does it; its tables have room for 32 ranks.

On NVLink a row is its bytes and, in dispatch, scales, indices, weights and source, without gaps. A dispatch with a
handle has no counts, indices, weights and sources: beside its rows there are the scales, if there are any.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Protocol

from epcomm.kernels import internode_combine, internode_dispatch
from epcomm.kernels.layout import MAX_RANKS, NUM_AGREED, round_up
from epcomm.kernels.rings import PLACES_BYTES, Message

__all__ = ["Messages", "Moved", "Sizes", "Traffic", "combine_sends", "dispatch_sends"]

_WORD_BYTES = 8
_INDEX_BYTES, _WEIGHT_BYTES, _SOURCE_BYTES = 8, 4, 4
_FIXED_CELLS = 2  # of an exchange: status, capacity
_ENTRY_WORDS = 4  # with which a call begins


@dataclass(frozen=True)
class Sizes:
    """Of what is moved.

    Attributes:
        num_nodes: N.
        gpus: L, ranks of a node.
        experts: E, of all ranks.
        topk: k, whose indices and weights travel with a row; 0: there is a handle, and neither they nor counts do.
        dispatch_row_bytes: of a row alone.
        scales_bytes: of the scales of a row; 0: it has none.
        combine_row_bytes: of a row on the way back.
    """

    num_nodes: int
    gpus: int
    experts: int
    topk: int
    dispatch_row_bytes: int
    scales_bytes: int
    combine_row_bytes: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.gpus

    @property
    def beside_bytes(self) -> int:
        """What a received row has beside it: scales, indices, weights and source."""
        choices = self.topk * (_INDEX_BYTES + _WEIGHT_BYTES) + _SOURCE_BYTES if self.topk else 0
        return self.scales_bytes + choices

    def with_handle(self) -> Sizes:
        """Of a dispatch of the same rows with a handle."""
        return replace(self, topk=0)


class Moved(Protocol):
    """The rows of one dispatch that a rank sends, or that it gets; numbers, or their expectations."""

    @property
    def crossing(self) -> float:
        """Rows over the network, once for each token and other node."""

    @property
    def over_nvlink(self) -> float:
        """Rows from GPU to GPU within the node, forwarded ones included."""

    def messages(self, unit_tokens: int) -> tuple[int, float]:
        """(messages for units of so many tokens to all other nodes, those of them that have a row)."""


class Messages:
    """Of the kernels.

    Attributes:
        rows, beside: of a dispatch; `beside` is None if there is nothing beside the rows.
        asked, answered: of a combine without weights.
    """

    def __init__(self, sizes: Sizes) -> None:
        gpus, choices = sizes.gpus, (sizes.topk * _INDEX_BYTES, sizes.topk * _WEIGHT_BYTES)
        self.rows = internode_dispatch.rows(sizes.dispatch_row_bytes, True)
        beside = internode_dispatch.beside(gpus, sizes.scales_bytes, *choices).message
        self.beside = beside if sizes.beside_bytes else None
        self.asked, self.answered, *_ = internode_combine.messages(sizes.combine_row_bytes, 0, gpus)

    @property
    def of_dispatch(self) -> tuple[Message, ...]:
        return (self.rows,) if self.beside is None else (self.rows, self.beside)


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one call, or what it gets.

    Attributes:
        row_bytes: over the network, rows alone.
        other_bytes: over the network, all else: places, what is beside rows, questions, words, counts.
        nic_operations: puts and signals.
        nvlink_bytes: from GPU to GPU within the node.
    """

    row_bytes: float
    other_bytes: float
    nic_operations: float
    nvlink_bytes: float

    @property
    def network_bytes(self) -> float:
        return self.row_bytes + self.other_bytes

    def __add__(self, other: Traffic) -> Traffic:
        """Of both calls."""
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scaled(self, factor: float) -> Traffic:
        """So many times as much."""
        return Traffic(*(factor * number for number in astuple(self)))


def dispatch_sends(sizes: Sizes, moved: Moved) -> Traffic:
    """Of a whole dispatch, or of one with a handle."""
    messages, num_far = Messages(sizes), sizes.num_ranks - sizes.gpus
    payload = moved.crossing * (messages.rows.row_bytes - PLACES_BYTES)
    other, operations = _entries(num_far)
    other += moved.crossing * PLACES_BYTES
    for message in messages.of_dispatch:
        num_messages, num_filled = moved.messages(message.unit_tokens)
        other += 2 * num_messages * _WORD_BYTES
        operations += num_filled + 2 * num_messages
    if messages.beside is not None:
        other += moved.crossing * messages.beside.row_bytes
    if sizes.topk:
        cells = max(MAX_RANKS, sizes.num_ranks) + NUM_AGREED + _FIXED_CELLS + sizes.experts // sizes.num_ranks
        other += num_far * (round_up(cells * _WORD_BYTES, 2 * _WORD_BYTES) + _WORD_BYTES)
        operations += 2 * num_far
    return Traffic(payload, other, operations, moved.over_nvlink * (sizes.dispatch_row_bytes + sizes.beside_bytes))


def combine_sends(sizes: Sizes, asking: Moved, answering: Moved) -> Traffic:
    """Of a combine without weights.

    Args:
        sizes: as of its dispatch.
        asking: the rows of that dispatch that went out: whose sums this rank asks for.
        answering: those that came in: which it sums for other nodes, and gives to the GPUs of its own.
    """
    messages = Messages(sizes)
    other, operations = _entries(sizes.num_ranks - sizes.gpus)
    for moved in (asking, answering):
        num_messages, num_filled = moved.messages(messages.asked.unit_tokens)
        other += num_messages * _WORD_BYTES
        operations += num_filled + num_messages
    other += asking.crossing * messages.asked.row_bytes
    payload = answering.crossing * messages.answered.row_bytes
    return Traffic(payload, other, operations, answering.over_nvlink * sizes.combine_row_bytes)


def _entries(num_far: int) -> tuple[float, float]:
    """(bytes, operations) of the words with which a call begins, to `num_far` ranks of other nodes."""
    return num_far * _ENTRY_WORDS * _WORD_BYTES, num_far * _ENTRY_WORDS
