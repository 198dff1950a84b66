"""The move of a dispatch: the kernel that brings rows to their outputs, on one node or on several."""

from __future__ import annotations

from typing import NamedTuple

from epcomm.arrays import ArraySpec, array_spec
from epcomm.backends.agreement import dispatch_payload, values_with_handle
from epcomm.backends.cuda.job import Job
from epcomm.backends.cuda.outputs import Outputs, Sizes
from epcomm.backends.cuda.turn import CudaTurn
from epcomm.backends.protocol import DispatchRequest
from epcomm.dlpack import CUDA
from epcomm.kernels import dispatch as kernel
from epcomm.kernels import internode_dispatch as internode
from epcomm.kernels.layout import NO_BLOCK, NUM_ENTRY_AGREED, REJECTED
from epcomm.numerics import BFLOAT16

__all__ = ["MovePlan", "Route", "move_plan", "reject_move"]

_NOTHING = (0,) * NUM_ENTRY_AGREED
_NO_ROWS = array_spec("", (0, 8), None, BFLOAT16, (CUDA, 0))


class Route(NamedTuple):
    """What a move goes by: that of its dispatch, or of its handle.

    Attributes:
        send_pos: address of int32 ``[T, R]``.
        prefix: address of int32 ``[R, R]``.
        node_counts: address of int32 ``[num_nodes]``, to which the move adds; 0: it does not.
        dispatch_id: number of the dispatch.
    """

    send_pos: int
    prefix: int
    node_counts: int
    dispatch_id: int


class _Move(NamedTuple):
    """One move: what its kernel is told besides what its plan says.

    Attributes:
        is_windowed, has_metadata: as in `Outputs`.
        entry: what the rank enters with.
        arrays: addresses of x and scales, strides of the scales, addresses of topk_idx, topk_weights, send_pos, prefix.
        addresses: of the outputs.
        node_counts: as in `Route`.
        flags: num_worst_tokens, is_forced, has_weights.
    """

    is_windowed: bool
    has_metadata: bool
    entry: tuple[int, ...]
    arrays: tuple[int, ...]
    addresses: tuple[int, ...]
    node_counts: int
    flags: tuple[int, bool, bool]


class MovePlan:
    """What a move on one node needs apart from addresses and numbers of rows. Made once for all that are alike.

    Attributes:
        sizes: of the rows.

    Raises:
        CapacityError: the window has no room for a row.
    """

    def __init__(
        self,
        job: Job,
        x: ArraySpec,
        scales: ArraySpec | None,
        topk_idx: ArraySpec | None,
        topk_weights: ArraySpec | None,
        num_experts: int,
        num_sms: int,
    ) -> None:
        self.sizes = sizes = Sizes.of(x, scales, topk_idx, topk_weights)
        self._blocks = job.placement.blocks(num_sms)
        self._payload = dispatch_payload(x, scales)
        self._strides = (0, 0) if scales is None else (*scales.strides, 0)[:2]
        num_local = num_experts // job.size
        self._beside = (sizes.num_scales, sizes.scale_bytes, sizes.num_topk, sizes.index_bytes, num_local)
        self._prepare(job)

    def launch(
        self, job: Job, turn: CudaTurn, request: DispatchRequest, outputs: Outputs, route: Route, is_forced: bool
    ) -> None:
        """Launch the move. Unless it is forced, the last exchange says whether it moves anything."""
        scales, topk_idx, weights = request.scales, request.topk_idx, request.topk_weights
        agreed = values_with_handle(self._payload, route.dispatch_id, request.config)
        move = _Move(
            is_windowed=outputs.is_windowed,
            has_metadata=outputs.has_metadata,
            entry=(*outputs.offsets, self.sizes.num_tokens, 0, *agreed, *_NOTHING[len(agreed) :]),
            arrays=(
                request.x.ptr,
                0 if scales is None else scales.ptr,
                *self._strides,
                0 if topk_idx is None else topk_idx.ptr,
                0 if weights is None else weights.ptr,
                route.send_pos,
                route.prefix,
            ),
            addresses=outputs.addresses,
            node_counts=route.node_counts,
            flags=(request.num_worst_tokens, is_forced, self.sizes.has_weights),
        )
        self._launch(job, turn, move)

    def reject(self, job: Job, turn: CudaTurn) -> None:
        """Enter the move only to say that this rank cannot take part."""
        entry = (REJECTED, NO_BLOCK, 0, 0, *_NOTHING)
        self._launch(job, turn, _Move(False, False, entry, (0,) * 8, (0,) * 5, 0, (0, True, False)))

    def _prepare(self, job: Job) -> None:
        slot = self.sizes.slot
        self._window, self._slot_fields = job.window.cut(slot.num_bytes), slot.fields
        blocks_on_gpu = self._blocks * job.placement.ranks_on_gpu
        self._shapes = [
            kernel.shape(self.sizes.row_bytes, job.launch.stage_memory, blocks_on_gpu, is_windowed)
            for is_windowed in (False, True)
        ]

    def _launch(self, job: Job, turn: CudaTurn, move: _Move) -> None:
        shape = self._shapes[move.is_windowed]
        fields = (
            *self._window,
            *move.entry,
            *self._slot_fields,
            *move.arrays,
            *move.addresses,
            *shape.pieces,
            shape.pieces.piece_bytes,
            *self._beside,
            *move.flags,
        )
        job.launch.dispatch(turn.stream, self._blocks, shape, fields)


