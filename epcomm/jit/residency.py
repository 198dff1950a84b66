"""Whether all kernels that wait for each other can be on the GPU at once; if not, they would wait for ever.

Kernels of epcomm wait for kernels of other ranks. When ranks share a GPU, a block that finds no room starts only after
another block has ended, and that one may be waiting for it. So the room is checked for all ranks of a GPU together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epcomm.errors import CapacityError

__all__ = ["Footprint", "Launch", "plan_residency"]


@dataclass(frozen=True)
class Launch:
    """An operation that may wait for peers.

    Attributes:
        blocks: blocks of its grid.
        blocks_per_sm: how many of them fit one SM, from `Kernel.blocks_per_sm`; at least 1.
    """

    blocks: int
    blocks_per_sm: int


@dataclass(frozen=True)
class Footprint:
    """What one rank may have waiting at one time.

    Attributes:
        device_uuid: of its GPU; equal exactly for ranks that share one.
        num_sms: SMs that this process may use; an MPS partition is smaller than the GPU.
        launches: operations that may wait at the same time.
    """

    device_uuid: str
    num_sms: int
    launches: tuple[Launch, ...]


def plan_residency(footprints: Sequence[Footprint]) -> None:
    """Check all GPUs; given the same footprints, all ranks raise alike.

    A block of a kind of which ``k`` fit an SM uses at most a k-th of each of its resources. So an SM with fewer than
    ``min k`` blocks, whichever and of whichever process, has room for one more of any kind, and ``min k`` blocks an SM
    always fit, wherever the hardware puts them. Partitions of MPS may overlap, so ranks that share a GPU share the SMs
    of the smallest one.

    Args:
        footprints: those of all ranks, in rank order.

    Raises:
        CapacityError: some GPU has no room; says how many SMs a rank may use there.
    """
    for uuid in dict.fromkeys(footprint.device_uuid for footprint in footprints):
        ranks = [rank for rank, footprint in enumerate(footprints) if footprint.device_uuid == uuid]
        launches = [launch for rank in ranks for launch in footprints[rank].launches]
        if not launches:
            continue
        sms = min(footprints[rank].num_sms for rank in ranks)
        blocks_per_sm = min(launch.blocks_per_sm for launch in launches)
        room, blocks = sms * blocks_per_sm, sum(launch.blocks for launch in launches)
        if blocks > room:
            fitting = room // len(launches)
            raise CapacityError(
                f"the GPU {uuid} of {_names(ranks)}",
                got=f"{blocks} blocks of {len(launches)} operations that may wait for each other",
                wanted=f"at most {room}, {blocks_per_sm} on each of {sms} SMs, or they would wait for ever",
                do=f"set_num_sms({fitting}) or less on these ranks" if fitting else "put fewer ranks on a GPU",
            )


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
