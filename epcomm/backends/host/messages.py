"""The way of ranks that share no memory: headers and packed rows through the communicator's alltoallv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from epcomm.backends.host.fields import Field, selections_of
from epcomm.backends.host.header import Header
from epcomm.bootstrap import Communicator
from epcomm.errors import PeerTimeout, RankMismatch
from epcomm.layout import HEADER_BYTES, MAX_FIELDS, MAX_SELECTS

__all__ = ["MessageTransport", "PackedRows"]

Bytes = NDArray[np.uint8]


class PackedRows:
    """What one source sent to this rank: its fields' rows, then its selections' indices, packed.

    Args:
        packed: the bytes.
        header: the source's header.
        counts: int64 ``[MAX_SELECTS]``, rows of each of its selections that are for this rank.
    """

    def __init__(self, packed: Bytes, header: Header, counts: NDArray[np.int64]) -> None:
        self._fields: list[Bytes] = []
        self._indices: list[NDArray[np.int32]] = []
        offset = 0
        for index in range(MAX_FIELDS):
            _, _, row_bytes, select = header.field(index)
            num_rows = int(counts[select]) if row_bytes else 0
            rows = packed[offset : offset + num_rows * row_bytes]
            self._fields.append(rows.reshape(num_rows, row_bytes))
            offset += rows.size
        for index in range(MAX_SELECTS):
            indexed, _ = header.select(index)
            num_bytes = 4 * int(counts[index]) if indexed else 0
            # Packed bytes start anywhere; a copy gives them the alignment of their type.
            self._indices.append(np.frombuffer(packed[offset : offset + num_bytes].tobytes(), np.int32))
            offset += num_bytes

    def field(self, index: int) -> Bytes:
        return self._fields[index]

    def indices(self, select: int) -> NDArray[np.int32]:
        return self._indices[select]


def packed_size(header: Header, counts: NDArray[np.int64]) -> int:
    """Bytes of `PackedRows` from a source with this header."""
    places = [header.field(index) for index in range(MAX_FIELDS)]
    rows = sum(row_bytes * int(counts[select]) for _, _, row_bytes, select in places)
    return rows + sum(4 * int(counts[index]) for index in range(MAX_SELECTS) if header.select(index)[0])


class MessageTransport:
    """Bounded alltoallv exchanges of one Buffer.

    Args:
        comm: the ranks.
        timeout_s: bound of every exchange, in seconds.
    """

    def __init__(self, comm: Communicator, timeout_s: float) -> None:
        self._comm, self._timeout_s = comm, timeout_s
        self.num_bytes = 0  # payload sent so far

    def headers(
        self, operation: str, cell: memoryview, routes: NDArray[np.int64]
    ) -> tuple[list[Header], list[NDArray[np.int64]]]:
        """Headers and routes of all ranks; `cell` and `routes` are those of this one, as in `Control.cell`."""
        size = self._comm.size
        own = np.frombuffer(cell.tobytes() + routes.tobytes(), np.uint8)
        everyone = np.empty(own.size * size, np.uint8)
        self._alltoallv(operation, "headers", np.tile(own, size), [own.size] * size, everyone, [own.size] * size)
        cells = everyone.reshape(size, own.size)
        headers = [Header.read(theirs.data) for theirs in cells]
        tables = [np.frombuffer(theirs[HEADER_BYTES:].tobytes(), np.int64).reshape(routes.shape) for theirs in cells]
        sequences = [h.sequence for h in headers]
        if len(set(sequences)) > 1:
            raise RankMismatch(f"{operation}: ranks receive different calls", {"call number": sequences})
        return headers, tables

    def rows(
        self,
        operation: str,
        fields: Sequence[Field],
        headers: Mapping[int, Header],
        routes: Mapping[int, NDArray[np.int64]],
        by_message: Sequence[bool],
    ) -> dict[int, PackedRows]:
        """Send every rank r with ``by_message[r]`` its rows; returns what those ranks sent."""
        rank, size = self._comm.rank, self._comm.size
        pieces: list[Bytes] = []
        send_counts = [0] * size
        for r in range(size):
            if by_message[r]:
                mine = [f.pack(r) for f in fields]
                for s in selections_of(fields):
                    if s.indices is not None:
                        mine.append(
                            np.ascontiguousarray(s.indices[s.begin[r] : s.begin[r] + s.counts[r]]).view(np.uint8)
                        )
                pieces += mine
                send_counts[r] = sum(piece.size for piece in mine)
        send = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
        recv_counts = [0] * size
        senders = [r for r in headers if by_message[r]]
        for r in senders:
            recv_counts[r] = packed_size(headers[r], routes[r][0, :, rank])
        received = np.empty(sum(recv_counts), np.uint8)
        self._alltoallv(operation, "rows", send, send_counts, received, recv_counts)
        self.num_bytes += send.size
        parts = np.split(received, np.cumsum(recv_counts)[:-1])
        return {r: PackedRows(parts[r], headers[r], routes[r][0, :, rank]) for r in senders}

    def _alltoallv(
        self, operation: str, phase: str, send: Bytes, send_counts: list[int], recv: Bytes, recv_counts: list[int]
    ) -> None:
        try:
            self._comm.alltoallv(send, send_counts, recv, recv_counts, self._timeout_s)
        except TimeoutError as error:
            others = [r for r in range(self._comm.size) if r != self._comm.rank]
            raise PeerTimeout(
                operation,
                phase=phase,
                waiting_rank=self._comm.rank,
                # A communicator of the user's own may not know which ranks are late.
                awaited_ranks=error.awaited_ranks if isinstance(error, PeerTimeout) else others,
                elapsed_s=self._timeout_s,
            ) from error
