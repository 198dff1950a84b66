"""The receive side of an exchange: rows that the peers selected for this rank."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from epcomm.backends.host.fields import as_bytes
from epcomm.backends.host.header import Header, check_headers
from epcomm.backends.host.messages import PackedRows
from epcomm.errors import BootstrapError, BufferStateError, EpcommError, PeerTimeout

if TYPE_CHECKING:
    from epcomm.backends.host.exchange import Exchange, Ticket

__all__ = ["Delivery"]

Bytes = NDArray[np.uint8]
_OUT_OF_STEP = (PeerTimeout, BufferStateError, BootstrapError, KeyboardInterrupt)
_NOTHING = np.empty(0, np.int32)


class Delivery:
    """Posts of all ranks of one call, readable inside a ``with`` block.

    Entering compares the headers; leaving releases the peers' windows.

    Attributes:
        headers: by rank; masked ranks are missing.
        routes: by rank, int64 ``[2, MAX_SELECTS, num_ranks]``: for each selection how many rows go to each rank, and
            the first of them.
        waited_s: float64 ``[num_ranks]``, seconds until each rank's post was seen.

    Raises:
        PeerError, RankMismatch: see `header.check_headers`; on entering.
    """

    def __init__(
        self,
        exchange: Exchange,
        ticket: Ticket,
        headers: Mapping[int, Header],
        routes: Mapping[int, NDArray[np.int64]],
        waited_s: NDArray[np.float64],
    ) -> None:
        self._exchange, self._ticket = exchange, ticket
        self.headers, self.routes, self.waited_s = headers, routes, waited_s
        self._rank = exchange.comm.rank
        # Counts and first rows for this rank, as Python numbers: they are asked for again and again.
        self._own_routes = {source: table[:, :, self._rank].tolist() for source, table in routes.items()}
        self._windows: dict[int, Bytes] = {}
        self._packed: dict[int, PackedRows] = {}
        self._indices: dict[tuple[int, int], NDArray[np.int32]] = {}

    def __enter__(self) -> Delivery:
        try:
            self._map_new_windows()
            check_headers(self._ticket.operation, self._rank, self.headers)
            if not any(header.rejection for header in self.headers.values()):
                self._receive()
        except EpcommError as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a timeout or an interrupt the ranks are out of step: releasing anything would be a lie.
        if error is None or not isinstance(error, _OUT_OF_STEP):
            self._exchange.finish(self._ticket, self.headers)

    def _receive(self) -> None:
        exchange = self._exchange
        all_by_message = any(header.messages for header in self.headers.values())
        by_message = [all_by_message or rank not in exchange.shared for rank in range(exchange.comm.size)]
        for rank, header in self.headers.items():
            if not by_message[rank] and header.window_bytes:
                self._windows[rank] = self._map(rank, header)
        if any(by_message):
            self._packed = exchange.messages.rows(
                self._ticket.operation.label, self._ticket.fields, self.headers, self.routes, by_message
            )

    def _map_new_windows(self) -> None:
        """Map what grew, also in a call that is about to fail: the names go at its end."""
        for rank in self._exchange.shared:
            if rank in self.headers and self.headers[rank].grew:
                self._map(rank, self.headers[rank])

    def _map(self, rank: int, header: Header) -> Bytes:
        windows = self._exchange.peer_windows
        assert windows is not None
        try:
            return windows.get(rank, header.window, header.window_name, header.window_bytes)
        except OSError as error:
            control = self._exchange.control
            gave_up = control is not None and control.gave_up(rank)
            is_missing = isinstance(error, FileNotFoundError) and not gave_up
            if is_missing and self._exchange.can_leave_behind(self._ticket.ring):
                raise self._exchange.left_behind(self._ticket, [rank]) from error  # who finished took its name away
            raise PeerTimeout(
                self._ticket.operation.label,
                phase="map",
                waiting_rank=self._rank,
                awaited_ranks=[rank],
                elapsed_s=0.0,
                reason="no window, because it gave up," if gave_up else f"no window to map ({error})",
            ) from error

    def count(self, source: int, select: int = 0) -> int:
        """Number of rows that `source` selected for this rank."""
        return int(self._own_routes[source][0][select]) if source in self._own_routes else 0

    def indices(self, source: int, select: int = 0) -> NDArray[np.int32]:
        """Row numbers, at the source, of the rows that it selected by index for this rank."""
        if source in self._packed:
            return self._packed[source].indices(select)
        key = (source, select)
        if key not in self._indices:
            indices, count = _NOTHING, self.count(source, select)
            if count:
                _, offset = self.headers[source].select(select)
                start = offset + 4 * self._begin(source, select)
                indices = self._windows[source][start : start + 4 * count].view(np.int32)
            self._indices[key] = indices
        return self._indices[key]

    def _begin(self, source: int, select: int) -> int:
        """First of the selection's rows, or of its indices, that are for this rank."""
        return int(self._own_routes[source][1][select])

    def rows(self, source: int, field: int, span: slice = slice(None), out: Bytes | None = None) -> Bytes:
        """Rows `span` of those that `source` selected for this rank, as bytes ``[num_rows, row_bytes]``.

        Without `out` the result may be a view of the source's window: copy what must outlive the block.

        Args:
            out: uint8 ``[num_rows, row_bytes]``, contiguous; the rows are written there.
        """
        if source in self._packed:
            rows = self._packed[source].field(field)[span]
        else:
            offset, num_rows, row_bytes, select = self.headers[source].field(field)
            count = self.count(source, select)
            if count == 0:
                rows = np.empty((0, row_bytes), np.uint8)
            else:
                if source == self._rank and self._ticket.fields[field].own_rows_stay:
                    rows = as_bytes(self._ticket.fields[field].rows)
                else:
                    rows = self._windows[source][offset : offset + num_rows * row_bytes].reshape(num_rows, row_bytes)
                if self.headers[source].select(select)[0]:
                    # mode="clip" lets take write straight into `out`; the indices are in range.
                    return rows.take(self.indices(source, select)[span], axis=0, out=out, mode="clip")
                begin = self._begin(source, select)
                rows = rows[begin : begin + count][span]
        if out is None:
            return rows
        np.copyto(out, rows)
        return out
