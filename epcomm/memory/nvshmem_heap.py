"""Who has which part of the symmetric heap.

NVSHMEM's own allocation and release are collective over all PEs of the job: a Buffer of some ranks could not allocate,
and one that is destroyed while a peer is gone would wait for it for ever. So the heap is allocated in large blocks, by
all PEs together, and parts of them are given out here: at one offset on all ranks of a Buffer, which agree on it by
telling each other what they have given out. Release is local.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from epcomm.errors import InputError

__all__ = ["UNIT", "Part", "SymmetricHeap", "first_fit", "largest_gap"]

UNIT = 512  # bytes; parts start at a multiple of it, from the start of their block, and so do blocks


class Part(NamedTuple):
    """A part of a block: number of the block, offset in it, bytes. Equal parts of two PEs are symmetric memory."""

    block: int
    offset: int
    num_bytes: int


class SymmetricHeap:
    """The blocks of this PE, which are the same on all PEs but for their addresses, and what is given out here.

    Attributes:
        sizes: bytes of each block.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._bases: list[int] = []
        self._taken: dict[int, tuple[Part, frozenset[int]]] = {}  # by address, with the PEs that have it
        self._given_back: list[tuple[Part, frozenset[int]]] = []

    def taken_for(self, pes: Iterable[int]) -> list[Part]:
        """What these PEs, which are about to share a part, cannot have.

        That is what is given out here, and of what was given back here that which others had, too: they may still write
        to it. Of those who are asked each tells what it has itself.
        """
        asked = frozenset(pes)
        others = [part for part, owners in self._given_back if not owners <= asked]
        return [*(part for part, _ in self._taken.values()), *others]

    def add_block(self, base: int, num_bytes: int) -> None:
        """A new block at that address; on all PEs."""
        self._bases.append(base)
        self.sizes.append(num_bytes)

    def take(self, part: Part, pes: Iterable[int]) -> int:
        """Give out a part that these PEs can have, to all of them; its address."""
        address = self._bases[part.block] + part.offset
        self._taken[address] = part, frozenset(pes)
        self._given_back = [earlier for earlier in self._given_back if not _overlap(earlier[0], part)]
        return address

    def free(self, address: int) -> None:
        """Take back the part that starts there.

        Raises:
            InputError: none does.
        """
        part = self._taken.pop(address, None)
        if part is None:
            raise InputError("free", got=hex(address), wanted="an address that was allocated, and freed once")
        self._given_back.append(part)


def _overlap(one: Part, other: Part) -> bool:
    first, second = sorted((one, other))
    return first.block == second.block and second.offset < first.offset + first.num_bytes


def first_fit(sizes: Sequence[int], taken: Iterable[Part], num_bytes: int) -> Part | None:
    """The first part of `num_bytes` that is in nobody's `taken`, None: there is none.

    The same on all ranks that ask with the same blocks and the parts of all of them, in whatever order.
    """
    num_bytes = -(-num_bytes // UNIT) * UNIT
    return next((Part(block, gap, num_bytes) for block, gap, size in _gaps(sizes, taken) if size >= num_bytes), None)


def largest_gap(sizes: Sequence[int], taken: Iterable[Part]) -> int:
    """Bytes of the largest part that `first_fit` could find."""
    return max((size for _, _, size in _gaps(sizes, taken)), default=0)


def _gaps(sizes: Sequence[int], taken: Iterable[Part]) -> Iterable[tuple[int, int, int]]:
    """Block, offset and bytes of what nobody has, in order."""
    parts = sorted(taken)
    for block, size in enumerate(sizes):
        end = 0
        for part in parts:
            if part.block != block:
                continue
            if part.offset > end:
                yield block, end, part.offset - end
            end = max(end, part.offset + part.num_bytes)
        if size > end:
            yield block, end, size - end
