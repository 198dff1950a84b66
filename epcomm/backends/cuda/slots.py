"""Slots of low-latency calls: whose turn it is, where they lie, and the combine buffers that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from epcomm.bootstrap import Communicator
from epcomm.config import NUM_LOW_LATENCY_SLOTS
from epcomm.errors import BufferStateError, InputError, RingFull
from epcomm.jit import Kernel, Program
from epcomm.kernels import low_latency_combine, low_latency_dispatch, low_latency_service
from epcomm.kernels.arguments import Arguments
from epcomm.kernels.layout import LOW_LATENCY_COMBINE, LOW_LATENCY_DISPATCH, MAX_RANKS
from epcomm.kernels.low_latency import THREADS, Area, Slot
from epcomm.memory import SymmetricMemory

__all__ = ["LowLatency", "LowLatencyLauncher", "Ring"]


class LowLatencyLauncher:
    """The low-latency kernels of one rank, and their launches; see `Launcher`."""

    def __init__(self, cubins: Mapping[Program, bytes], device: int, fixed: bytes) -> None:
        self._dispatch = Kernel(cubins[low_latency_dispatch.PROGRAM], low_latency_dispatch.ENTRY, device)
        self._combine = Kernel(cubins[low_latency_combine.PROGRAM], low_latency_combine.ENTRY, device)
        self._service = Kernel(cubins[low_latency_service.PROGRAM], low_latency_service.ENTRY, device)
        for kernel in (self._dispatch, self._combine):
            kernel.allow_shared(low_latency_dispatch.MAX_SHARED_BYTES)
        self._dispatch_arguments = Arguments(fixed, low_latency_dispatch.FIELDS)
        self._combine_arguments = Arguments(fixed, low_latency_combine.FIELDS)
        self._service_arguments = Arguments(fixed, low_latency_service.FIELDS)

    def dispatch(self, stream: int, blocks: int, shared_bytes: int, *fields: int) -> None:
        self._dispatch.launch(blocks, THREADS, shared_bytes, stream, self._dispatch_arguments.fill(*fields))

    def combine(self, stream: int, blocks: int, *fields: int) -> None:
        self._combine.launch(blocks, THREADS, 0, stream, self._combine_arguments.fill(*fields))

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
        fields = self._service_arguments.fill(operation, leaves_late, mask, unmask, masks, sequences, *resume)
        self._service.launch(1, low_latency_service.THREADS, 0, stream, fields)


class Ring:
    """The slots of one low-latency operation: calls take them in turn, in the same order on all ranks.

    Args:
        name: of the operation.
        operation: its number, in slot 0.
    """

    def __init__(self, name: str, operation: int) -> None:
        self.name, self.operation = name, operation
        self._next = self._num_taken = 0
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

    def pass_over(self, slot: int) -> None:
        """A call has sent and received in `slot`, the next one."""
        self._next = (slot + 1) % NUM_LOW_LATENCY_SLOTS

    def take(self, slot: int) -> int:
        """A call has only sent in `slot`, the next one; its number for `give_back`."""
        self.pass_over(slot)
        self._num_taken += 1
        self._taken[slot] = self._num_taken
        return self._num_taken

    def give_back(self, slot: int, number: int) -> None:
        """The send `number` is received.

        Raises:
            BufferStateError: it was forgotten.
        """
        if self._taken[slot] != number:
            raise BufferStateError(
                self.name, got="the hook of a send from before low_latency_clean_mask_buffer", do="send again"
            )
        self._taken[slot] = 0

    def forget(self) -> None:
        """Start anew; what was sent is not received any more."""
        self._next = 0
        self._taken = [0] * NUM_LOW_LATENCY_SLOTS


class LowLatency:
    """What low-latency operations of one rank have beside its `Job`.

    Args:
        comm: the ranks.
        device: CUDA device number.
        area: the part of each rank's region that they use.
        launch: the kernels.
        masks_on_timeout: ranks that do not come in time are masked.
        timeout_s: bound of the host's waits.
    """

    def __init__(
        self,
        comm: Communicator,
        device: int,
        area: Area,
        launch: LowLatencyLauncher,
        masks_on_timeout: bool,
        timeout_s: float,
    ) -> None:
        self.area, self.launch = area, launch
        self.dispatches = Ring("low_latency_dispatch", LOW_LATENCY_DISPATCH)
        self.combines = Ring("low_latency_combine", LOW_LATENCY_COMBINE)
        self._comm, self._device, self._timeout_s = comm, device, timeout_s
        self.masks_on_timeout = masks_on_timeout
        self._buffers: list[SymmetricMemory] = []  # the last one is in use; graphs have the addresses of the others
        self._buffer_bytes = 0

    def slot_fields(self, ring: Ring, slot: int, halves: int, is_rejected: bool = False) -> tuple[int, ...]:
        """The fields of `kernels.low_latency.SLOT`, but for the last one."""
        lies: Slot = self.area.dispatch_slot(slot) if ring is self.dispatches else self.area.combine_slot(slot)
        return (*lies, ring.operation + slot, halves, is_rejected, self.masks_on_timeout)

    def combine_addresses(self, slot: int) -> list[int]:
        """By rank: address of its combine buffer of `slot`, 0 if there is none."""
        if not self._buffers:
            return [0] * MAX_RANKS
        bases = [base + slot * self._buffer_bytes for base in self._buffers[-1].bases]
        return [*bases, *[0] * (MAX_RANKS - len(bases))]

    def combine_buffer(self, stream: int, is_captured: bool, num_bytes: int) -> int:
        """Address of the combine buffer of the next combine; later work in the stream may write there.

        Allocates where there is none of that size; then collective, blocks the host.
        """
        slot = self.combines.next_slot()
        if num_bytes > self._buffer_bytes:
            if is_captured:
                raise InputError(
                    "get_next_low_latency_combine_buffer",
                    got="the first call of this size, in a stream under capture",
                    wanted="buffers that were allocated before",
                    do="call it once for the largest handle before the capture",
                )
            self._buffers.append(
                SymmetricMemory(self._comm, NUM_LOW_LATENCY_SLOTS * num_bytes, self._device, timeout_s=self._timeout_s)
            )
            self._buffer_bytes = num_bytes
        self.launch.service(stream, operation=self.combines.operation + slot, leaves_late=self.masks_on_timeout)
        return self.combine_addresses(slot)[self._comm.rank]

    def resume(self, stream: int, sequences: Sequence[int], ranks: Sequence[int]) -> None:
        """Forget all calls so far and the masks of `ranks`; the calls after `sequences`, by slot, are next.

        Every rank does this when no rank runs anything else.
        """
        self.launch.service(stream, unmask=sum(1 << rank for rank in set(ranks)), resume=sequences)
        self.dispatches.forget()
        self.combines.forget()

    def close(self) -> None:
        """Unmap the combine buffers. Local."""
        for memory in self._buffers:
            memory.close()
