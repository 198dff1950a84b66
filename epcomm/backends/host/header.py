"""What ranks tell each other at the start of a call, and the comparison of it.

Every call of the host backend carries a header, so a rank that rejects its input, or that disagrees with the
others, makes all ranks raise in that same call and leaves every Buffer usable.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

from epcomm.backends.agreement import (
    CACHED_DISPATCH,
    COMBINE,
    DISPATCH,
    LOW_LATENCY_COMBINE,
    LOW_LATENCY_DISPATCH,
    show,
)
from epcomm.errors import PeerError, RankMismatch
from epcomm.layout import (
    HEADER_NUMBERS,
    HEADER_TEXTS,
    MAX_AGREED,
    MAX_FIELDS,
    MAX_NAME,
    MAX_SELECTS,
    MAX_TEXT,
)

__all__ = ["AGREED", "Header", "Operation", "agreed_values", "check_headers"]


class Operation(IntEnum):
    """Calls that ranks must make together; `label` is the method's name."""

    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    FORWARD_DISPATCH = 4
    FORWARD_COMBINE = 5
    LOW_LATENCY_DISPATCH = 6
    LOW_LATENCY_COMBINE = 7
    CLEAN_MASKS = 8
    BARRIER = 9

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {
    Operation.DISPATCH: "dispatch",
    Operation.CACHED_DISPATCH: "dispatch(handle=...)",
    Operation.COMBINE: "combine",
    Operation.FORWARD_DISPATCH: "dispatch, second hop",
    Operation.FORWARD_COMBINE: "combine, second hop",
    Operation.LOW_LATENCY_DISPATCH: "low_latency_dispatch",
    Operation.LOW_LATENCY_COMBINE: "low_latency_combine",
    Operation.CLEAN_MASKS: "low_latency_clean_mask_buffer",
    Operation.BARRIER: "barrier",
}

# Names of the values that must agree, by operation, in the order of `Header.agreed`.
AGREED: dict[Operation, tuple[str, ...]] = {
    Operation.DISPATCH: DISPATCH,
    Operation.CACHED_DISPATCH: CACHED_DISPATCH,
    Operation.COMBINE: COMBINE,
    Operation.FORWARD_DISPATCH: (),
    Operation.FORWARD_COMBINE: (),
    Operation.LOW_LATENCY_DISPATCH: LOW_LATENCY_DISPATCH,
    Operation.LOW_LATENCY_COMBINE: LOW_LATENCY_COMBINE,
    Operation.CLEAN_MASKS: (),
    Operation.BARRIER: (),
}


_NO_NUMBERS = (0,) * max(MAX_AGREED, 4 * MAX_FIELDS)
_NAME, _TEXT = HEADER_TEXTS


class Header(NamedTuple):
    """What a rank says about its part of a call.

    Attributes:
        sequence: number of the call in its ring.
        operation: an `Operation`.
        messages: 1 when the payload does not fit into shared memory and has to travel by messages.
        grew: 1 when peers have not mapped the window yet.
        window, window_bytes, window_name: where the payload lies; 0 and empty when there is none.
        agreed: values that must be equal on all ranks, see `agreed_values`.
        fields: four numbers for each field: offset in the window, rows, bytes of a row, its selection.
        selects: two numbers for each selection: whether it has indices, and their offset in the window.
        rejection: why the rank rejects its own input; empty when it does not.
    """

    sequence: int
    operation: int
    messages: int
    grew: int
    window: int
    window_bytes: int
    agreed: tuple[int, ...]
    fields: tuple[int, ...]
    selects: tuple[int, ...]
    window_name: str
    rejection: str

    def field(self, index: int) -> tuple[int, ...]:
        """Offset, rows, bytes of a row and selection of a field; zeros past the last one."""
        return self.fields[4 * index : 4 * index + 4]

    def select(self, index: int) -> tuple[int, ...]:
        """Whether a selection has indices, and their offset; zeros past the last one."""
        return self.selects[2 * index : 2 * index + 2]

    def write(self, cell: memoryview) -> None:
        """Write into a header cell, `layout.HEADER_BYTES` long."""
        name = self.window_name.encode()
        text = self.rejection.encode(errors="replace")[:MAX_TEXT]
        assert len(name) <= MAX_NAME
        numbers = [*self[:6], len(name), len(text)]
        for values, width in (
            (self.agreed, MAX_AGREED),
            (self.fields, 4 * MAX_FIELDS),
            (self.selects, 2 * MAX_SELECTS),
        ):
            assert len(values) <= width
            numbers += values
            numbers += _NO_NUMBERS[: width - len(values)]
        HEADER_NUMBERS.pack_into(cell, 0, *numbers)
        cell[_NAME : _NAME + len(name)] = name
        cell[_TEXT : _TEXT + len(text)] = text

    @classmethod
    def read(cls, cell: memoryview) -> Header:
        """The content of a header cell."""
        numbers = HEADER_NUMBERS.unpack_from(cell)
        sequence, operation, messages, grew, window, window_bytes, name, text = numbers[:8]
        fields, selects = 8 + MAX_AGREED, 8 + MAX_AGREED + 4 * MAX_FIELDS
        return cls(
            sequence,
            operation,
            messages,
            grew,
            window,
            window_bytes,
            numbers[8:fields],
            numbers[fields:selects],
            numbers[selects:],
            # A text may be cut in the middle of a character.
            bytes(cell[_NAME : _NAME + name]).decode(errors="ignore"),
            bytes(cell[_TEXT : _TEXT + text]).decode(errors="ignore"),
        )


def agreed_values(operation: Operation, agreed: Mapping[str, int]) -> tuple[int, ...]:
    """The values that `AGREED` names for an operation, in that order."""
    return tuple([int(agreed[name]) for name in AGREED[operation]])


def _by_rank(values: Mapping[int, str]) -> list[str]:
    """A column of `RankMismatch.table`; masked ranks are not in `values`."""
    return [values.get(rank, "masked") for rank in range(max(values) + 1)]


def check_headers(operation: Operation, rank: int, headers: Mapping[int, Header]) -> None:
    """Compare the headers of the ranks of a call.

    Raises:
        PeerError: another rank rejected its input. A rank that rejected its own raises that error itself.
        RankMismatch: the ranks made different calls, or calls with different values.
    """
    if len({h.operation for h in headers.values()}) > 1:
        calls = {r: Operation(h.operation).label for r, h in headers.items()}
        raise RankMismatch("ranks made different calls", {"call": _by_rank(calls)})
    rejected = {r: h.rejection for r, h in headers.items() if h.rejection}
    if rejected:
        if rank in rejected:
            return  # its caller raises the original exception
        raise PeerError(operation.label, rejected)
    if len({h.agreed for h in headers.values()}) <= 1:
        return
    table = {}
    for index, name in enumerate(AGREED[operation]):
        values = {r: h.agreed[index] for r, h in headers.items()}
        if len(set(values.values())) > 1:
            table[name] = _by_rank({r: show(name, value) for r, value in values.items()})
    raise RankMismatch(f"{operation.label}: ranks disagree", table)
