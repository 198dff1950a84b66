"""The loaded kernels of one rank, and their launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from epcomm.errors import CapacityError
from epcomm.jit import Kernel, Program, max_shared_bytes
from epcomm.kernels import (
    barrier,
    combine,
    dispatch,
    dispatch_layout,
    exchange,
    internode_combine,
    internode_dispatch,
    over_network,
)
from epcomm.kernels.arguments import Arguments
from epcomm.kernels.layout import UNIT
from epcomm.kernels.rows import stage_memory

__all__ = ["SCRATCH_BYTES", "Launcher"]

SCRATCH_BYTES = 1 << 20  # of the layout kernel
_MAX_LAYOUT_BYTES = 48 * 1024


class _Shape(Protocol):
    @property
    def threads(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...


class Launcher:
    """Loads all kernels. Local; may block the host for some milliseconds.

    The caller's thread has the device current, here and in all launches, none of which blocks the host.

    Args:
        cubins: by program, for this GPU.
        architecture: of this GPU, as for `epcomm.jit.compile_program`.
        device: its CUDA device number.
        has_nodes: dispatch and combine are those of several nodes; their `fields` and shapes, too.
        has_network: other nodes are reached through NVSHMEM.
        scratch: address of `SCRATCH_BYTES` of device memory, zero.

    Attributes:
        stage_memory: shared memory of a block through which the copy engine moves rows; 0: there is none.
        modules: those of its kernels that talk to other ranks.

    Raises:
        CompileError, CapacityError: a kernel cannot run on this GPU.
    """

    def __init__(
        self,
        cubins: Mapping[Program, bytes],
        architecture: str,
        device: int,
        has_nodes: bool,
        has_network: bool,
        scratch: int,
    ) -> None:
        def kernel(program: Program, entry: str) -> Kernel:
            return Kernel(cubins[over_network(program) if has_network else program], entry, device)

        self._layout = Kernel(cubins[dispatch_layout.PROGRAM], dispatch_layout.ENTRY, device)
        self._exchange = kernel(exchange.PROGRAM, exchange.ENTRY)
        self._barrier = kernel(barrier.PROGRAM, barrier.ENTRY)
        move, reduce = (internode_dispatch, internode_combine) if has_nodes else (dispatch, combine)
        self._dispatch = kernel(move.PROGRAM, move.ENTRY)
        self._combine = {dtype: kernel(program, reduce.ENTRY) for dtype, program in reduce.PROGRAMS.items()}
        collective = (self._exchange, self._barrier, self._dispatch, *self._combine.values())
        self.modules = [one.module for one in collective]
        self._dispatch_fields, self._combine_fields = move.FIELDS, reduce.FIELDS
        self.stage_memory = stage_memory(max_shared_bytes(device), architecture)
        if self.stage_memory:
            for moving in (self._dispatch, *self._combine.values()):
                moving.allow_shared(self.stage_memory)
        self._scratch = scratch
        self._layout_arguments = Arguments(b"", dispatch_layout.FIELDS)

    def set_comm(self, fixed: bytes) -> None:
        """`fixed`, of `comm_bytes`, starts the arguments of all collective kernels from now on."""
        self._exchange_arguments = Arguments(fixed, exchange.FIELDS)
        self._dispatch_arguments = Arguments(fixed, self._dispatch_fields)
        self._combine_arguments = Arguments(fixed, self._combine_fields)
        self._barrier_arguments = Arguments(fixed, barrier.FIELDS)

    def layout(self, stream: int, num_tokens: int, num_counts: int, fields: Sequence[int]) -> None:
        """`fields`: those of `dispatch_layout.FIELDS` before and after ``partial, ticket``."""
        if num_counts * 4 > _MAX_LAYOUT_BYTES:
            raise CapacityError(
                "num_experts", got=f"{num_counts} counts", wanted=f"at most {_MAX_LAYOUT_BYTES // 4} experts and ranks"
            )
        blocks = min(dispatch_layout.num_blocks(num_tokens), (SCRATCH_BYTES - UNIT) // (4 * num_counts))
        arguments = self._layout_arguments.fill((*fields[:5], self._scratch + UNIT, self._scratch, *fields[5:]))
        self._layout.launch(blocks, dispatch_layout.THREADS, 4 * num_counts, stream, arguments)

    def exchange(self, stream: int, fields: Sequence[int]) -> None:
        self._exchange.launch(1, exchange.THREADS, 0, stream, self._exchange_arguments.fill(fields))

    def dispatch(self, stream: int, blocks: int, shape: _Shape, fields: Sequence[int]) -> None:
        arguments = self._dispatch_arguments.fill(fields)
        self._dispatch.launch(blocks, shape.threads, shape.shared_bytes, stream, arguments)

    def combine(self, stream: int, dtype: str, blocks: int, shape: _Shape, fields: Sequence[int]) -> None:
        arguments = self._combine_arguments.fill(fields)
        self._combine[dtype].launch(blocks, shape.threads, shape.shared_bytes, stream, arguments)

    def barrier(self, stream: int) -> None:
        self._barrier.launch(1, barrier.THREADS, 0, stream, self._barrier_arguments.fill(()))
