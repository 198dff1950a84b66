"""Life of a Buffer: the guard around every call, inspection, destruction."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections import Counter
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import empty, export_any, export_array, import_array
from epcomm.backends import Array, Rejectable, Turn
from epcomm.bootstrap import Topology, as_communicator, discover, install_abort_hook
from epcomm.buffer.arguments import numpy_dtype
from epcomm.buffer.construction import agree_on_settings, make_backend
from epcomm.buffer.tuning import Tuning
from epcomm.errors import (
    BootstrapError,
    BufferBroken,
    BufferDestroyed,
    CapacityError,
    ConcurrentUse,
    EpcommError,
    ForkedProcess,
    PeerTimeout,
    ShapeError,
)
from epcomm.event import EventOverlap

__all__ = ["BufferCore", "Entry"]

_ids = itertools.count()
_COUNTERS = (
    "get_dispatch_layout_calls",
    "dispatch_calls",
    "combine_calls",
    "low_latency_dispatch_calls",
    "low_latency_combine_calls",
    "rows_sent",
    "rows_received",
)


_num_forks = 0  # that lie between the first process of Python's and this one


def _note_fork() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_child=_note_fork)  # asking the system for the process in each call takes longer


class Entry:
    """One call of a Buffer, from its admission to its end; a timeout or an interrupt inside breaks the Buffer for good.

    Raises:
        ForkedProcess, ConcurrentUse, BufferDestroyed, BufferBroken: the Buffer cannot be used here and now.
        EpcommError: what the device has recorded.
    """

    __slots__ = ("_buffer", "_device_before", "_operation")

    def __init__(self, buffer: BufferCore, operation: str) -> None:
        self._buffer, self._operation = buffer, operation

    def __enter__(self) -> None:
        buffer, operation = self._buffer, self._operation
        if buffer._num_forks != _num_forks:
            raise ForkedProcess(
                operation,
                got=f"a Buffer of process {buffer._pid} in process {os.getpid()}",
                do="make a Buffer after the fork, or start processes with 'spawn'",
            )
        if not buffer._entry.acquire(False):
            raise ConcurrentUse(
                operation, got="a second call while one is running", wanted="one thread at a time in a Buffer"
            )
        try:
            if buffer._destroyed or buffer._broken is not None:
                buffer._refuse(operation)
            self._device_before = buffer._backend.enter()
        except BaseException as error:
            buffer._leave(error, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffer._leave(error, self._device_before)


class BufferCore(Tuning):
    """The part of `epcomm.Buffer` that is not an operation."""

    def __init__(
        self,
        comm: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        *,
        backend: str = "auto",
        ranks_per_node: int | None = None,
        timeout_s: float | None = None,
        device: int | None = None,
    ) -> None:
        self._destroyed = True  # until construction is complete
        self._comm = as_communicator(comm)
        install_abort_hook(self._comm)  # before anything that can fail on this rank alone
        settings = {
            "low_latency_mode": bool(low_latency_mode),
            "enable_shrink": bool(enable_shrink),
            "backend": backend,
            "num_nvl_bytes": num_nvl_bytes,
            "num_rdma_bytes": num_rdma_bytes,
            "num_qps_per_rank": num_qps_per_rank,
        }
        seconds, self._check_routing = agree_on_settings(
            self._comm, settings, ranks_per_node=ranks_per_node, timeout_s=timeout_s
        )
        self._topology, self._num_ranks = discover(self._comm, ranks_per_node), self._comm.size
        self.num_nvl_bytes, self.num_rdma_bytes = int(num_nvl_bytes), int(num_rdma_bytes)
        self._backend = make_backend(self._comm, self._topology, settings, seconds, device)
        self.id = next(_ids)
        self.low_latency_mode = bool(low_latency_mode)
        self._explicitly_destroy = bool(explicitly_destroy)
        self._local_buffers: dict[bool, NDArray[np.uint8]] = {}
        self._counters = Counter(dict.fromkeys(_COUNTERS, 0))
        self._recorded: list[EpcommError] = []
        self._broken: BaseException | None = None
        # Of low latency: how often masked ranks were brought back; dispatches whose hook has not run; and what
        # get_next_low_latency_combine_buffer handed out last, for the next combine.
        self._epoch = 0
        self._unreceived: set[int] = set()
        self._combine_buffer: Array | None = None
        self._pid, self._num_forks = os.getpid(), _num_forks
        self._entry = threading.Lock()
        self._destroyed = False

    # -- who and what -------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank."""
        return self._comm.rank

    @property
    def group_size(self) -> int:
        """Number of ranks."""
        return self._num_ranks

    @property
    def topology(self) -> Topology:
        """Nodes, local ranks and hosts of the job."""
        return self._topology

    @property
    def backend(self) -> str:
        """Name of the backend in use: "host" or "cuda"."""
        return self._backend.name

    @property
    def stats(self) -> dict[str, int]:
        """Counters since construction: calls by operation, rows sent and received, bytes moved on this rank.

        Over several nodes ``rows_to_other_nodes``, rows of this rank's tokens that its dispatches sent to forwarders of
        other nodes, and ``rows_from_other_nodes``, sums of them that combines brought back. On CUDA also how results
        were delivered (``dispatch_in_arena``, ``dispatch_by_window``, ``combine_in_arena``, ``combine_by_window``) and
        what the arena and other memory hold (``arena_...``, ``outputs_...``). Replays of graphs count nothing.
        """
        return {**self._counters, **self._backend.stats()}

    def __repr__(self) -> str:
        state = "destroyed" if self._destroyed else "broken" if self._broken else self.backend
        return f"<epcomm.Buffer {self.id}, rank {self._comm.rank} of {self._comm.size}, {state}>"

    # -- guard --------------------------------------------------------------------------------------------------

    def _refuse(self, operation: str) -> NoReturn:
        if self._destroyed:
            raise BufferDestroyed(operation, got="a destroyed Buffer", do="make a new one on all ranks")
        raise BufferBroken(
            operation,
            got=f"a Buffer that {type(self._broken).__name__} left out of step",
            do="destroy it; make a new one on all ranks once the cause is removed",
        ) from self._broken

    def _leave(self, error: BaseException | None, device_before: int | None) -> None:
        try:
            if device_before is not None:
                self._backend.leave(device_before)
            if error is None or self._broken is not None:
                return
            if isinstance(error, PeerTimeout | BootstrapError | KeyboardInterrupt) or self._backend.interrupted():
                self._broken = error
                self._backend.abandon()
        finally:
            self._entry.release()

    def _turn(
        self,
        operation: Rejectable | None,
        framework: str | None,
        stream: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
    ) -> Turn:
        """Begin a call with an input of `framework`, None: no array; `operation` if peers wait for this rank."""
        try:
            return self._backend.turn(framework, stream, previous_event, async_finish)
        except Exception as error:
            if operation is not None:
                self._backend.reject(self._backend.turn(None, None, None, False), operation, error)
            raise

    # -- inspection ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise the first error that operations have recorded since the last call, such as dropped rows.

        Not collective. Does not wait for operations that are still running: on a GPU synchronize first to hear of all
        that were launched.

        Raises:
            CapacityError: rows were dropped.
            PeerError, RankMismatch: a call that waits for no counts was rejected by a rank; it moved no rows.
            PeerTimeout: ranks did not take part; the Buffer is broken.
        """
        with Entry(self, "check"):
            recorded, self._recorded = self._recorded, []
            if recorded:
                raise recorded[0]
            news = self._backend.news()
            if news is not None:
                raise news

    def _record_dropped(self, num_dropped: int, num_worst_tokens: int) -> None:
        self._recorded.append(
            CapacityError(
                "dispatch: num_worst_tokens",
                got=f"{num_worst_tokens + num_dropped} rows for rank {self.rank}, of which {num_dropped} were dropped",
                wanted=f"at most {num_worst_tokens}",
                do="raise num_worst_tokens",
            )
        )

    def barrier(self, *, stream: Any = None) -> None:
        """Bring all ranks together. Collective.

        On the host backend it returns when every rank has called. With CUDA it does not block the host: what is
        launched later in `stream` runs when every rank has come to its barrier. Not needed for correctness of any
        operation; for measurements, and before memory that peers use by other means.

        Args:
            stream: the stream that waits, as for `record_stream`; without one it is that of the Buffer
                (`get_comm_stream`). No meaning on the host backend.

        Raises:
            PeerTimeout: a rank did not come; with CUDA the next call or `check` raises it.
        """
        with Entry(self, "barrier"):
            turn = self._turn(None, None, stream)
            self._backend.barrier(turn)
            turn.finish(None)

    def record_stream(self, x: Any, stream: Any) -> None:
        """Say that `stream` uses a received array, so that its memory is not reused before that work is done.

        Not collective, does not block. Streams that are current when a result is handed out, and those that wait for
        its event, are noted without this call. On the host backend there is nothing to note beyond the check of `x`.

        Args:
            x: an array that this Buffer returned.
            stream: an int, an object with ``__cuda_stream__``, a torch or CuPy stream.

        Raises:
            DtypeError: `x` is no array.
            InputError: `stream` is none.
        """
        with Entry(self, "record_stream"):
            self._backend.record_stream(import_array(x, "x"), stream)

    def get_comm_stream(self) -> Any:
        """The communication stream, of torch if the program has imported one for GPUs, else of CuPy; None on the host
        backend."""
        stream = self._backend.comm_stream()
        if stream is None:
            return None
        torch = sys.modules.get("torch")
        keeper: Any = stream.keep
        if torch is None or not torch.cuda.is_available():
            return keeper
        return torch.cuda.ExternalStream(stream.ptr, device=keeper.device_id)

    def get_local_buffer_tensor(
        self, dtype: Any, size: Any = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Any:
        """A view of this rank's communication memory, as it is. Not collective, does not block.

        With CUDA it is the arena, in which outputs of dispatch lie; nobody keeps operations from writing there. On the
        host backend it is memory of the declared size that no operation uses.

        Args:
            dtype: element type, of torch (gives a torch tensor) or NumPy (gives a NumPy array).
            size: shape of the result; all elements from `offset` on by default.
            offset: first byte, a multiple of the element size.
            use_rdma_buffer: the `num_rdma_bytes` region instead of the `num_nvl_bytes` one.

        Raises:
            ShapeError: the region is too small.
        """
        with Entry(self, "get_local_buffer_tensor"):
            framework = "torch" if type(dtype).__module__ == "torch" else "numpy"
            element = numpy_dtype(dtype)
            num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            shape = ((num_bytes - offset) // element.itemsize,) if size is None else tuple(np.atleast_1d(size).tolist())
            wanted = int(np.prod(shape, dtype=np.int64)) * element.itemsize
            if offset < 0 or offset % element.itemsize or wanted < 0 or offset + wanted > num_bytes:
                raise ShapeError(
                    "get_local_buffer_tensor",
                    got=f"bytes {offset} to {offset + wanted}",
                    wanted=f"whole elements inside a region of {num_bytes} bytes",
                    do="construct the Buffer with more bytes",
                )
            arena = None if use_rdma_buffer else self._backend.local_buffer(offset, shape, element)
            if arena is not None:
                return export_any(arena, "cupy" if framework == "numpy" else framework, None)
            region = self._local_buffers.setdefault(use_rdma_buffer, empty((num_bytes,), np.uint8, fill=0))
            return export_array(region[offset : offset + wanted].view(element).reshape(shape), framework)

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the work submitted so far to the current stream. Not collective, does not block.

        The stream is that of the framework whose array this thread has last passed to a Buffer.
        """
        cuda = sys.modules.get("epcomm.backends.cuda")
        return EventOverlap() if cuda is None else cuda.capture_event()  # type: ignore[no-any-return]

    # -- end ----------------------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Release what this rank holds. Not collective, may be called again.

        Waits for no other rank; on CUDA for this rank's own kernels, whose waits for ranks are bounded. Arrays that
        were returned stay valid. Peers that are waiting for this rank raise PeerTimeout.
        """
        if not self._destroyed and self._num_forks == _num_forks:
            self._destroyed = True
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.destroy()
        except EpcommError as failure:
            if error is None:
                raise
            error.add_note(f"and then {failure}")  # what came first is the cause

    def __del__(self) -> None:
        # Nothing may wait, lock or call a driver here: this runs in any thread, at any time.
        if not getattr(self, "_destroyed", True) and self._num_forks == _num_forks:
            self._destroyed = True
            self._backend.drop(is_expected=not self._explicitly_destroy)
