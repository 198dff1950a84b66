"""Argument structs: host memory that a launch hands to the kernel by value.

Every kernel takes one struct, whose sizes a static_assert in its source compares. Most start with ``Comm``, which is
the same for all calls of a Buffer and is written once; a call writes the rest with one `struct.Struct`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

from epcomm.kernels.layout import MAX_RANKS

__all__ = ["COMM", "Arguments", "comm_bytes", "divisor"]

COMM = struct.Struct(f"<{MAX_RANKS}Q{MAX_RANKS}Q{MAX_RANKS}H3Q2i")
assert COMM.size == 608


def comm_bytes(
    regions: Sequence[int],
    control: Sequence[int],
    pes: Sequence[int],
    host_page: int,
    region_bytes: int,
    timeout_ns: int,
    rank: int,
) -> bytes:
    """The ``Comm`` of a rank.

    Args:
        regions: address of every rank's region in this process, 0: there is none.
        control: likewise, of its words and messages.
        pes: every rank's number in NVSHMEM, empty without it.
        host_page: address of the host's page.
        region_bytes: of a region.
        timeout_ns: bound of the waits.
        rank: this rank.
    """
    by_rank = [value for values in (regions, control, pes) for value in [*values, *[0] * (MAX_RANKS - len(values))]]
    return COMM.pack(*by_rank, host_page, region_bytes, timeout_ns, rank, len(regions))


@functools.lru_cache(maxsize=256)
def divisor(value: int) -> tuple[int, int]:
    """``Divisor`` of ``common/types.cuh``: n // value is ``n * multiplier >> shift`` for n < 2^31.

    With 2^k the smallest power of two that is not below `value`, the multiplier is ``floor(2^(31 + k) / value) + 1``:
    too large by at most 1, which n < 2^31 do not notice.
    """
    shift = 31 + (value - 1).bit_length()
    return (1 << shift) // value + 1, shift


class Arguments:
    """One argument struct in host memory, filled again for each launch. One thread at a time.

    Args:
        fixed: the bytes at its start that never change.
        fields: the rest.
    """

    __slots__ = ("_memory", "_pack", "_start", "address")

    def __init__(self, fixed: bytes, fields: struct.Struct) -> None:
        self._memory = bytearray(fixed + bytes(fields.size))
        self._pack, self._start = fields.pack_into, len(fixed)
        self.address = ctypes.addressof((ctypes.c_char * len(self._memory)).from_buffer(self._memory))

    def fill(self, fields: Sequence[int]) -> int:
        """Write all fields, in their order; the address for the launch."""
        self._pack(self._memory, self._start, *fields)
        return self.address
