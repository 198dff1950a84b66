"""High-throughput operations of a Buffer: layout, dispatch, combine."""

from __future__ import annotations

from typing import Any

from epcomm.arrays import framework_or_none, import_array
from epcomm.backends import DispatchRequest, Rejectable, Turn
from epcomm.backends.protocol import DispatchOutcome
from epcomm.buffer.arguments import (
    check_num_experts,
    check_topk,
    check_topk_values,
    combine_dtype,
    writable_framework,
)
from epcomm.buffer.core import BufferCore, Entry
from epcomm.buffer.throughput_arguments import combine_request, dispatch_handle, dispatch_request
from epcomm.config import Config
from epcomm.event import EventOverlap
from epcomm.handle import CombineResult, DispatchHandle, DispatchResult, LayoutResult, register_pytrees

__all__ = ["ThroughputOperations"]


class ThroughputOperations(BufferCore):
    """`get_dispatch_layout`, `dispatch` and `combine`, and what belongs to them.

    R ranks, E experts, T tokens of this rank, K choices a token, N rows received by this rank.
    """

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        stream: Any = None,
    ) -> LayoutResult:
        """Count how many of this rank's tokens go to each rank, node and expert.

        Not collective. Does not wait for other ranks; on CUDA it does not block the host.

        Args:
            topk_idx: int32 or int64 ``[T, K]``, K up to 32; -1 selects nothing. Experts e of rank r are those with
                ``e // (E / R) == r``.
            num_experts: E, a multiple of R.
            previous_event: what to wait for first; on CUDA instead of the caller's current stream.
            async_finish: on CUDA, run in the Buffer's own stream (`get_comm_stream`), while the caller's goes on; the
                result may be used in streams that have waited for the event.
            allocate_on_comm_stream: accepted as in DeepEP: memory is never reused before the streams that are known to
                use it are done with it, whoever allocates it.
            stream: on CUDA, the stream in whose order the call runs: a raw handle (of a stream that outlives the
                Buffer and its results, since nothing keeps it), an object with ``__cuda_stream__``, a CuPy or torch
                stream. By default the current stream of the input's framework; JAX has none, so its
                calls run in the Buffer's own stream, and DLPack orders its arrays.

        Returns:
            `LayoutResult`: int32 ``[R]``, int32 ``[num_nodes]`` or None on one node, int32 ``[E]``, bool ``[T, R]``,
            and the event; arrays of the framework of `topk_idx`.

        Raises:
            ShapeError, DtypeError, LayoutError, DeviceError: `topk_idx` or `num_experts` cannot be used.
            RoutingError: with ``EPCOMM_CHECK=1``, an index out of range or repeated in a row.
        """
        with Entry(self, "get_dispatch_layout"):
            turn = self._turn(None, framework_or_none(topk_idx), stream, previous_event, async_finish)
            check_num_experts(num_experts, self._num_ranks)
            view = import_array(topk_idx, "topk_idx", stream=turn.stream)
            check_topk(turn.place, view.spec, None)
            if self._check_routing:
                check_topk_values(turn.checked_values(view), num_experts)
            out = self._backend.dispatch_layout(turn, turn.take(view), num_experts)
            self._counters["get_dispatch_layout_calls"] += 1
            event = turn.finish(view)
            per_node = out.num_tokens_per_rdma_rank
            return LayoutResult(
                turn.export(out.num_tokens_per_rank, view.framework),
                None if per_node is None else turn.export(per_node, view.framework),
                turn.export(out.num_tokens_per_expert, view.framework),
                turn.export(out.is_token_in_rank, view.framework),
                event,
            )

    def dispatch(
        self,
        x: Any,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        stream: Any = None,
    ) -> DispatchResult:
        """Send every token once to each rank that owns one of its experts.

        Collective. On CUDA it blocks the host until the counts of all ranks are here, and not at all with `handle` or
        `num_worst_tokens`, which a CUDA graph can capture; rows move in the stream of the call. On the host backend it
        returns when the rows are here. Received rows are ordered by source rank, then by token index
        at the source, always.

        Args:
            x: ``[T, hidden]`` bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8; or
                ``(x, scales)`` with scales ``[T]`` or ``[T, num_scales]`` of any 1-, 2- or 4-byte dtype and any
                strides. Contiguous, 16-byte aligned, rows of a multiple of 16 bytes. T may be 0 and differ by rank.
            handle: the handle of an earlier dispatch: its routing again (cached dispatch). Then no layout, no
                `topk_idx` and no `topk_weights`.
            num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert: as
                `get_dispatch_layout` returns them.
            topk_idx: int32 or int64 ``[T, K]``, travels with the rows.
            topk_weights: float32 ``[T, K]``, travels with the rows; needs `topk_idx`.
            expert_alignment: round the counts of ``num_recv_tokens_per_expert_list`` up to a multiple of this; the
                same on all ranks.
            num_worst_tokens: if positive (and then the same on all ranks), return exactly this many rows. The rows past
                the real ones are undefined, with -1 in ``recv_topk_idx``; rows that do not fit are dropped, which
                `check` raises later.
            config: tuning; the same on all ranks, except for its `num_sms`, the only field that CUDA uses.
            previous_event, async_finish, allocate_on_comm_stream, stream: as in `get_dispatch_layout`.

        Returns:
            `DispatchResult` ``(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle,
            event)``. recv_x ``[N, hidden]``, or a pair with the scales, ``[N]`` or ``[N, num_scales]``. recv_topk_idx
            ``[N, K]`` numbers experts from this rank's first and is -1, with weight 0, where the expert lives
            elsewhere; both are None for a cached dispatch. Arrays are of the framework of `x`.

        Raises:
            InputError: this rank's arguments cannot be used (a subclass says what is wrong).
            PeerError: another rank's arguments cannot be used.
            RankMismatch: the ranks disagree about hidden, dtype, scales, top-k, experts, config, the handle or (on the
                host backend) the operation.
            PeerTimeout: a rank did not take part; the Buffer is then broken.
            CapacityError: more SMs than all ranks of a GPU can have at once.

        A call that does not block the host raises the errors of this rank; those of the others, and timeouts, come from
        `check` (a timeout from the next call, too).
        """
        with Entry(self, "dispatch"):
            operation = Rejectable.DISPATCH if handle is None else Rejectable.CACHED_DISPATCH
            framework = framework_or_none(x[0] if isinstance(x, tuple) and x else x)
            turn = self._turn(operation, framework, stream, previous_event, async_finish)
            try:
                request = dispatch_request(
                    turn,
                    x,
                    handle,
                    num_tokens_per_rank,
                    num_tokens_per_rdma_rank,
                    is_token_in_rank,
                    num_tokens_per_expert,
                    topk_idx,
                    topk_weights,
                    expert_alignment,
                    num_worst_tokens,
                    config,
                    buffer_id=self.id,
                    num_ranks=self._num_ranks,
                    num_nodes=self._topology.num_nodes,
                    default=self.get_dispatch_config(self._num_ranks),
                    num_sms=self._num_sms(config),
                    check=self._check_routing,
                )
            except Exception as error:
                self._backend.reject(turn, operation, error)
                raise
            outcome = self._backend.dispatch(turn, request)
            event = turn.finish(request)
            assert framework is not None  # or there was no request
            return self._dispatch_result(turn, request, outcome, framework, event)

    def _dispatch_result(
        self, turn: Turn, request: DispatchRequest, outcome: DispatchOutcome, framework: str, event: EventOverlap
    ) -> DispatchResult:
        register_pytrees()
        self._counters["dispatch_calls"] += 1
        self._counters["rows_sent"] += outcome.num_sent or 0
        self._counters["rows_received"] += outcome.recv_x.shape[0]
        if outcome.num_dropped:
            self._record_dropped(outcome.num_dropped, request.num_worst_tokens)
        handle = request.handle
        if handle is None:
            handle = self._dispatch_handle(turn, request, outcome, framework)
        recv_x = turn.export(outcome.recv_x, framework)
        if outcome.recv_scales is not None:
            recv_x = (recv_x, turn.export(outcome.recv_scales, framework))
        topk_idx, topk_weights = outcome.recv_topk_idx, outcome.recv_topk_weights
        return DispatchResult(
            recv_x,
            None if topk_idx is None else turn.export(topk_idx, framework),
            None if topk_weights is None else turn.export(topk_weights, framework),
            outcome.num_recv_tokens_per_expert,
            handle,
            event,
        )

    def _dispatch_handle(
        self, turn: Turn, request: DispatchRequest, outcome: DispatchOutcome, framework: str
    ) -> DispatchHandle:
        return DispatchHandle.of(
            {
                "is_token_in_rank": outcome.is_token_in_rank,
                "rank_prefix_matrix": outcome.rank_prefix_matrix,
                "recv_src_idx": outcome.recv_src_idx,
                "forward_mask": outcome.forward_mask,
                "forward_counts": outcome.forward_counts,
                "buffer_id": self.id,
                "dispatch_id": outcome.dispatch_id,
                "rank": self.rank,
                "num_tokens": request.x.shape[0],
                "num_rows": outcome.recv_x.shape[0],
                "num_topk": 0 if request.topk_idx is None else request.topk_idx.shape[1],
                "hidden": request.x.shape[1],
                "num_experts": request.num_experts,
                "ranks_per_node": self._topology.ranks_per_node,
                "num_worst_tokens": request.num_worst_tokens,
                "framework": framework,
                "send_pos": outcome.send_pos,
                "stream": turn.ref,
            }
        )

    def combine(
        self,
        x: Any,
        handle: DispatchHandle,
        topk_weights: Any = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        stream: Any = None,
    ) -> CombineResult:
        """Bring the rows of a dispatch back to their tokens and sum them, unweighted.

        Collective. On CUDA it does not block the host, runs in the stream of the call, and can be captured in a graph;
        on the host backend it waits for the peers. The sum runs in float32: the biases, then the rows in ascending rank
        order, one rounding to nearest even. On several nodes each node's rows are first summed and rounded, then the
        bias and the nodes in ascending order. Weight the rows, and sum a rank's own experts, before the call.

        Args:
            x: ``[N, hidden]`` bfloat16, float16 or float32, one row for every received row, in that order; contiguous,
                16-byte aligned. In memory from `get_combine_buffer` it is not copied, nor on CUDA are results of a
                dispatch of this Buffer that lie in its arena.
            handle: what the dispatch returned.
            topk_weights: float32 ``[N, K]``, summed to the tokens in the same way.
            bias: None, ``[T, hidden]`` of the dtype of `x`, or a pair of those.
            config, previous_event, async_finish, allocate_on_comm_stream, stream: as in `dispatch`.

        Returns:
            `CombineResult` ``(combined_x [T, hidden], combined_topk_weights [T, K] or None, event)``; a token that went
            nowhere gets 0 plus its biases.

        Raises:
            HandleError: the handle is of another Buffer, or the rows do not match it.
            InputError, PeerError, RankMismatch, PeerTimeout, CapacityError: as in `dispatch`; on CUDA as in one that
                does not block the host.
        """
        with Entry(self, "combine"):
            framework = framework_or_none(x)
            turn = self._turn(Rejectable.COMBINE, framework, stream, previous_event, async_finish)
            try:
                request = combine_request(
                    turn,
                    x,
                    handle,
                    topk_weights,
                    bias,
                    config,
                    buffer_id=self.id,
                    default=self.get_combine_config(self._num_ranks),
                    num_sms=self._num_sms(config),
                )
            except Exception as error:
                self._backend.reject(turn, Rejectable.COMBINE, error)
                raise
            outcome = self._backend.combine(turn, request)
            self._counters["combine_calls"] += 1
            event = turn.finish(request)
            assert framework is not None  # or there was no request
            weights = outcome.combined_topk_weights
            return CombineResult(
                turn.export(outcome.combined_x, framework),
                None if weights is None else turn.export(weights, framework),
                event,
            )

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> DispatchResult:
        """`dispatch`, which takes the two-hop way by itself when there are several nodes."""
        return self.dispatch(*args, **kwargs)

    def internode_combine(self, *args: Any, **kwargs: Any) -> CombineResult:
        """`combine`, which takes the two-hop way by itself when there are several nodes."""
        return self.combine(*args, **kwargs)

    def get_combine_buffer(self, handle: DispatchHandle, dtype: Any) -> Any:
        """Memory for the experts' output from which the next `combine` needs no copy.

        Not collective. Undefined content. On CUDA it is a part of the arena (an ordinary array where that has no room),
        does not block the host, and stays valid as long as it is held. On the host backend it waits until the peers
        have read what the memory held before, and it is valid until the next `combine`.

        Args:
            handle: what the dispatch returned.
            dtype: bfloat16, float16 or float32, as a NumPy dtype or torch dtype.

        Returns:
            ``[N, handle's hidden]`` in the framework of the dispatch.

        Raises:
            ImmutableArray: a JAX handle. Pass an ordinary array to `combine` there.
            HandleError: the handle of another Buffer.
        """
        with Entry(self, "get_combine_buffer"):
            turn = self._backend.turn(
                handle.framework if isinstance(handle, DispatchHandle) else None, None, None, False
            )
            handle = dispatch_handle(handle, self.id, turn)
            writable_framework(handle.framework, "get_combine_buffer", "pass an ordinary array to combine")
            rows = self._backend.combine_buffer(turn, handle.num_rows, handle.hidden, combine_dtype(dtype))
            turn.finish(None)
            return turn.export(rows, handle.framework)
