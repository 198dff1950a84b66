"""Dispatch and combine beside a bare Alltoallv of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from epcomm import reference
from epcomm.bootstrap import Communicator
from epcomm.buffer import Buffer
from epcomm.cli.bench.case import Case, Inputs, expert_rows, gather_marks, make_inputs
from epcomm.cli.bench.links import CaseLinks, RoutedRows, count_differences, crossings, direct
from epcomm.cli.bench.measure import Operation, Run, digest, find_differences, measure
from epcomm.errors import MpiMissing
from epcomm.handle import DispatchHandle, DispatchResult

__all__ = ["PAIR", "run_throughput"]

PAIR = "dispatch + combine"
_Result = TypeVar("_Result")

_MPI_DISPATCH, _MPI_COMBINE, _MPI_PAIR = "Alltoallv of dispatch", "Alltoallv of combine", "Alltoallv, both"


class Alltoallv:
    """A bare mpi4py Alltoallv on ``MPI.COMM_WORLD``: packed beforehand, into memory that was touched beforehand.

    Args:
        rows: int64 ``[R, R]``, rows from rank i to rank j.
        row_bytes: bytes of one of them.
        rank: this rank.
    """

    def __init__(self, rows: NDArray[np.int64], row_bytes: int, rank: int) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self._send, self._recv = (self._message(counts * row_bytes, MPI.BYTE) for counts in (rows[rank], rows[:, rank]))

    @staticmethod
    def _message(num_bytes: NDArray[np.int64], unit: Any) -> list[Any]:
        begin = np.cumsum(num_bytes) - num_bytes
        return [np.ones(int(num_bytes.sum()), np.uint8), (num_bytes.tolist(), begin.tolist()), unit]

    def __call__(self) -> None:
        self._comm.Alltoallv(self._send, self._recv)


class _Calls:
    """The measured calls of one rank, with what they need."""

    def __init__(self, buffer: Buffer, case: Case) -> None:
        self._buffer, self._case = buffer, case
        self.inputs = make_inputs(case, buffer.rank)
        self._layout = buffer.get_dispatch_layout(self.inputs.topk_idx, case.experts)
        self._counts: list[tuple[str, tuple[int, int], tuple[int, int]]] = []
        self._dispatched: DispatchResult = self._counted("dispatch", self.dispatch)
        self.handle: DispatchHandle = self._dispatched.handle
        shape = (self.handle.num_rows, case.hidden)
        self._y = expert_rows(case, buffer.rank, shape)
        self._in_place: NDArray[Any] = self._y

    def layout(self) -> object:
        return self._buffer.get_dispatch_layout(self.inputs.topk_idx, self._case.experts)

    def dispatch(self) -> DispatchResult:
        return self._buffer.dispatch(
            self.inputs.payload,
            num_tokens_per_rank=self._layout.num_tokens_per_rank,
            num_tokens_per_rdma_rank=self._layout.num_tokens_per_rdma_rank,
            is_token_in_rank=self._layout.is_token_in_rank,
            num_tokens_per_expert=self._layout.num_tokens_per_expert,
            topk_idx=self.inputs.topk_idx,
            topk_weights=self.inputs.topk_weights,
        )

    def cached_dispatch(self) -> DispatchResult:
        return self._buffer.dispatch(self.inputs.payload, handle=self.handle)

    def combine(self) -> NDArray[Any]:
        combined: NDArray[Any] = self._buffer.combine(self._y, self.handle).combined_x
        return combined

    def write_in_place(self) -> None:
        """What the experts would do: write their output where the combine needs no copy of it."""
        self._in_place = self._buffer.get_combine_buffer(self.handle, self._case.combine_dtype)
        self._in_place[...] = self._y

    def combine_in_place(self) -> NDArray[Any]:
        combined: NDArray[Any] = self._buffer.combine(self._in_place, self.handle).combined_x
        return combined

    def pair(self) -> object:
        return self._buffer.combine(self._y, self.dispatch().handle)

    def digests(self) -> dict[str, str]:
        """Of one result of each kind."""
        first = self._dispatched
        cached = self._counted("dispatch, cached", self.cached_dispatch)
        combined = self._counted("combine", self.combine)
        self.write_in_place()
        return {
            "dispatch": digest(
                *_payload(first.recv_x),
                first.recv_topk_idx,
                first.recv_topk_weights,
                np.array(first.num_recv_tokens_per_expert_list, np.int64),
            ),
            "dispatch, cached": digest(*_payload(cached.recv_x)),
            "combine": digest(combined),
            "combine, in place": digest(self._counted("combine, in place", self.combine_in_place)),
        }

    def _counted(self, name: str, call: Callable[[], _Result]) -> _Result:
        before = crossings(self._buffer)
        result = call()
        self._counts.append((name, before, crossings(self._buffer)))
        return result

    def count_differences(self, crossing: int) -> list[str]:
        """What is wrong with the rows between nodes that these calls have counted, of which there are `crossing`."""
        return [
            f"{name} on rank {self._buffer.rank}: {text}"
            for name, before, after in self._counts
            for text in count_differences(name, before, after, crossing)
        ]


def run_throughput(comm: Communicator, case: Case) -> Run:
    """Compare with the reference, then measure. Collective, blocks the host.

    Raises:
        MpiMissing: there is no MPI to compare with.
    """
    try:
        import mpi4py.MPI  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise MpiMissing("bench", got=str(error).splitlines()[0], do="pip install 'epcomm[mpi]'") from None
    with Buffer(comm, backend=case.backend, ranks_per_node=case.ranks_per_node) as buffer:
        calls = _Calls(buffer, case)
        per_node = buffer.topology.ranks_per_node
        differences = find_differences(comm, calls.digests(), lambda: _reference_digests(case, per_node))
        links = CaseLinks(case, RoutedRows(gather_marks(comm, case), per_node))
        own = calls.count_differences(links.crossing.by_rank[comm.rank])
        differences += [text for texts in comm.allgather(own) for text in texts]
        operations = [] if differences else _operations(calls, case, links, comm.rank)
        measured = measure(operations, comm, case.repeats)
        return Run(buffer.topology, buffer.backend, differences, measured, links.crossing)


def _operations(calls: _Calls, case: Case, links: CaseLinks, rank: int) -> list[Operation]:
    rows, per_node = links.routed.rows, links.routed.ranks_per_node
    row_alone = case.hidden * calls.inputs.x.itemsize
    row_bytes = row_alone + (case.scale_bytes if calls.inputs.scales is not None else 0)
    sent, back = row_bytes + case.topk * (8 + 4), case.hidden * case.combine_dtype.itemsize
    mpi_dispatch, mpi_combine = Alltoallv(rows, sent, rank), Alltoallv(rows.T, back, rank)

    def mpi_pair() -> None:
        mpi_dispatch()
        mpi_combine()

    num_rows, num_own = int(rows.sum()), int(rows.trace())

    def size(row_bytes: int) -> tuple[int, int]:
        return num_rows * row_bytes, (num_rows - num_own) * row_bytes

    there, here = direct(rows, per_node, row_alone, sent - row_alone), direct(rows.T, per_node, back)
    dispatch, cached, combine = links.dispatch(), links.dispatch(has_handle=True), links.combine()
    operations = [
        (Operation("get_dispatch_layout", calls.layout, 0, 0), None),
        (Operation(_MPI_DISPATCH, mpi_dispatch, *size(sent)), there),
        (Operation("dispatch", calls.dispatch, *size(sent), _MPI_DISPATCH), dispatch),
        (Operation("dispatch, cached", calls.cached_dispatch, *size(row_bytes), _MPI_DISPATCH), cached),
        (Operation(_MPI_COMBINE, mpi_combine, *size(back)), here),
        (Operation("combine", calls.combine, *size(back), _MPI_COMBINE), combine),
        (
            Operation(
                "combine, in place", calls.combine_in_place, *size(back), _MPI_COMBINE, before=calls.write_in_place
            ),
            combine,
        ),
        (Operation(_MPI_PAIR, mpi_pair, *size(sent + back)), there + here),
        (Operation(PAIR, calls.pair, *size(sent + back), _MPI_PAIR), dispatch + combine),
    ]
    return [replace(operation, links=moved) for operation, moved in operations]


def _reference_digests(case: Case, ranks_per_node: int) -> list[dict[str, str]]:
    everyone: Sequence[Inputs] = [make_inputs(case, rank) for rank in range(case.ranks)]
    topk_idx = [inputs.topk_idx for inputs in everyone]
    scales = [inputs.scales for inputs in everyone if inputs.scales is not None]
    dispatched = reference.dispatch(
        [inputs.x for inputs in everyone],
        topk_idx,
        case.experts,
        topk_weights=[inputs.topk_weights for inputs in everyone],
        scales=scales or None,
    )
    y = [expert_rows(case, rank, (len(got.recv_x), case.hidden)) for rank, got in enumerate(dispatched)]
    combined = reference.combine(y, topk_idx, case.experts, ranks_per_node=ranks_per_node)
    wanted = []
    for got, (combined_x, _) in zip(dispatched, combined, strict=True):
        payload = [got.recv_x] if got.recv_scales is None else [got.recv_x, got.recv_scales]
        counts = np.array(got.num_recv_tokens_per_expert_list, np.int64)
        wanted.append(
            {
                "dispatch": digest(*payload, got.recv_topk_idx, got.recv_topk_weights, counts),
                "dispatch, cached": digest(*payload),
                "combine": digest(combined_x),
                "combine, in place": digest(combined_x),
            }
        )
    return wanted


def _payload(recv_x: Any) -> tuple[Any, ...]:
    return recv_x if isinstance(recv_x, tuple) else (recv_x,)
