"""Low-latency dispatch and combine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm import reference
from epcomm.bootstrap import Communicator
from epcomm.buffer import Buffer
from epcomm.cli.bench.case import Case, expert_rows, make_inputs
from epcomm.cli.bench.links import direct
from epcomm.cli.bench.measure import Operation, Run, digest, find_differences, measure
from epcomm.handle import LowLatencyDispatchResult
from epcomm.numerics import FP8_BLOCK

__all__ = ["run_low_latency"]


class _Calls:
    """The measured calls of one rank, with what they need."""

    def __init__(self, buffer: Buffer, case: Case) -> None:
        self._buffer, self._case = buffer, case
        self.inputs = make_inputs(case, buffer.rank)
        self.handle = self.dispatch(use_fp8=False).handle
        self._y = expert_rows(case, buffer.rank, _output_shape(case))
        self._in_place: NDArray[Any] = self._y

    def dispatch(self, use_fp8: bool) -> LowLatencyDispatchResult:
        case, inputs = self._case, self.inputs
        return self._buffer.low_latency_dispatch(inputs.x, inputs.topk_idx, case.tokens, case.experts, use_fp8=use_fp8)

    def combine(self) -> NDArray[Any]:
        inputs = self.inputs
        combined: NDArray[Any] = self._buffer.low_latency_combine(
            self._y, inputs.topk_idx, inputs.topk_weights, self.handle
        ).combined_x
        return combined

    def write_in_place(self) -> None:
        """What the experts would do: write their output where the combine needs no copy of it."""
        self._in_place = self._buffer.get_next_low_latency_combine_buffer(self.handle)
        self._in_place[...] = self._y

    def combine_in_place(self) -> NDArray[Any]:
        inputs = self.inputs
        combined: NDArray[Any] = self._buffer.low_latency_combine(
            self._in_place, inputs.topk_idx, inputs.topk_weights, self.handle, zero_copy=True
        ).combined_x
        return combined

    def pair(self, use_fp8: bool) -> object:
        inputs = self.inputs
        handle = self.dispatch(use_fp8).handle
        return self._buffer.low_latency_combine(self._y, inputs.topk_idx, inputs.topk_weights, handle)

    def digests(self) -> dict[str, str]:
        """Of one result of each kind."""
        bf16 = self.dispatch(use_fp8=False)
        found = {"dispatch, bf16": _received_digest(bf16.recv_x, None, bf16.recv_count, bf16.handle.src_info)}
        if _has_fp8(self._case):
            fp8 = self.dispatch(use_fp8=True)
            rows, scales = fp8.recv_x
            found["dispatch, fp8"] = _received_digest(rows, scales, fp8.recv_count, fp8.handle.src_info)
        found["combine"] = digest(self.combine())
        self.write_in_place()
        found["combine, zero copy"] = digest(self.combine_in_place())
        return found


def run_low_latency(comm: Communicator, case: Case) -> Run:
    """Compare with the reference, then measure. Collective, blocks the host."""
    hint = Buffer.get_low_latency_rdma_size_hint(case.tokens, case.hidden, case.ranks, case.experts)
    with Buffer(
        comm, num_rdma_bytes=hint, low_latency_mode=True, backend=case.backend, ranks_per_node=case.ranks_per_node
    ) as buffer:
        calls = _Calls(buffer, case)
        differences = find_differences(comm, calls.digests(), lambda: _reference_digests(case))
        owners = calls.inputs.topk_idx // (case.experts // case.ranks)
        copies = np.stack(comm.allgather(np.bincount(owners.reshape(-1), minlength=case.ranks)))
        operations = [] if differences else _operations(calls, case, copies, buffer.topology.ranks_per_node)
        return Run(buffer.topology, buffer.backend, differences, measure(operations, comm, case.repeats))


def _operations(calls: _Calls, case: Case, copies: NDArray[np.int64], ranks_per_node: int) -> list[Operation]:
    """Args: copies of rows, from tokens of rank i for experts of rank j."""
    bf16 = 2 * case.hidden
    fp8 = case.hidden + case.scale_bytes
    num_copies, num_sent = int(copies.sum()), int(copies.sum() - copies.trace())

    def size(row_bytes: int) -> tuple[int, int]:
        return num_copies * row_bytes, num_sent * row_bytes

    there, there_fp8 = (
        direct(copies, ranks_per_node, bf16),
        direct(copies, ranks_per_node, case.hidden, case.scale_bytes),
    )
    back = direct(copies.T, ranks_per_node, bf16)
    operations = [
        (Operation("dispatch, bf16", lambda: calls.dispatch(use_fp8=False), *size(bf16)), there),
        (Operation("dispatch, fp8", lambda: calls.dispatch(use_fp8=True), *size(fp8)), there_fp8),
        (Operation("combine", calls.combine, *size(bf16)), back),
        (Operation("combine, zero copy", calls.combine_in_place, *size(bf16), before=calls.write_in_place), back),
        (Operation("dispatch bf16 + combine", lambda: calls.pair(use_fp8=False), *size(bf16 + bf16)), there + back),
        (Operation("dispatch fp8 + combine", lambda: calls.pair(use_fp8=True), *size(fp8 + bf16)), there_fp8 + back),
    ]
    found = [replace(operation, links=moved) for operation, moved in operations]
    return [operation for operation in found if _has_fp8(case) or "fp8" not in operation.name]


def _reference_digests(case: Case) -> list[dict[str, str]]:
    everyone = [make_inputs(case, rank) for rank in range(case.ranks)]
    x, topk_idx = [inputs.x for inputs in everyone], [inputs.topk_idx for inputs in everyone]
    wanted: list[dict[str, str]] = [{} for _ in everyone]
    for name, use_fp8 in (("dispatch, bf16", False), ("dispatch, fp8", True)):
        if use_fp8 and not _has_fp8(case):
            continue
        dispatched = reference.low_latency_dispatch(x, topk_idx, case.tokens, case.experts, use_fp8=use_fp8)
        for got, digests in zip(dispatched, wanted, strict=True):
            digests[name] = _received_digest(got.recv_x, got.recv_scales, got.recv_count, got.src_info)
    y = [expert_rows(case, rank, _output_shape(case)) for rank in range(case.ranks)]
    weights = [inputs.topk_weights for inputs in everyone]
    for combined_x, digests in zip(
        reference.low_latency_combine(y, topk_idx, weights, dispatched), wanted, strict=True
    ):
        digests["combine"] = digests["combine, zero copy"] = digest(combined_x)
    return wanted


def _received_digest(
    recv_x: NDArray[Any], scales: NDArray[Any] | None, recv_count: NDArray[np.int32], src_info: NDArray[np.int32]
) -> str:
    """Of the rows that are there; those past the count of their expert are undefined."""
    is_row = np.arange(recv_x.shape[1]) < recv_count[:, None]
    parts = [recv_x[is_row], recv_count, src_info[is_row]]
    return digest(*parts) if scales is None else digest(*parts, scales[is_row])


def _has_fp8(case: Case) -> bool:
    return case.hidden % FP8_BLOCK == 0


def _output_shape(case: Case) -> tuple[int, int, int]:
    return case.experts // case.ranks, case.ranks * case.tokens, case.hidden
