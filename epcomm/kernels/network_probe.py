"""``cuda_src/kernels/network_probe.cu``: messages around a ring of ranks by NVSHMEM, checked and timed."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epcomm.jit import Program

__all__ = [
    "CELLS_BYTES",
    "ENTRY",
    "ERRORS",
    "FIELDS",
    "PROGRAM",
    "REPORT",
    "THREADS",
    "Report",
    "heap_bytes",
    "pattern",
]

PROGRAM = Program("kernels/network_probe.cu", nvshmem=True)
ENTRY = "epcomm_network_probe"
THREADS = 256
CELLS_BYTES = 128

# receive, send, cells, report, elapsed_ns; area_bytes, num_bytes, timeout_ns, first;
# num_rounds, rank, previous_rank, next_pe, previous_pe, by_block
FIELDS = struct.Struct("<5Q4QI4iI")
assert FIELDS.size == 96

REPORT = struct.Struct("<3Ii")  # error, num_done, num_wrong, awaited_pe

# By the number in the report.
ERRORS = (
    "",
    "the message of the previous rank did not come",
    "the next rank did not answer",
    "a word that was sent before the answer was not there with it",
)


class Report(NamedTuple):
    """What a rank saw: index into `ERRORS`, rounds done, words that arrived wrong, the PE that it waited for or -1."""

    error: int
    num_done: int
    num_wrong: int
    awaited_pe: int

    @classmethod
    def read(cls, data: bytes) -> Report:
        """From the bytes of the struct."""
        return cls(*REPORT.unpack(data))


def heap_bytes(num_bytes: int) -> int:
    """Bytes of the symmetric heap for messages of `num_bytes`, a multiple of 16: cells, two areas, what is sent."""
    return CELLS_BYTES + 3 * num_bytes


def pattern(num_bytes: int, number: int, rank: int) -> NDArray[np.uint64]:
    """The message that a rank sends in that round."""
    index = np.arange(1, num_bytes // 8 + 1, dtype=np.uint64)
    return index * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(number << 16 | rank)