class InternodeMovePlan(MovePlan):
    """The same on several nodes.

    Raises:
        CapacityError: the rings have no room for a message.
    """

    def _prepare(self, job: Job) -> None:
        assert job.rings is not None
        assert job.handover is not None
        sizes, per_node = self.sizes, job.ranks_per_node
        blocks_on_gpu = self._blocks * job.placement.ranks_on_gpu
        terms = (sizes.row_bytes, job.num_nodes, job.launch.stage_memory, blocks_on_gpu, job.rings.is_staged)
        self._node_shapes = [internode.shape(*terms, is_windowed) for is_windowed in (False, True)]
        scales_bytes, topk_bytes = sizes.num_scales * sizes.scale_bytes, sizes.num_topk * sizes.index_bytes
        beside = internode.beside(per_node, scales_bytes, topk_bytes, sizes.num_topk * 4 if sizes.has_weights else 0)
        is_staged = job.rings.is_staged
        rows = internode.rows(sizes.row_bytes, is_staged)
        while rows.unit_tokens > 1 and not job.rings.has_room(rows, beside.message):
            rows = internode.rows(sizes.row_bytes, is_staged, rows.unit_tokens // 2)
        self._rings: list[int] = []
        for area in (job.rings, job.handover):
            self._rings += area.nodes
            for ring in area.cut((rows, beside.message), internode.WANTED_GROUPS):
                self._rings += ring
        self._slot_fields = beside.fields  # type: ignore[assignment]

    def _launch(self, job: Job, turn: CudaTurn, move: _Move) -> None:
        shape = self._node_shapes[move.is_windowed]
        fields = (
            *self._rings,
            *move.entry,
            *self._slot_fields,
            move.has_metadata,
            *move.arrays,
            *move.addresses,
            move.node_counts,
            *shape.pieces,
            shape.pieces.piece_bytes,
            *self._beside,
            *move.flags,
            shape.senders,
            shape.forwarders,
            shape.takers,
            0,
        )
        job.launch.dispatch(turn.stream, self._blocks, shape, fields)


def move_plan(job: Job) -> type[MovePlan]:
    """The plan of the job's moves."""
    return MovePlan if job.rings is None else InternodeMovePlan


def reject_move(job: Job, turn: CudaTurn) -> None:
    """Enter the move of a dispatch only to say that this rank cannot take part."""
    plan: MovePlan = job.plan(move_plan(job), _NO_ROWS, None, None, None, job.size, 1)
    plan.reject(job, turn)
