"""The low-latency mode of the bench on GPUs: calls, and what every rank must have got."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.buffer import Buffer
from epcomm.cli.bench.case import Case, make_inputs, make_routing, marks_of
from epcomm.cli.bench.links import LinkTraffic, direct
from epcomm.cli.bits import as_bits, as_rows
from epcomm.handle import LowLatencyDispatchResult
from epcomm.numerics import BFLOAT16, FP8_BLOCK, LOGFMT_BLOCK, accumulate_weighted, cast_fp8, logfmt_row_bytes, round_to
from epcomm.reference import logfmt_bound
from epcomm.testing import token_data

__all__ = ["Expected", "LowLatencyCalls", "LowLatencyOperation"]

_NUM_OUTPUTS = 61  # different rows that the experts of a rank put out
_OUTPUT_SEED = 1000  # plus the rank

# How the rows of a combine travel: options of low_latency_combine.
Way = dict[str, bool]
_OUTSIDE: Way = {}
_IN_PLACE, _LOGFMT, _PRE_REDUCED = {"zero_copy": True}, {"use_logfmt": True}, {"pre_reduce": True}


@dataclass(frozen=True)
class LowLatencyOperation:
    """One thing to measure.

    Attributes:
        name: its row in the table.
        run: the call.
        send: its send half, which returns the receive half; None for what has no halves.
        links: what it moves between ranks.
        num_calls: of the Buffer, that `run` makes.
    """

    name: str
    run: Callable[[], object]
    send: Callable[[], Callable[[], None]] | None
    links: LinkTraffic
    num_calls: int = 1


class Expected:
    """What must arrive, from the routing and the rows of all ranks, which any rank can make.

    Args:
        case: the sizes.
        rank: whose results these are.
    """

    def __init__(self, case: Case, rank: int) -> None:
        self._case, self._rank = case, rank
        self._routing = [make_routing(case, source) for source in range(case.ranks)]
        self.x = [make_inputs(case, source).x.view(BFLOAT16) for source in range(case.ranks)]
        self.num_local = case.experts // case.ranks

    def tokens_of(self, expert: int) -> list[tuple[int, int]]:
        """(source, token) of each row of an expert, numbered among those of all ranks."""
        return [
            (source, token)
            for source, (topk_idx, _) in enumerate(self._routing)
            for token in np.flatnonzero((topk_idx == expert).any(axis=1)).tolist()
        ]

    def differences(self, got: LowLatencyDispatchResult, use_fp8: bool, down: Callable[[Any], Any]) -> list[str]:
        """What is wrong with a dispatch; `down` copies bits to the host."""
        count, src_info = down(got.recv_count), down(got.handle[0])
        rows, scales = got.recv_x if use_fp8 else (got.recv_x, got.recv_x)
        for local in range(self.num_local):
            places = self.tokens_of(self._rank * self.num_local + local)
            if count[local] != len(places):
                return [f"expert {local} has {count[local]} rows instead of {len(places)}"]
            if src_info[local, : len(places)].tolist() != [token for _, token in places]:
                return [f"rows of expert {local} are of other tokens"]
            if not places:
                continue
            want = np.stack([self.x[source][token] for source, token in places])
            if use_fp8:
                want, want_scales = cast_fp8(want)
                if not np.array_equal(down(scales[local, : len(places)]), want_scales):
                    return [f"scales of expert {local} differ"]
            if not np.array_equal(down(as_bits(rows)[local, : len(places)]), as_bits(want)):
                return [f"rows of expert {local} differ"]
        return []

    def outputs(self, rank: int) -> NDArray[Any]:
        """The different rows that the experts of `rank` put out; `output_of` says which is where."""
        return token_data(_NUM_OUTPUTS, self._case.hidden, BFLOAT16, seed=_OUTPUT_SEED + rank)

    @staticmethod
    def output_of(expert: Any, row: Any) -> Any:
        return (7 * expert + row) % _NUM_OUTPUTS

    def combined(self, way: Way) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """The sums of this rank's tokens, and how far they may be off; None: not at all."""
        topk_idx, weights = self._routing[self._rank]
        rows = self._rows_of_choices()
        out = np.empty((len(topk_idx), self._case.hidden), BFLOAT16)
        sums, bound = np.zeros(out.shape, np.float32), np.zeros(out.shape)
        if way == _PRE_REDUCED:
            for owner in range(self._case.ranks):
                part = np.zeros_like(sums)
                for choice in range(topk_idx.shape[1]):
                    chosen = topk_idx[:, choice] // self.num_local == owner
                    accumulate_weighted(part, np.where(chosen, weights[:, choice], 0), rows[choice])
                round_to(part, out)
                sums += out.astype(np.float32)
        else:
            for choice in range(topk_idx.shape[1]):
                accumulate_weighted(sums, weights[:, choice], rows[choice])
                if way == _LOGFMT:
                    bound += np.abs(weights[:, choice, None]) * logfmt_bound(rows[choice])
        round_to(sums, out)
        return out, bound + np.abs(sums) / 128 if way == _LOGFMT else None

    def _rows_of_choices(self) -> list[NDArray[Any]]:
        """By choice: the row that the expert of each of this rank's tokens puts out."""
        topk_idx, _ = self._routing[self._rank]
        numbers = {}
        for expert in np.unique(topk_idx).tolist():
            for row, (source, token) in enumerate(self.tokens_of(expert)):
                if source == self._rank:
                    numbers[expert, token] = self.output_of(expert % self.num_local, row)
        outputs = [self.outputs(rank) for rank in range(self._case.ranks)]
        return [
            np.stack([outputs[e // self.num_local][numbers[e, token]] for token, e in enumerate(experts)])
            for experts in topk_idx.T.tolist()
        ]


class LowLatencyCalls:
    """The calls of one rank, and what they need on the GPU.

    Args:
        cupy: the module.
        buffer: of low-latency mode.
        case: the sizes.
    """

    def __init__(self, cupy: Any, buffer: Buffer, case: Case) -> None:
        self._cupy, self._buffer, self._case = cupy, buffer, case
        self.expected = expected = Expected(case, buffer.rank)
        topk_idx, weights = make_routing(case, buffer.rank)
        self._x = as_rows(cupy.asarray(as_bits(expected.x[buffer.rank])), BFLOAT16)
        self._topk_idx, self._weights = cupy.asarray(topk_idx), cupy.asarray(weights)
        expert, row = np.ogrid[: expected.num_local, : case.ranks * case.tokens]
        y_bits = cupy.asarray(as_bits(expected.outputs(buffer.rank))[expected.output_of(expert, row)])
        self._y = as_rows(y_bits, BFLOAT16)
        self.handle = self.dispatch(False).handle
        for _ in range(2):  # both buffers; what is in them stays there
            as_bits(buffer.get_next_low_latency_combine_buffer(self.handle))[...] = y_bits
            self.combine(self.handle, _IN_PLACE, is_renewed=False)

    def dispatch(self, use_fp8: bool, is_split: bool = False) -> LowLatencyDispatchResult:
        case = self._case
        return self._buffer.low_latency_dispatch(
            self._x, self._topk_idx, case.tokens, case.experts, use_fp8=use_fp8, return_recv_hook=is_split
        )

    def combine(self, handle: Any, way: Way, is_split: bool = False, is_renewed: bool = True) -> Any:
        if way == _IN_PLACE and is_renewed:
            self._buffer.get_next_low_latency_combine_buffer(handle)
        return self._buffer.low_latency_combine(
            self._y, self._topk_idx, self._weights, handle, return_recv_hook=is_split, **way
        )

    def differences(self) -> list[str]:
        """What is wrong with one result of each kind."""
        found = []
        down = self._cupy.asnumpy
        for use_fp8 in self._formats():
            name = "fp8" if use_fp8 else "bf16"
            wrong = self.expected.differences(self.dispatch(use_fp8), use_fp8, down)
            found += [f"dispatch, {name}: {text}" for text in wrong]
        for name, way in self._ways().items():
            want, bound = self.expected.combined(way)
            got = down(as_bits(self.combine(self.handle, way).combined_x))
            if bound is not None:
                distance = np.abs(got.view(BFLOAT16).astype(np.float64) - want.astype(np.float64))
                is_right = bool((distance <= bound).all())
            else:
                is_right = np.array_equal(got, as_bits(want))
            if not is_right:
                found.append(f"combine, {name}: sums differ")
        return found

    def operations(self) -> Iterator[LowLatencyOperation]:
        """In the order of the table."""
        there, here = self._dispatch_links(), self._combine_links()
        for use_fp8 in self._formats():
            yield LowLatencyOperation(
                f"dispatch, {'fp8' if use_fp8 else 'bf16'}",
                lambda use_fp8=use_fp8: self.dispatch(use_fp8),  # type: ignore[misc]
                lambda use_fp8=use_fp8: self.dispatch(use_fp8, is_split=True).hook,  # type: ignore[misc]
                there[use_fp8],
            )
        for name, way in self._ways().items():
            yield LowLatencyOperation(
                f"combine, {name}",
                lambda way=way: self.combine(self.handle, way),  # type: ignore[misc]
                lambda way=way: self.combine(self.handle, way, is_split=True).hook,  # type: ignore[misc]
                here[name],
                num_calls=1 + (way == _IN_PLACE),
            )
        for use_fp8 in self._formats():
            for name, way in {"outside": _OUTSIDE, "in place": _IN_PLACE}.items():
                yield LowLatencyOperation(
                    f"pair, {'fp8' if use_fp8 else 'bf16'}, {name}",
                    lambda use_fp8=use_fp8, way=way: self.combine(self.dispatch(use_fp8).handle, way),  # type: ignore[misc]
                    None,
                    there[use_fp8] + here[name],
                    num_calls=2 + (way == _IN_PLACE),
                )

    def _dispatch_links(self) -> dict[bool, LinkTraffic]:
        """Of bf16 and fp8: a row for each token and rank."""
        hidden, scale_bytes, messages = self._case.hidden, self._case.scale_bytes, self._rows()[0]
        return {False: self._direct(messages, 2 * hidden), True: self._direct(messages, hidden, scale_bytes)}

    def _combine_links(self) -> dict[str, LinkTraffic]:
        """By way: a row for each choice, or for each rank if they are summed before."""
        messages, copies = self._rows()
        found = {}
        for name, way in self._ways().items():
            row_bytes = logfmt_row_bytes(self._case.hidden) if way == _LOGFMT else 2 * self._case.hidden
            found[name] = self._direct((messages if way == _PRE_REDUCED else copies).T, row_bytes)
        return found

    def _direct(self, rows: NDArray[np.int64], row_bytes: int, beside_bytes: int = 0) -> LinkTraffic:
        return direct(rows, self._case.ranks_per_node or self._case.ranks, row_bytes, beside_bytes)

    def _rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``[R, R]``, from tokens of rank i for rank j: once for each rank, and once for each choice."""
        case = self._case
        choices = np.stack([make_routing(case, rank)[0] for rank in range(case.ranks)])
        owners = choices.reshape(case.ranks, -1) // self.expected.num_local
        copies = np.stack([np.bincount(one, minlength=case.ranks) for one in owners])
        return marks_of(case, choices).sum(axis=1, dtype=np.int64), copies

    def _ways(self) -> dict[str, Way]:
        ways = {"outside": _OUTSIDE, "in place": _IN_PLACE, "LogFMT": _LOGFMT, "pre-reduced": _PRE_REDUCED}
        if self._case.hidden % LOGFMT_BLOCK:
            del ways["LogFMT"]
        return ways

    def _formats(self) -> tuple[bool, ...]:
        return (False, True) if self._case.hidden % FP8_BLOCK == 0 else (False,)
