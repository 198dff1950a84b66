"""HostBackend: the `Backend` protocol over an `Exchange`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm import env
from epcomm.arrays import ArrayView, empty
from epcomm.backends.host import internode, low_latency, throughput
from epcomm.backends.host.control import Control
from epcomm.backends.host.exchange import Exchange
from epcomm.backends.host.fields import Field, to_all
from epcomm.backends.host.header import Operation
from epcomm.backends.host.routing import dispatch_layout
from epcomm.backends.host.turn import HostTurn
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
from epcomm.bootstrap import Communicator, LocalCommunicator, Topology
from epcomm.errors import InputError, UnsupportedOption
from epcomm.event import EventOverlap
from epcomm.layout import ControlLayout, Ring
from epcomm.memory import FileSegments, LocalSegments, SegmentStore
from epcomm.numerics import BFLOAT16

__all__ = ["HostBackend"]

Array = NDArray[Any]

_REJECTED = {
    Rejectable.DISPATCH: (Operation.DISPATCH, Ring.THROUGHPUT),
    Rejectable.CACHED_DISPATCH: (Operation.CACHED_DISPATCH, Ring.THROUGHPUT),
    Rejectable.COMBINE: (Operation.COMBINE, Ring.THROUGHPUT),
    Rejectable.LOW_LATENCY_DISPATCH: (Operation.LOW_LATENCY_DISPATCH, Ring.LOW_LATENCY_DISPATCH),
    Rejectable.LOW_LATENCY_COMBINE: (Operation.LOW_LATENCY_COMBINE, Ring.LOW_LATENCY_COMBINE),
}
_LOW_LATENCY_RINGS = (Ring.LOW_LATENCY_DISPATCH, Ring.LOW_LATENCY_COMBINE)


def _share_control(comm: Communicator, topology: Topology, store: SegmentStore, timeout_s: float) -> Control | None:
    """Create and map the control segments of this host's ranks; None on all ranks if one of them cannot."""
    layout = ControlLayout(comm.size)
    try:
        name, own = store.create(layout.num_bytes)
    except OSError:
        name, own = "", np.empty(0, np.uint8)
    names = comm.allgather(name)
    segments = {comm.rank: own}
    try:
        for rank in topology.same_host_ranks:
            if rank != comm.rank:
                segments[rank] = store.open(names[rank], layout.num_bytes)
        mapped = bool(name)
    except OSError:
        mapped = False
    everywhere = all(comm.allgather(mapped))  # also the barrier after which the names may go
    if name:
        store.unlink(name)
    if not everywhere:
        return None
    check_job = comm.group.raise_if_poisoned if isinstance(comm, LocalCommunicator) else lambda: None
    return Control(layout, comm.rank, dict(sorted(segments.items())), timeout_s, check_job)


def _choose_store(comm: Communicator) -> SegmentStore | None:
    choice = env.get("EPCOMM_HOST_TRANSPORT")
    if choice not in ("auto", "segments", "messages"):
        raise InputError("EPCOMM_HOST_TRANSPORT", got=repr(choice), wanted="auto, segments or messages")
    if choice == "messages":
        return None
    if isinstance(comm, LocalCommunicator):
        return LocalSegments(comm.group)
    return FileSegments(env.get("EPCOMM_SHM_DIR"))


