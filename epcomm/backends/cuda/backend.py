"""CudaBackend: the `Backend` protocol on GPUs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from epcomm.arrays import ArrayView, StreamRef, to_host
from epcomm.backends.agreement import (
    CACHED_DISPATCH,
    COMBINE,
    DISPATCH,
    LOW_LATENCY_COMBINE,
    LOW_LATENCY_DISPATCH,
    check_agreed,
)
from epcomm.backends.cuda import low_latency
from epcomm.backends.cuda.combine import combine, reject_combine
from epcomm.backends.cuda.dispatch import (
    ELSEWHERE,
    contradiction,
    dispatch,
    dispatch_layout,
    reject_exchange,
)
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.moves import reject_move
from epcomm.backends.cuda.settings import Settings
from epcomm.backends.cuda.turn import CudaTurn, output_spec
from epcomm.backends.protocol import (
    CombineOutcome,
    CombineRequest,
    DispatchOutcome,
    DispatchRequest,
    LayoutOutcome,
    LowLatencyCombineRequest,
    LowLatencyDispatchOutcome,
    LowLatencyDispatchRequest,
    Rejectable,
)
from epcomm.bootstrap import Communicator, Topology
from epcomm.config import NUM_LOW_LATENCY_SLOTS
from epcomm.errors import (
    BufferStateError,
    CapacityError,
    EpcommError,
    PeerError,
    RingFull,
    RoutingError,
    UnsupportedOption,
)
from epcomm.event import EventOverlap
from epcomm.kernels.exchange import STATUS_COUNTS
from epcomm.kernels.layout import UNIT, round_up
from epcomm.memory import Block
from epcomm.numerics import BFLOAT16

__all__ = ["CudaBackend"]

_Request = TypeVar("_Request")
_Outcome = TypeVar("_Outcome")

# What the entries of a call without exchange agree on.
_NAMES = {
    "dispatch": CACHED_DISPATCH,
    "combine": COMBINE,
    "low_latency_dispatch": LOW_LATENCY_DISPATCH,
    "low_latency_combine": LOW_LATENCY_COMBINE,
}


class CudaBackend:
    """One rank of the CUDA backend.

    Construction is collective and blocks the host. Arguments and errors: `epcomm.backends.cuda.job.Job`.
    """

    name = "cuda"

    def __init__(self, comm: Communicator, topology: Topology, settings: Settings) -> None:
        self._job = Job(comm, topology, settings)
        self._num_dropped = 0

    def enter(self) -> int | None:
        job = self._job
        if job.page.failed:
            raise job.page.error()
        before: int = job.runtime.getDevice()
        if before == job.device:
            return None
        job.runtime.setDevice(job.device)
        return before

    def leave(self, before: int) -> None:
        self._job.runtime.setDevice(before)

    def turn(
        self, framework: str | None, stream: Any, previous_event: EventOverlap | None, async_finish: bool
    ) -> CudaTurn:
        return CudaTurn(self._job, framework, stream, previous_event, async_finish)

    def num_sms(self, wanted: int | None, is_low_latency: bool = False) -> int:
        """SMs of an operation; None: nobody has said how many."""
        if wanted is not None:
            return self._job.placement.blocks(wanted)
        return self._job.low_latency_num_sms if is_low_latency else self._job.default_num_sms

    def dispatch_layout(self, turn: CudaTurn, topk_idx: ArrayView, num_experts: int) -> LayoutOutcome:
        return dispatch_layout(self._job, turn, topk_idx, num_experts)

    def dispatch(self, turn: CudaTurn, request: DispatchRequest) -> DispatchOutcome:
        return self._run(dispatch, turn, request, _operation(request))

    def combine(self, turn: CudaTurn, request: CombineRequest) -> CombineOutcome:
        return self._run(combine, turn, request, Rejectable.COMBINE)

    def low_latency_dispatch(
        self, turn: CudaTurn, request: LowLatencyDispatchRequest
    ) -> tuple[LowLatencyDispatchOutcome, Callable[[CudaTurn], None]]:
        return self._run(low_latency.dispatch, turn, request, Rejectable.LOW_LATENCY_DISPATCH)

    def low_latency_combine(self, turn: CudaTurn, request: LowLatencyCombineRequest) -> Callable[[CudaTurn], None]:
        return self._run(low_latency.combine, turn, request, Rejectable.LOW_LATENCY_COMBINE)

    def reject(self, turn: CudaTurn, operation: Rejectable, error: Exception) -> None:
        if turn.is_captured:  # the launch would become part of the graph
            low_latency.pass_over(self._job, operation)
            return
        if operation is Rejectable.DISPATCH:
            reject_exchange(self._job, turn, error)
        elif operation is Rejectable.CACHED_DISPATCH:
            reject_move(self._job, turn)
        elif operation is Rejectable.COMBINE:
            reject_combine(self._job, turn)
        elif self._job.has_low_latency:  # else all ranks raise the same error
            reject_low_latency = {
                Rejectable.LOW_LATENCY_DISPATCH: low_latency.reject_dispatch,
                Rejectable.LOW_LATENCY_COMBINE: low_latency.reject_combine,
            }
            reject_low_latency[operation](self._job, turn)

    def _run(
        self,
        run: Callable[[Job, CudaTurn, _Request], _Outcome],
        turn: CudaTurn,
        request: _Request,
        operation: Rejectable,
    ) -> _Outcome:
        """An error before peers count on this call is told to them.

        But not that all slots are taken: ranks that call hooks in the same order all hear of that, and stay in step.
        """
        try:
            return run(self._job, turn, request)
        except RingFull:
            raise
        except Exception as error:
            if not turn.has_entered:
                self.reject(turn, operation, error)
            raise

    def combine_buffer(self, turn: CudaTurn, num_rows: int, hidden: int, dtype: np.dtype[Any]) -> ArrayView:
        num_bytes = num_rows * hidden * dtype.itemsize
        block: Block | None = self._job.arena.allocate(num_bytes, turn.stream, is_captured=turn.is_captured)
        if block is None:
            return turn.new((num_rows, hidden), dtype)  # combine takes its rows through the window
        turn.own(block)
        return ArrayView(output_spec((num_rows, hidden), dtype, turn.place), block.ptr, block)

    def low_latency_combine_buffer(self, turn: CudaTurn, shape: tuple[int, int, int]) -> ArrayView:
        job = self._job
        ptr = job.low_latency.combine_buffer(
            turn.stream, turn.capture, round_up(math.prod(shape) * BFLOAT16.itemsize, UNIT)
        )
        return self._view_of_region(ptr, shape, BFLOAT16)

    def local_buffer(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        return self._view_of_region(self._job.base + self._job.arena_offset + offset, shape, dtype)

    def _view_of_region(self, ptr: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        """Memory that is not allocated, and stays as long as the array."""
        job = self._job
        return ArrayView(output_spec(shape, dtype, job.device), ptr, job.region_owner())

    def record_stream(self, x: ArrayView, stream: Any) -> None:
        reader = self._job.streams.of_caller(None, stream)
        if reader is None:
            raise UnsupportedOption("record_stream", got="no stream", do="pass the stream that uses x")
        self._job.note_reader(x.ptr, *reader)

    def barrier(self, turn: CudaTurn) -> None:
        """All ranks reach this point of their streams. Collective; does not block the host."""
        self._job.launch.barrier(turn.stream)

    def mask(self, turn: CudaTurn, rank: int) -> None:
        self._job.low_latency.launch.service(turn.stream, mask=1 << rank)

    def query_masks(self, turn: CudaTurn, out: ArrayView) -> None:
        self._job.low_latency.launch.service(turn.stream, masks=out.ptr)

    def unmask(self, turn: CudaTurn, ranks: list[int]) -> None:
        job, low = self._job, self._job.low_latency
        job.launch.barrier(turn.stream)  # bounded, unlike what the hosts say to each other
        sequences = turn.new((2 * NUM_LOW_LATENCY_SLOTS,), np.dtype(np.uint32))
        low.launch.service(turn.stream, sequences=sequences.ptr)
        own = to_host(sequences, turn.stream)
        if job.page.failed:
            raise job.page.error()
        # Sends that nobody received have come one call further.
        everyone = np.array(job.comm.allgather(own.tolist()))
        low.resume(turn.stream, (everyone.max(axis=0) + 1).tolist(), ranks)
        job.runtime.streamSynchronize(turn.stream)
        job.comm.barrier()

    def stats(self) -> dict[str, int]:
        counters: Counter[str] = self._job.counters
        arena = {f"arena_{name}": value for name, value in self._job.arena.stats.items()}
        outputs = {f"outputs_{name}": value for name, value in self._job.outputs.stats.items()}
        sent, returned = self._job.page.rows_to_nodes
        return {**counters, **arena, **outputs, "rows_to_other_nodes": sent, "rows_from_other_nodes": returned}

    def news(self) -> EpcommError | None:
        """What kernels have recorded since the last look; a failure stays. Does not wait for kernels that run."""
        page, rank = self._job.page, self._job.rank
        if page.failed:
            return page.error()
        ranks = [other for other in page.take_rejections() if other != rank]  # the own error was raised in the call
        if ranks:
            return PeerError("an earlier call, of which no row was moved", dict.fromkeys(ranks, ELSEWHERE))
        if page.take_left_behind():
            return BufferStateError(
                "an earlier low-latency call, of which no row was moved",
                got="peers that went on without this rank, which is masked there",
                wanted="all ranks in step",
                do="call low_latency_clean_mask_buffer on all ranks to bring it back",
            )
        if page.take_other_choices():
            return RoutingError(
                "an earlier low_latency_combine: topk_idx",
                got="other choices than those of the dispatch, so the sums of their tokens are wrong",
                wanted="the topk_idx of the dispatch that made the handle",
            )
        void, mismatch = page.take_void(), page.take_mismatch()
        if void is not None:
            return self._why_void(*void)
        if mismatch is not None:
            operation, values = mismatch
            names = _NAMES[operation]
            return _disagreement(f"an earlier {operation}, of which no row was moved", names, values)
        if page.dropped != self._num_dropped:
            dropped, self._num_dropped = page.dropped - self._num_dropped, page.dropped
            return CapacityError(
                "dispatch: num_worst_tokens",
                got=f"{dropped} rows for rank {self._job.rank} that did not fit and were dropped",
                wanted="as many rows as the busiest rank receives",
                do="raise num_worst_tokens",
            )
        return None

    def _why_void(self, status: list[int], agreed: list[list[int]]) -> EpcommError:
        """Why an exchange went wrong, of which no host waited for the counts."""
        what = "an earlier dispatch, of which no row was moved"
        if status[self._job.rank] == STATUS_COUNTS:
            return contradiction()
        rejecting = {rank: ELSEWHERE for rank, code in enumerate(status) if code}
        return PeerError(what, rejecting) if rejecting else _disagreement(what, DISPATCH, agreed)

    def comm_stream(self) -> StreamRef:
        return self._job.streams.own

    def interrupted(self) -> bool:
        return not self._job.is_in_step

    def abandon(self) -> None:
        self._job.page.abort()

    def close(self) -> None:
        self._job.close()

    def drop(self, is_expected: bool) -> None:
        self._job.drop()


def _operation(request: DispatchRequest) -> Rejectable:
    return Rejectable.DISPATCH if request.handle is None else Rejectable.CACHED_DISPATCH


def _disagreement(what: str, names: Sequence[str], values: list[list[int]]) -> EpcommError:
    """The error of ranks that disagree about `values`, one list a rank."""
    try:
        check_agreed(what, names, values)
    except EpcommError as error:
        return error
    raise AssertionError(f"{what}: equal values {values}")
