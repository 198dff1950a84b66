"""The measured operations of one rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from epcomm.buffer import Buffer
from epcomm.cli.bench.case import DTYPES, Case
from epcomm.cli.bench.cuda import checks
from epcomm.cli.bench.cuda.data import make_bits
from epcomm.cli.bench.links import CaseLinks, LinkTraffic, RoutedRows, count_differences, crossings
from epcomm.cli.bits import as_bits, as_rows
from epcomm.config import Config
from epcomm.handle import DispatchResult, LayoutResult

__all__ = ["Calls", "Operation"]

_TOPK_BYTES = 8 + 4  # of a choice: expert index and weight


@dataclass(frozen=True)
class Operation:
    """One thing to measure. Bytes are those of all ranks together.

    Attributes:
        name: its row in the table.
        waits: the call blocks the host, so it cannot be queued behind others.
        logical_bytes: delivered, from a rank's own memory included.
        wire_bytes: those of them from other ranks.
        floor_bytes: what the least that does the work reads and writes, see `Calls.operations`.
        links: what it moves between ranks; None: nothing.
    """

    name: str
    waits: bool
    logical_bytes: int
    wire_bytes: int
    floor_bytes: int
    links: LinkTraffic | None = None


class Calls:
    """The calls, and what they need: arrays on the GPU, handles.

    Args:
        xp: cupy (numpy in tests).
        buffer: with room in its arena.
        outside: without an arena: all that it moves goes through windows.
        case: the sizes.
        routing: of all ranks.
    """

    def __init__(self, xp: Any, buffer: Buffer, outside: Buffer, case: Case, routing: checks.Routing) -> None:
        self._xp, self._buffer, self._outside, self._case, self._routing = xp, buffer, outside, case, routing
        self._rank = buffer.rank
        self.links = CaseLinks(case, RoutedRows(routing.is_token_in_rank, case.ranks_per_node or case.ranks))
        self._download: Callable[[Any], Any] = getattr(xp, "asnumpy", np.asarray)
        self._topk_idx = xp.asarray(routing.topk_idx[self._rank])
        self._topk_weights = xp.asarray(routing.topk_weights[self._rank])
        self._seed = 0
        self._payload: Any = None
        self.config: Config | None = None
        self._layout = self.layout()
        self._renew()
        self._handle = self.dispatch(buffer).handle
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no room in the arena")  # that is what it is for
            self._outside_handle = self.dispatch(outside).handle
        bits = checks.output_bits(xp, case, routing, self._rank)
        self._y = as_rows(bits, case.combine_dtype)
        self._y_in_arena = buffer.get_combine_buffer(self._handle, case.combine_dtype)
        as_bits(self._y_in_arena)[...] = bits

    def _renew(self) -> None:
        """New rows, so that what an earlier call left in memory cannot pass for a result."""
        xp, case = self._xp, self._case
        self._seed += 1
        tokens = xp.arange(self._rank * case.tokens, (self._rank + 1) * case.tokens)
        dtype = DTYPES[case.dtype]
        x = as_rows(make_bits(xp, tokens, case.hidden, dtype, self._seed), dtype)
        if case.dtype == "fp8":
            scales = checks.scales_bits(xp, case, tokens, self._seed)
            self._payload = (x, as_rows(scales, np.dtype(np.float32)))
        else:
            self._payload = x

    # -- calls ----------------------------------------------------------------------------------------------------

    def layout(self) -> LayoutResult:
        return self._buffer.get_dispatch_layout(self._topk_idx, self._case.experts)

    def dispatch(self, buffer: Buffer) -> DispatchResult:
        """Counts, CPU wait, expert indices and weights."""
        return buffer.dispatch(
            self._payload,
            topk_idx=self._topk_idx,
            topk_weights=self._topk_weights,
            config=self.config,
            **self._layout.arguments(),
        )

    def cached_dispatch(self) -> DispatchResult:
        return self._buffer.dispatch(self._payload, handle=self._handle, config=self.config)

    def dispatch_outside(self) -> DispatchResult:
        return self.dispatch(self._outside)

    def cached_dispatch_outside(self) -> DispatchResult:
        return self._outside.dispatch(self._payload, handle=self._outside_handle, config=self.config)

    def combine_in_arena(self) -> Any:
        return self._buffer.combine(self._y_in_arena, self._handle, config=self.config).combined_x

    def combine(self) -> Any:
        """Of an ordinary array, which is copied into the arena first."""
        return self._buffer.combine(self._y, self._handle, config=self.config).combined_x

    def combine_by_window(self) -> Any:
        return self._outside.combine(self._y, self._outside_handle, config=self.config).combined_x

    # -- checks ---------------------------------------------------------------------------------------------------

    def differences(self) -> list[str]:
        """Make every call once and compare all of its result. Collective, blocks the host."""
        case, routing, rank = self._case, self._routing, self._rank
        found = [
            f"get_dispatch_layout: {text}" for text in checks.check_layout(self._download, routing, rank, self.layout())
        ]
        dispatches: list[tuple[str, Buffer, Callable[[], DispatchResult]]] = [
            ("dispatch", self._buffer, lambda: self.dispatch(self._buffer)),
            ("dispatch, cached", self._buffer, self.cached_dispatch),
            ("dispatch, outside", self._outside, self.dispatch_outside),
            ("dispatch, cached, outside", self._outside, self.cached_dispatch_outside),
        ]
        combines = [
            ("combine, in the arena", self._buffer, self.combine_in_arena),
            ("combine", self._buffer, self.combine),
            ("combine, by window", self._outside, self.combine_by_window),
        ]
        for name, buffer, call in dispatches:
            self._renew()
            before = crossings(buffer)
            texts = checks.check_dispatch(self._xp, self._download, case, routing, rank, self._seed, call())
            found += [f"{name}: {text}" for text in (*texts, *self._count_differences(name, buffer, before))]
        for name, buffer, combine in combines:
            before = crossings(buffer)
            texts = checks.check_combine(self._xp, case, routing, rank, combine())
            found += [f"{name}: {text}" for text in (*texts, *self._count_differences(name, buffer, before))]
        return found

    def _count_differences(self, name: str, buffer: Buffer, before: tuple[int, int]) -> Iterator[str]:
        """What is wrong with the rows between nodes that the kernels of the call since `before` have counted."""
        self._download(self._topk_idx[:1])  # behind the call in its stream: what it has counted is there
        return count_differences(name, before, crossings(buffer), self.links.crossing.by_rank[self._rank])

    # -- what to measure ------------------------------------------------------------------------------------------

    def operations(self) -> Iterator[tuple[Operation, Callable[[], object]]]:
        """What to measure in the order of the table, and the call, which runs in the current stream.

        The floor of an operation whose results lie in the arena is to read the source rows once and to write the
        received rows once (combine: the other way round). Outside of it every received row is also written to memory
        that peers address, and read from there. A row that crosses to another node is also written to a ring, and read.
        """
        case, rows = self._case, self._routing.rows
        num_tokens, num_rows, num_own = case.tokens * case.ranks, int(rows.sum()), int(rows.trace())
        row = case.hidden * DTYPES[case.dtype].itemsize + (case.scale_bytes if case.dtype == "fp8" else 0)
        back = case.hidden * case.combine_dtype.itemsize
        whole = row + case.topk * _TOPK_BYTES
        far = sum(self.links.crossing.by_rank)

        def operation(name: str, moved: int, passes: int, floor_row: int, links: LinkTraffic) -> Operation:
            floor = (num_tokens + passes * num_rows + 2 * far) * floor_row
            waits = links is there  # for counts: there is no handle
            return Operation(name, waits, num_rows * moved, (num_rows - num_own) * moved, floor, links)

        there, cached, here = self.links.dispatch(), self.links.dispatch(has_handle=True), self.links.combine()
        yield Operation("get_dispatch_layout", False, 0, 0, 0), self.layout
        yield operation("dispatch", whole, 1, row, there), lambda: self.dispatch(self._buffer)
        yield operation("dispatch, cached", row, 1, row, cached), self.cached_dispatch
        yield operation("dispatch, outside", whole, 3, row, there), self.dispatch_outside
        yield operation("dispatch, cached, outside", row, 3, row, cached), self.cached_dispatch_outside
        yield operation("combine, in the arena", back, 1, back, here), self.combine_in_arena
        yield operation("combine", back, 3, back, here), self.combine
        yield operation("combine, by window", back, 3, back, here), self.combine_by_window
