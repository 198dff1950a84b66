"""Slots of low-latency calls: whose turn it is, where they lie, and the combine buffers that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from epcomm.backends.cuda.regions import Regions
from epcomm.config import NUM_LOW_LATENCY_SLOTS
from epcomm.errors import BufferStateError, InputError, RingFull
from epcomm.jit import Kernel, Program
from epcomm.kernels import low_latency_combine, low_latency_dispatch, low_latency_service, over_network
from epcomm.kernels.arguments import Arguments
from epcomm.kernels.layout import LOW_LATENCY_COMBINE, LOW_LATENCY_DISPATCH, MAX_RANKS
from epcomm.kernels.low_latency import THREADS, Slot

__all__ = ["LowLatency", "LowLatencyLauncher", "Ring"]


class LowLatencyLauncher:
    """The low-latency kernels of one rank, and their launches; see `Launcher`.

    Attributes:
        modules: those of the kernels.
    """

    def __init__(self, cubins: Mapping[Program, bytes], device: int, has_network: bool, fixed: bytes) -> None:
        def kernel(program: Program, entry: str) -> Kernel:
            return Kernel(cubins[over_network(program) if has_network else program], entry, device, overlaps=True)

        self._dispatch = {
            use_fp8: kernel(program, low_latency_dispatch.ENTRY)
            for use_fp8, program in low_latency_dispatch.PROGRAMS.items()
        }
        self._combine = {
            payload: kernel(program, low_latency_combine.ENTRY)
            for payload, program in low_latency_combine.PROGRAMS.items()
        }
        self._service = kernel(low_latency_service.PROGRAM, low_latency_service.ENTRY)
        self.modules = [one.module for one in (*self._dispatch.values(), *self._combine.values(), self._service)]
        for dispatch in self._dispatch.values():
            dispatch.allow_shared(low_latency_dispatch.MAX_SHARED_BYTES)
        for combine in self._combine.values():
            combine.allow_shared(low_latency_combine.MAX_SHARED_BYTES)
        self._dispatch_arguments = Arguments(fixed, low_latency_dispatch.FIELDS)
        self._combine_arguments = Arguments(fixed, low_latency_combine.FIELDS)
        self._service_arguments = Arguments(fixed, low_latency_service.FIELDS)

    def dispatch(self, stream: int, use_fp8: bool, blocks: int, shared_bytes: int, fields: Sequence[int]) -> None:
        self._dispatch[use_fp8].launch(blocks, THREADS, shared_bytes, stream, self._dispatch_arguments.fill(fields))

    def combine(self, stream: int, payload: int, blocks: int, shared_bytes: int, fields: Sequence[int]) -> None:
        self._combine[payload].launch(blocks, THREADS, shared_bytes, stream, self._combine_arguments.fill(fields))

    def service(
        self,
        stream: int,
        *,
        operation: int = 0,
        leaves_late: bool = False,
        mask: int = 0,
        unmask: int = 0,
        masks: int = 0,
        sequences: int = 0,
        resume: Sequence[int] = (0,) * (2 * NUM_LOW_LATENCY_SLOTS),
    ) -> None:
        """Arguments: the fields of the kernel's, by name."""
        fields = (operation, leaves_late, mask, unmask, masks, sequences, *resume)
        self._service.launch(1, low_latency_service.THREADS, 0, stream, self._service_arguments.fill(fields))


class Ring:
    """The slots of one low-latency operation: calls take them in turn, in the same order on all ranks.

    Args:
        name: of the operation.
        operation: its number, in slot 0.
        slots: where they lie.
    """

    def __init__(self, name: str, operation: int, slots: Sequence[Slot]) -> None:
        self.name, self.operation, self.slots = name, operation, slots
        self.forget()

    def forget(self) -> None:
        """Start anew; what was sent is not received any more."""
        self._next = self._num_calls = self._last_received = 0
        self._taken = [0] * NUM_LOW_LATENCY_SLOTS  # by slot: number of the send that nobody has received, or 0

    def next_slot(self) -> int:
        """The slot of the next call.

        Raises:
            RingFull: what was sent last in it was not received.
        """
        if self._taken[self._next]:
            raise RingFull(
                self.name,
                got=f"{sum(map(bool, self._taken))} sends whose receive half has not run",
                do="call the hook of an earlier send first",
            )
        return self._next

    @property
    def next_number(self) -> int:
        """The number of the next call, from 1; the same on all ranks."""
        return self._num_calls + 1

    def pass_over(self, slot: int) -> None:
        """A call has sent and received in `slot`, the next one."""
        self._next = (slot + 1) % NUM_LOW_LATENCY_SLOTS
        self._num_calls = self._last_received = self._num_calls + 1

    def take(self, slot: int) -> int:
        """A call has only sent in `slot`, the next one; its number."""
        self._next = (slot + 1) % NUM_LOW_LATENCY_SLOTS
        self._num_calls += 1
        self._taken[slot] = self._num_calls
        return self._num_calls

    def give_back(self, slot: int, number: int) -> bool:
        """The send `number` is received; whether a later one was received before it.

        Raises:
            BufferStateError: it was forgotten.
        """
        if self._taken[slot] != number:
            raise BufferStateError(
                self.name, got="the hook of a send from before low_latency_clean_mask_buffer", do="send again"
            )
        self._taken[slot] = 0
        is_overtaken = number < self._last_received
        self._last_received = max(self._last_received, number)
        return is_overtaken


