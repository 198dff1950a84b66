"""One call of a Buffer on the GPU: its stream, its arguments in, its results out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArraySpec, ArrayView, array_spec, cupy_array, device_array, to_host
from epcomm.arrays.streams import order
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.streams import StreamEvent
from epcomm.dlpack import CUDA
from epcomm.errors import InputError
from epcomm.event import EventOverlap
from epcomm.kernels.layout import UNIT, round_up
from epcomm.memory import Block

__all__ = ["BlockLayout", "CudaTurn", "output_spec"]

_HIDES_STREAM = ("jax", "dlpack")  # frameworks that do not know that we read their memory


def output_spec(
    shape: tuple[int, ...], dtype: np.dtype[Any], device: int, strides: tuple[int, ...] | None = None
) -> ArraySpec:
    """What an output looks like; row-major unless there are strides, in elements."""
    return array_spec("", shape, strides, dtype, (CUDA, device))


class BlockLayout:
    """Outputs that share a block. Made once for all calls that are alike.

    Attributes:
        places: of each output, where it starts in the block, a multiple of `UNIT`, and what it looks like.
        num_bytes: of the block.
    """

    def __init__(self, *specs: ArraySpec) -> None:
        self.places: list[tuple[int, ArraySpec]] = []
        self.num_bytes = 0
        for spec in specs:
            offset = round_up(self.num_bytes, UNIT)
            self.places.append((offset, spec))
            self.num_bytes = offset + spec.num_bytes


class CudaTurn:
    """See `epcomm.backends.protocol.Turn`.

    Attributes:
        has_entered: whether the peers count on this call; set by the operation.
        is_captured: whether the call becomes part of a graph.
        capture: number of the capture that the stream is in, -1 if nobody knows, 0 if there is none.

    Args:
        job: this rank's part.
        framework: of the input; None if it is no array.
        stream: what the caller passed.
        previous_event: what to wait for first.
        async_finish: the caller's stream goes on.
    """

    __slots__ = (
        "_blocks",
        "_callers",
        "_framework",
        "_hides_end",
        "_is_async",
        "_is_in_line",
        "_job",
        "_keeps_inputs",
        "capture",
        "has_entered",
        "is_captured",
        "place",
        "ref",
        "stream",
    )

    def __init__(
        self, job: Job, framework: str | None, stream: Any, previous_event: EventOverlap | None, async_finish: bool
    ) -> None:
        streams = job.streams
        self._job, self.place, self._framework, self._is_async = job, job.device, framework or "dlpack", async_finish
        callers = run = streams.of_caller(framework, stream)
        if run is None or streams.runs_in_own(run, async_finish):
            run = streams.own
        self._callers, self.ref, self.stream = callers, run, run.ptr
        # The framework of the results goes on in the stream of the call: there is nothing to order.
        self._is_in_line = callers is run and stream is None
        if callers is not run or previous_event is not None:
            self._wait_for(previous_event)
        self.is_captured = streams.enter(run)
        self.capture = job.timeline.capture_of(self.stream) if self.is_captured else 0
        self.has_entered = self._hides_end = self._keeps_inputs = False
        self._blocks: list[Block] = []

    def _wait_for(self, previous: EventOverlap | None) -> None:
        if previous is not None and isinstance(previous.event, StreamEvent):
            previous.event.wait_in(self.stream, self.ref.keep)
            return
        if previous is not None:
            previous.current_stream_wait()
        if self._callers is not None:
            order(self._callers.ptr, self.stream, self.place)

    # -- arguments ------------------------------------------------------------------------------------------------

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
                    view.owner.pin(self.capture)

    # -- results --------------------------------------------------------------------------------------------------

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        """A new output outside of the arena."""
        spec = output_spec(shape, dtype, self.place)
        block = self._new_block(spec.num_bytes)
        return ArrayView(spec, block.ptr, block)

    def new_arrays(self, layout: BlockLayout) -> list[ArrayView]:
        """New outputs in one block, outside of the arena."""
        block = self._new_block(layout.num_bytes)
        ptr = block.ptr
        return [ArrayView(spec, ptr + offset, block) for offset, spec in layout.places]

    def _new_block(self, num_bytes: int) -> Block:
        block = self._job.outputs.allocate(num_bytes, self.stream, is_captured=self.is_captured)
        assert block is not None  # that pool grows
        self.own(block)
        return block

    def own(self, block: Block) -> None:
        """Outputs of this call lie in `block`."""
        self._blocks.append(block)
        block.note_reader(*self.ref)

    def use_outputs_of(self, earlier: CudaTurn) -> None:
        """This call fills what `earlier` has allocated."""
        for block in earlier._blocks:
            block.note_reader(*self.ref)
        self._hides_end = self._framework in _HIDES_STREAM  # its arrays were handed out before
        self._keeps_inputs = earlier.stream != self.stream  # their framework expects them to be free sooner

    def export(self, array: ArrayView, framework: str) -> Any:
        """`array` as one of `framework`; its stream waits for this call, unless the caller has asked to go on."""
        if self._is_in_line and framework == self._framework == "cupy":
            return cupy_array(array)
        if framework in _HIDES_STREAM:
            ready: int | None = self.stream
        else:
            ready = None if self._is_async or self._callers is None else self._callers.ptr
        return device_array(framework, array, ready)

    def finish(self, inputs: object) -> EventOverlap:
        """The call is launched: order the caller's stream behind it, or make the event by which the caller does."""
        if self._hides_end:
            self._job.runtime.streamSynchronize(self.stream)
        if self._is_async:
            event = StreamEvent(self.stream, self._framework, self.place, self.is_captured, self._blocks)
            if not self.is_captured:  # who replays a graph keeps its inputs
                self._job.streams.keep_until(event, inputs)
            return EventOverlap(event)
        if self._callers is None or self._framework in _HIDES_STREAM or self._keeps_inputs:
            event = StreamEvent(self.stream, self._framework, self.place, self.is_captured)
            self._job.streams.keep_until(event, inputs)
        if self._callers is not None and self._callers is not self.ref:
            order(self.stream, self._callers.ptr, self.place)
        return EventOverlap()
