"""One call of a Buffer on the GPU: its stream, its arguments in, its results out."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArrayView, StreamRef, array_spec, device_array, require, to_host
from epcomm.arrays.streams import order
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.streams import StreamEvent
from epcomm.dlpack import CUDA
from epcomm.errors import InputError
from epcomm.event import EventOverlap
from epcomm.memory import Block

__all__ = ["CudaTurn", "output"]

_HIDES_STREAM = ("jax", "dlpack")  # frameworks that do not know that we read their memory


class CudaTurn:
    """See `epcomm.backends.protocol.Turn`.

    Attributes:
        has_entered: whether the peers count on this call; set by the operation.

    Args:
        job: this rank's part.
        framework: of the input; None if it is no array.
        stream: what the caller passed.
        previous_event: what to wait for first.
        async_finish: the caller's stream goes on.
    """

    device = "cuda"

    def __init__(
        self, job: Job, framework: str | None, stream: Any, previous_event: EventOverlap | None, async_finish: bool
    ) -> None:
        streams = job.streams
        self._job, self._framework = job, framework or "dlpack"
        self._callers, keep = streams.callers(framework, stream)
        self._is_async = async_finish
        if streams.runs_in_own(self._callers, async_finish):
            self.stream, keep = streams.own, None
        else:
            assert self._callers is not None
            self.stream = self._callers
        self.ref = StreamRef(self.stream, streams.keeper if self.stream == streams.own else keep)
        self._wait_for(previous_event)
        self.is_captured = streams.enter(self.stream, keep)
        self.has_entered = False  # peers know of this call
        self._blocks: list[Block] = []
        self._hides_end = self._keeps_inputs = False

    def _wait_for(self, previous: EventOverlap | None) -> None:
        if previous is not None and isinstance(previous.event, StreamEvent):
            previous.event.wait_in(self.stream, self.ref.keep)
            return
        if previous is not None:
            previous.current_stream_wait()
        if self._callers is not None and self._callers != self.stream:
            order(self._callers, self.stream, self._job.device)

    # -- arguments ------------------------------------------------------------------------------------------------

    def check(self, view: ArrayView, name: str, **demands: Any) -> None:
        """`require` on this rank's GPU."""
        require(view.spec, name, place=self._job.device, **demands)

    def take(self, view: ArrayView) -> ArrayView:
        return view

    def values(self, view: ArrayView) -> NDArray[Any] | None:
        return None

    def checked_values(self, view: ArrayView) -> NDArray[Any]:
        if self.is_captured:
            raise InputError(
                "EPCOMM_CHECK",
                got="a stream under capture",
                wanted="one that runs, to read the values of an array",
                do="unset it to capture",
            )
        return to_host(view, self.stream)

    def pin(self, *views: ArrayView) -> None:
        """A captured call has the addresses of these arrays of a handle: their memory is not used again."""
        if self.is_captured:
            for view in views:
                if isinstance(view.owner, Block):
                    view.owner.pin(self._job.timeline.capture_of(self.stream))

    # -- results --------------------------------------------------------------------------------------------------

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        """A new output outside of the arena."""
        num_bytes = dtype.itemsize
        for extent in shape:
            num_bytes *= extent
        block = self._job.outputs.allocate(num_bytes, self.stream, is_captured=self.is_captured)
        assert block is not None  # that pool grows
        return self.over(block, 0, shape, dtype)

    def transposed(self, array: ArrayView) -> ArrayView:
        """The same memory with its last two axes exchanged."""
        *rest, rows, columns = array.shape
        *steps, row_step, column_step = array.strides
        spec = array_spec(
            "", (*rest, columns, rows), (*steps, column_step, row_step), array.dtype, (CUDA, self._job.device)
        )
        return ArrayView(spec, array.ptr, array.owner)

    def use_outputs_of(self, earlier: CudaTurn) -> None:
        """This call fills what `earlier` has allocated."""
        for block in earlier._blocks:
            block.note_reader(self.stream, self.ref.keep)
        self._hides_end = self._framework in _HIDES_STREAM  # its arrays were handed out before
        self._keeps_inputs = earlier.stream != self.stream  # their framework expects them to be free sooner

    def over(self, block: Block, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        """An output in `block`, which it keeps alive."""
        if block not in self._blocks:
            self._blocks.append(block)
            block.note_reader(self.stream, self.ref.keep)
        return output(block, offset, shape, dtype, self._job.device)

    def export(self, array: ArrayView, framework: str) -> Any:
        """`array` as one of `framework`; its stream waits for this call, unless the caller has asked to go on."""
        if framework in _HIDES_STREAM:
            ready: int | None = self.stream
        else:
            ready = None if self._is_async else self._callers
        return device_array(framework, array, ready)

    def finish(self, inputs: object) -> EventOverlap:
        """The call is launched: order the caller's stream behind it, or make the event by which the caller does."""
        if self._hides_end:
            self._job.runtime.streamSynchronize(self.stream)
        if self._is_async:
            event = StreamEvent(self.stream, self._framework, self._job.device, self._blocks)
            if not self.is_captured:  # who replays a graph keeps its inputs
                self._job.streams.keep_until(event, inputs)
            return EventOverlap(event)
        if self._callers is None or self._framework in _HIDES_STREAM or self._keeps_inputs:
            event = StreamEvent(self.stream, self._framework, self._job.device)
            self._job.streams.keep_until(event, inputs)
        if self._callers is not None and self._callers != self.stream:
            order(self.stream, self._callers, self._job.device)
        return EventOverlap()


class _Memory(Protocol):
    @property
    def ptr(self) -> int: ...


def output(block: _Memory, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> ArrayView:
    """A row-major array in `block`, which it keeps alive."""
    return ArrayView(array_spec("", shape, None, dtype, (CUDA, device)), block.ptr + offset, block)