class Pulls:
    """Which combine buffers no peer reads any more, as far as the host can know.

    Ranks launch their calls in the same order. A combine that sends and receives in one launch, which all ranks do
    alike, has pulled its rows when a later call is sent. So peers are through with the buffer of such a combine once a
    call that was sent later has been received from all of them. Replays of graphs are not seen here: inside a capture
    only its own calls count, and outside nothing is known any more after a capture.
    """

    def __init__(self) -> None:
        self._has_captured = False
        self._num_sends = 0
        self.forget()

    def forget(self) -> None:
        """Nothing is known of earlier calls."""
        # By slot: capture and number of its last combine; None: of that one nothing is known.
        self._combines: list[tuple[int, int] | None] = [None] * NUM_LOW_LATENCY_SLOTS
        self._is_over = [False] * NUM_LOW_LATENCY_SLOTS

    def note_send(self, capture: int) -> int:
        """A call is sent, `capture` as in `CudaTurn`; its number among those of both operations."""
        self._has_captured |= capture != 0
        self._num_sends += 1
        return self._num_sends

    def note_combine(self, slot: int, number: int, capture: int, *, is_postponed: bool) -> None:
        """The send `number` is a combine."""
        self._combines[slot] = None if is_postponed else (capture, number)
        self._is_over[slot] = False

    def note_received(self, number: int, capture: int) -> None:
        """The send `number` is received in a call under `capture`."""
        self._has_captured |= capture != 0
        for slot, combine in enumerate(self._combines):
            if combine is not None and combine[0] == capture and combine[1] < number:
                self._is_over[slot] = True

    def are_over(self, slot: int, capture: int) -> bool:
        """Whether a call under `capture` may write to the buffer of `slot` without asking the peers."""
        combine, is_known = self._combines[slot], capture > 0 or (capture == 0 and not self._has_captured)
        return is_known and combine is not None and combine[0] == capture and self._is_over[slot]


class LowLatency:
    """What low-latency operations of one rank have beside its `Job`.

    Args:
        regions: the ranks' memory.
        rank: this rank.
        launch: the kernels.
        masks_on_timeout: ranks that do not come in time are masked.

    Attributes:
        area: the part of each rank's memory that they use.
    """

    def __init__(self, regions: Regions, rank: int, launch: LowLatencyLauncher, masks_on_timeout: bool) -> None:
        self.area, self.launch = regions.low_latency, launch
        area = self.area
        slots = range(NUM_LOW_LATENCY_SLOTS)
        self.dispatches = Ring("low_latency_dispatch", LOW_LATENCY_DISPATCH, [*map(area.dispatch_slot, slots)])
        self.combines = Ring("low_latency_combine", LOW_LATENCY_COMBINE, [*map(area.combine_slot, slots)])
        self.pulls = Pulls()
        self._regions, self._rank = regions, rank
        self.masks_on_timeout = masks_on_timeout
        self._buffer_bytes = 0
        # By slot and rank: address of the combine buffer, 0 if there is none within reach. Calls keep the lists.
        self.combine_addresses = [[0] * MAX_RANKS for _ in slots]

    def slot_fields(self, ring: Ring, slot: int, halves: int, is_rejected: bool = False) -> tuple[int, ...]:
        """The fields of `kernels.low_latency.SLOT`, but for what ranks compare."""
        return (*ring.slots[slot], ring.operation + slot, halves, is_rejected, self.masks_on_timeout)

    def combine_buffer(self, stream: int, capture: int, num_bytes: int) -> int:
        """Address of the combine buffer of the next combine; later work in the stream may write there.

        Allocates where there is none of that size; then collective, blocks the host. `capture` as in `CudaTurn`.
        """
        slot = self.combines.next_slot()
        if num_bytes > self._buffer_bytes:
            if capture:
                raise InputError(
                    "get_next_low_latency_combine_buffer",
                    got="the first call of this size, in a stream under capture",
                    wanted="buffers that were allocated before",
                    do="call it once for the largest handle before the capture",
                )
            total = NUM_LOW_LATENCY_SLOTS * num_bytes
            bases = self._regions.share(total)  # graphs have the addresses of earlier ones: they stay
            self._buffer_bytes = num_bytes
            nobody = [0] * (MAX_RANKS - len(bases))
            self.combine_addresses = [
                [*[base and base + index * num_bytes for base in bases], *nobody]
                for index in range(NUM_LOW_LATENCY_SLOTS)
            ]
        if not self.pulls.are_over(slot, capture):
            self.launch.service(stream, operation=self.combines.operation + slot, leaves_late=self.masks_on_timeout)
        return self.combine_addresses[slot][self._rank]

    def resume(self, stream: int, sequences: Sequence[int], ranks: Sequence[int]) -> None:
        """Forget all calls so far and the masks of `ranks`; the calls after `sequences`, by slot, are next.

        Every rank does this when no rank runs anything else.
        """
        self.launch.service(stream, unmask=sum(1 << rank for rank in set(ranks)), resume=sequences)
        self.dispatches.forget()
        self.combines.forget()
        self.pulls.forget()