class HostBackend:
    """One rank of the host backend.

    Collective. Ranks of one host share memory; between hosts, and where shared memory is missing, rows travel
    through the communicator.

    Args:
        comm: the ranks.
        topology: hosts and (virtual) nodes.
        timeout_s: bound of every wait, in seconds.
        mask_on_timeout: low-latency ranks that do not answer are masked.

    Raises:
        UnsupportedOption: `mask_on_timeout` where ranks share no memory, or EPCOMM_HOST_TRANSPORT=segments there.
    """

    name = "host"

    def __init__(self, comm: Communicator, topology: Topology, timeout_s: float, mask_on_timeout: bool) -> None:
        store = _choose_store(comm)
        control = _share_control(comm, topology, store, timeout_s) if store is not None else None
        self._exchange = Exchange(comm, store if control else None, control, timeout_s, mask_on_timeout)
        if not self._exchange.one_host:
            if mask_on_timeout:
                raise UnsupportedOption(
                    "enable_shrink",
                    got="ranks that share no memory",
                    wanted="all ranks on one host",
                    do="messages cannot go on without a rank; leave enable_shrink off",
                )
            if env.get("EPCOMM_HOST_TRANSPORT") == "segments":
                raise UnsupportedOption(
                    "EPCOMM_HOST_TRANSPORT=segments",
                    got="ranks that share no memory",
                    do="set it to auto, or make room in EPCOMM_SHM_DIR",
                )
        self._nodes = internode.Nodes(comm.rank, comm.size, topology.ranks_per_node)
        self._crossings = internode.Crossings()
        self._turn = HostTurn()

    def enter(self) -> None:
        return None

    def leave(self, before: int) -> None:
        pass

    def turn(
        self, framework: str | None, stream: Any, previous_event: EventOverlap | None, async_finish: bool
    ) -> HostTurn:
        if previous_event is not None:
            previous_event.current_stream_wait()
        return self._turn

    def num_sms(self, wanted: int | None, is_low_latency: bool = False) -> int:
        return wanted or 1  # there are none

    def dispatch_layout(self, turn: HostTurn, topk_idx: Array, num_experts: int) -> LayoutOutcome:
        return dispatch_layout(topk_idx, num_experts, self._nodes.num_ranks, self._nodes.ranks_per_node)

    def dispatch(self, turn: HostTurn, request: DispatchRequest) -> DispatchOutcome:
        if self._nodes.num_nodes > 1:
            return internode.dispatch(self._exchange, self._nodes, request, self._crossings)
        return throughput.dispatch(self._exchange, request)

    def combine(self, turn: HostTurn, request: CombineRequest) -> CombineOutcome:
        if self._nodes.num_nodes > 1:
            return internode.combine(self._exchange, self._nodes, request, self._crossings)
        return throughput.combine(self._exchange, request)

    def low_latency_dispatch(
        self, turn: HostTurn, request: LowLatencyDispatchRequest
    ) -> tuple[LowLatencyDispatchOutcome, Callable[[HostTurn], None]]:
        return low_latency.dispatch(self._exchange, request)

    def low_latency_combine(self, turn: HostTurn, request: LowLatencyCombineRequest) -> Callable[[HostTurn], None]:
        return low_latency.combine(self._exchange, request)

    def reject(self, turn: HostTurn, operation: Rejectable, error: Exception) -> None:
        called, ring = _REJECTED[operation]
        # Not every exception has a message (MemoryError), and an empty one would mean good input.
        ticket = self._exchange.post(called, ring, {}, [], rejection=str(error) or repr(error))
        with self._exchange.collect(ticket):
            pass

    def combine_buffer(self, turn: HostTurn, num_rows: int, hidden: int, dtype: np.dtype[Any]) -> Array:
        return self._window(Ring.THROUGHPUT, Operation.COMBINE, (num_rows, hidden), dtype)

    def low_latency_combine_buffer(self, turn: HostTurn, shape: tuple[int, int, int]) -> Array:
        return self._window(Ring.LOW_LATENCY_COMBINE, Operation.LOW_LATENCY_COMBINE, shape, BFLOAT16)

    def _window(self, ring: Ring, operation: Operation, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # Weights of up to 32 choices and the selection lie behind the rows; growing later would cost a copy.
        behind = 4096 + 16 * self._nodes.num_ranks + 33 * 4 * int(np.prod(shape[:-1], dtype=np.int64))
        try:
            window = self._exchange.next_window(ring, operation, num_bytes + behind)
        except OSError:
            return empty(shape, dtype)  # no shared memory: rows will go by message, from anywhere
        return window.bytes[:num_bytes].view(dtype).reshape(shape)

    def local_buffer(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        return None

    def record_stream(self, x: ArrayView, stream: Any) -> None:
        pass  # memory is not used again while an array over it lives

    def news(self) -> None:
        return None  # every call raises what went wrong in it

    def comm_stream(self) -> None:
        return None

    def mask(self, turn: HostTurn, rank: int) -> None:
        if not self._exchange.one_host:
            raise UnsupportedOption(
                "low_latency_update_mask_buffer",
                got="ranks that share no memory",
                wanted="all ranks on one host",
                do="messages cannot go on without a rank",
            )
        self._exchange.masked[rank] = True

    def query_masks(self, turn: HostTurn, out: Array) -> None:
        out[...] = self._exchange.masked

    def unmask(self, turn: HostTurn, ranks: list[int]) -> None:
        exchange, size = self._exchange, self._exchange.comm.size
        own = np.array([[exchange.sequence(ring) for ring in _LOW_LATENCY_RINGS]], np.int64)
        ticket = exchange.post(Operation.CLEAN_MASKS, Ring.SYNC, {}, [Field(own, to_all(1, size))])
        with exchange.collect(ticket) as delivery:
            everyone = np.stack([delivery.rows(r, 0).reshape(-1).view(np.int64) for r in range(size)])
            for ring, sequence in zip(_LOW_LATENCY_RINGS, everyone.max(axis=0), strict=True):
                exchange.resume_at(ring, int(sequence))
        exchange.masked[ranks] = False

    def barrier(self, turn: HostTurn) -> None:
        with self._exchange.collect(self._exchange.post(Operation.BARRIER, Ring.SYNC, {}, [])):
            pass

    def stats(self) -> dict[str, int]:
        return {
            "bytes_copied_to_windows": self._exchange.num_bytes_copied,
            "bytes_sent_by_message": self._exchange.messages.num_bytes,
            "rows_to_other_nodes": self._crossings.sent,
            "rows_from_other_nodes": self._crossings.returned,
        }

    def interrupted(self) -> bool:
        return self._exchange.interrupted

    def abandon(self) -> None:
        self._exchange.abandon()

    def close(self) -> None:
        self._exchange.close()

    def drop(self, is_expected: bool) -> None:
        if is_expected:
            self._exchange.close()  # a store to memory of this rank
