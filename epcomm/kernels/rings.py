"""Rings between the ranks of several nodes: how a rank's area is cut. Twin of ``cuda_src/sync/ring.cuh``."""

from __future__ import annotations

import struct
from typing import NamedTuple

from epcomm.errors import CapacityError
from epcomm.kernels.layout import MAX_RANKS, UNIT, round_up

__all__ = [
    "MAX_GROUPS",
    "MAX_UNIT",
    "NODES",
    "PLACES_BYTES",
    "RING",
    "Message",
    "Ring",
    "Rings",
    "least_area_bytes",
    "words_bytes",
]

MAX_GROUPS = 512
MAX_UNIT = 32  # tokens
PLACES_BYTES = round_up(4 * MAX_RANKS, UNIT)  # ahead of a row: an int32 for every rank, or for those of a node
_NUM_WORDS = 6
_SOME_GROUPS = 16
_LEAST_BYTES = 16 << 10  # a node: a group of the smallest rows

NODES = struct.Struct("<Q4i")  # area, ranks_per_node, num_nodes, own, local
RING = struct.Struct("<Q4I")  # offset, num_groups, group_bytes, row_bytes, unit_tokens


class Message(NamedTuple):
    """What travels of a unit of tokens: a row of each, at multiples of `row_bytes`.

    Attributes:
        unit_tokens, row_bytes: as above.
        is_common: in front of a network there is one for all nodes.
    """

    unit_tokens: int
    row_bytes: int
    is_common: bool = False

    @property
    def group_bytes(self) -> int:
        return round_up(self.unit_tokens * self.row_bytes, UNIT)


class Ring(NamedTuple):
    """Fields of the struct."""

    offset: int
    num_groups: int
    group_bytes: int
    row_bytes: int
    unit_tokens: int


def words_bytes(num_nodes: int) -> int:
    """Bytes of the words at the begin of an area."""
    return _NUM_WORDS * num_nodes * MAX_GROUPS * 8


def least_area_bytes(num_nodes: int, *, is_staged: bool) -> int:
    """Bytes of the smallest area; `is_staged` as for `Rings`."""
    return round_up(words_bytes(num_nodes), UNIT) + num_nodes * (2 if is_staged else 1) * _LEAST_BYTES


class Rings:
    """The area of a rank for what comes from other nodes, `num_bytes` at `offset` of its words and messages.

    Args:
        offset, num_bytes: of the area.
        rank: this rank.
        ranks_per_node, num_nodes: of the job.
        is_staged: nodes are behind a network, and the area has rings in which messages start, too.

    Attributes:
        nodes: fields of the struct ``Nodes``.
        is_staged: as above.

    Raises:
        CapacityError: there is not even room for the smallest rows.
    """

    def __init__(
        self, offset: int, num_bytes: int, rank: int, ranks_per_node: int, num_nodes: int, *, is_staged: bool
    ) -> None:
        self.nodes = (offset, ranks_per_node, num_nodes, *divmod(rank, ranks_per_node))
        self.is_staged = is_staged
        self._words = round_up(words_bytes(num_nodes), UNIT)
        self._num_bytes, self._num_nodes = num_bytes, num_nodes
        least = least_area_bytes(num_nodes, is_staged=is_staged)
        if num_bytes < least:
            raise self._too_small(least, "of the smallest rows")

    def _too_small(self, least: int, what: str) -> CapacityError:
        return CapacityError(
            "num_rdma_bytes",
            got=self._num_bytes,
            wanted=f"at least {least} bytes for rings {what} between {self._num_nodes} nodes",
            do="raise it; Config.get_rdma_buffer_size_hint has a good value",
        )

    def least_bytes(self, *messages: Message) -> int:
        """What the area takes with a single group for each message and node."""
        return self._words + sum(map(self._bytes_of_a_group, messages))

    def has_room(self, *messages: Message) -> bool:
        """Whether there is room for some groups of each, so that ranks do not wait for each other's every message."""
        return self._words + _SOME_GROUPS * sum(map(self._bytes_of_a_group, messages)) <= self._num_bytes

    def _bytes_of_a_group(self, message: Message) -> int:
        """In all rings of such messages."""
        num_staging = 0 if not self.is_staged else 1 if message.is_common else self._num_nodes
        return (self._num_nodes + num_staging) * message.group_bytes

    def cut(self, messages: tuple[Message, ...], wanted: tuple[int, ...]) -> tuple[Ring, ...]:
        """A ring for each message, behind one another.

        Args:
            messages: what travels at the same time.
            wanted: groups that each would have if there were room, at most `MAX_GROUPS`.

        Raises:
            CapacityError: there is not room for one group of each.
        """
        least = self.least_bytes(*messages)
        if self._num_bytes < least:
            raise self._too_small(least, "of such rows")
        # One group of each, and of what is left the same part of all that is wanted.
        more = sum(self._bytes_of_a_group(m) * (most - 1) for m, most in zip(messages, wanted, strict=True))
        room = self._num_bytes - least
        rings, offset = [], self._words
        for message, most in zip(messages, wanted, strict=True):
            num_groups = most if more <= room else 1 + (most - 1) * room // more
            rings.append(Ring(offset, num_groups, message.group_bytes, message.row_bytes, message.unit_tokens))
            offset += num_groups * self._bytes_of_a_group(message)
        return tuple(rings)
