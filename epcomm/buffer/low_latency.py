"""Low-latency operations of a Buffer: decode-size dispatch and combine, send and receive halves apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from epcomm.arrays import framework_or_none
from epcomm.backends import (
    Array,
    LowLatencyCombineRequest,
    LowLatencyDispatchOutcome,
    LowLatencyDispatchRequest,
    LowLatencyDispatchTerms,
    Rejectable,
    Turn,
)
from epcomm.buffer.arguments import writable_framework
from epcomm.buffer.core import Entry
from epcomm.buffer.low_latency_arguments import (
    check_pre_reduce,
    low_latency_combine_request,
    low_latency_dispatch_request,
    low_latency_handle,
)
from epcomm.buffer.low_latency_masks import LowLatencyMasks
from epcomm.config import low_latency_size_hint
from epcomm.errors import HandleError, ImmutableArray, InputError, ShapeError
from epcomm.event import EventOverlap
from epcomm.handle import LowLatencyCombineResult, LowLatencyDispatchResult, LowLatencyHandle, register_pytrees

__all__ = ["LowLatencyOperations"]


class LowLatencyOperations(LowLatencyMasks):
    """`low_latency_dispatch`, `low_latency_combine` and what belongs to them.

    R ranks, L local experts, T tokens of this rank, M the declared maximum of tokens a rank, K choices a token.
    """

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> LowLatencyDispatchResult:
        """Send tokens to their experts, grouped by expert on arrival, cast to fp8 on the way if asked for.

        Collective. With `return_recv_hook` the call only sends, and ``hook()`` receives; two results may wait for their
        hook at a time. Ranks may call hooks in another order, if before a send all have called those of the same calls.
        On the host backend whatever receives waits for the peers. On CUDA nothing blocks the host:
        kernels run in the current stream of the framework of `x` (the hook's in the one that is current then), nothing
        is on the GPU between send and receive, and calls can be captured in a graph. The rows of an expert are ordered
        by source rank, then token, always.

        Args:
            x: bfloat16 ``[T, hidden]``, T at most M, contiguous, 16-byte aligned; with `use_fp8` hidden is a multiple
                of 128, else of 8.
            topk_idx: int32 or int64 ``[T, K]``; -1 selects nothing.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            num_experts: E, a multiple of R, the same on all ranks.
            cumulative_local_expert_recv_stats: int32 ``[L]``, the received counts are added to it.
            dispatch_wait_recv_cost_stats: int64 ``[R]``, the nanoseconds waited for each rank are added to it.
            use_fp8: cast rows to float8_e4m3fn with one scale for 128 channels.
            round_scale: round scales up to powers of two (with `use_fp8`).
            use_ue8m0: scales as exponent bytes (with `use_fp8` and `round_scale`).
            async_finish: on CUDA work in the Buffer's own stream, and return an event of its end; not together with
                `return_recv_hook`.
            return_recv_hook: see above.

        Returns:
            `LowLatencyDispatchResult` ``(recv_x, recv_count, handle, event, hook)``. recv_x bfloat16
            ``[L, R * M, hidden]`` or a pair of float8_e4m3fn rows and scales: float32 ``[L, R * M, hidden / 128]`` or,
            with `use_ue8m0`, int32 ``[L, R * M, ceil(hidden / 512)]`` with four exponent bytes in each; scales have the
            row dimension fastest in memory (JAX gets a row-major copy, so with `return_recv_hook` it has to take
            `use_fp8=False`). Rows past ``recv_count`` int32 ``[L]`` are undefined.

        Raises:
            CapacityError: T is larger than M; on CUDA also `num_rdma_bytes` that are too few for these sizes.
            RingFull: two earlier results still wait for their hook.
            BufferStateError: other ranks have masked this one and went on; `low_latency_clean_mask_buffer` helps.
            ImmutableArray: statistics in JAX arrays, or JAX with `return_recv_hook` and fp8.
            InputError, PeerError, RankMismatch, PeerTimeout: as in ``Buffer.dispatch``; on CUDA those of other ranks
                come from `check`, and no row is moved.
        """
        with Entry(self, "low_latency_dispatch"):
            framework = framework_or_none(x)
            turn = self._turn(Rejectable.LOW_LATENCY_DISPATCH, framework, None, None, async_finish)
            try:
                self._check_low_latency(async_finish, return_recv_hook)
                request = low_latency_dispatch_request(
                    turn,
                    x,
                    topk_idx,
                    num_max_dispatch_tokens_per_rank,
                    num_experts,
                    cumulative_local_expert_recv_stats,
                    dispatch_wait_recv_cost_stats,
                    use_fp8=use_fp8,
                    round_scale=round_scale,
                    use_ue8m0=use_ue8m0,
                    return_recv_hook=return_recv_hook,
                    num_ranks=self._num_ranks,
                    num_sms=self._num_sms(None, is_low_latency=True),
                    check=self._check_routing,
                )
            except Exception as error:
                self._backend.reject(turn, Rejectable.LOW_LATENCY_DISPATCH, error)
                raise
            outcome, receive = self._backend.low_latency_dispatch(turn, request)
            assert framework is not None  # or there was no request
            self._counters["low_latency_dispatch_calls"] += 1
            if request.is_postponed:
                self._unreceived.add(outcome.dispatch_id)
            hook = self._hook("low_latency_dispatch", turn, framework, request, receive, outcome.dispatch_id)
            event = turn.finish(request)
            return self._low_latency_result(turn, request.terms, outcome, framework, event, hook)

    def _low_latency_result(
        self,
        turn: Turn,
        terms: LowLatencyDispatchTerms,
        outcome: LowLatencyDispatchOutcome,
        framework: str,
        event: EventOverlap,
        hook: Callable[[], None],
    ) -> LowLatencyDispatchResult:
        register_pytrees()
        handle = LowLatencyHandle.of(
            {
                "src_info": outcome.src_info,
                "recv_ranges": outcome.recv_ranges,
                "num_max_dispatch_tokens_per_rank": terms.num_max_dispatch_tokens_per_rank,
                "hidden": terms.hidden,
                "num_experts": terms.num_experts,
                "num_topk": terms.num_topk,
                "buffer_id": self.id,
                "dispatch_id": outcome.dispatch_id,
                "epoch": self._epoch,
                "num_tokens": terms.num_tokens,
                "framework": framework,
                "send_info": outcome.send_info,
                "messages": outcome.messages,
                "num_messages": outcome.num_messages,
                "stream": turn.ref,
            }
        )
        recv_x = turn.export(outcome.recv_x, framework)
        if outcome.recv_scales is not None:
            recv_x = (recv_x, turn.export(outcome.recv_scales, framework))
        return LowLatencyDispatchResult(recv_x, turn.export(outcome.recv_count, framework), handle, event, hook)

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Any = None,
        combine_wait_recv_cost_stats: Any = None,
        *,
        pre_reduce: bool = False,
    ) -> LowLatencyCombineResult:
        """Bring the experts' rows back and sum them with the tokens' weights.

        Collective; waits like `low_latency_dispatch`. In float32, from +0, choices in ascending position: the product
        is rounded, then the sum; one rounding to bfloat16 at the end. Choices of -1 and of masked ranks are skipped.

        Args:
            x: bfloat16 ``[L, R * M, hidden]``, the experts' outputs at the places of their inputs.
            topk_idx: the one of the dispatch, ``[T, K]``.
            topk_weights: float32 ``[T, K]``.
            handle: what the dispatch returned.
            use_logfmt: send the rows with 10 bits a channel instead of 16, in the format of
                `epcomm.reference.encode_logfmt`; hidden is a multiple of 128. A channel is off by at most 1.1 % of
                itself, or 2^-16.9 of the largest of its 128 (`epcomm.reference.logfmt_bound` says how much); NaN and
                Inf stay. Backends need not give the same bits.
            zero_copy: take the rows that were written into what `get_next_low_latency_combine_buffer` returned; `x` is
                then only checked for its shape.
            async_finish, return_recv_hook: as in `low_latency_dispatch`; a hook on all ranks, or on none.
            out: bfloat16 ``[T, hidden]``, written; a new array by default.
            combine_wait_recv_cost_stats: int64 ``[R]``, the nanoseconds waited for each rank are added to it.
            pre_reduce: every rank first sums a token's rows over its own experts, with the weights, as above, and
                rounds to bfloat16; then these are summed from +0, ranks in ascending order, and rounded: for one row
                for each token and rank to travel, not one for each choice. Not with `use_logfmt` or `zero_copy`. On
                CUDA the send half waits for the weights of the others, which come with theirs.

        Returns:
            `LowLatencyCombineResult` ``(combined_x [T, hidden], event, hook)``.

        Raises:
            ShapeError: `use_logfmt`, and hidden is not a multiple of 128.
            RoutingError: `topk_idx` is not the one of the dispatch; on CUDA it comes from `check`, and the sums of
                those tokens are wrong.
            ImmutableArray: `out`, statistics or `zero_copy` with JAX arrays.
            HandleError, RingFull, BufferStateError, InputError, PeerError, RankMismatch, PeerTimeout: as in
                `low_latency_dispatch`.
        """
        with Entry(self, "low_latency_combine"):
            framework = framework_or_none(x)
            in_place, self._combine_buffer = self._combine_buffer, None  # a rejected call uses up its slot, too
            turn = self._turn(Rejectable.LOW_LATENCY_COMBINE, framework, None, None, async_finish)
            try:
                self._check_low_latency(async_finish, return_recv_hook)
                check_pre_reduce(pre_reduce, use_logfmt, zero_copy)
                handle = self._low_latency_handle(handle, turn)
                request = low_latency_combine_request(
                    turn,
                    x,
                    topk_idx,
                    topk_weights,
                    handle,
                    _in_place_rows(framework, handle, in_place) if zero_copy else None,
                    out,
                    combine_wait_recv_cost_stats,
                    use_logfmt=use_logfmt,
                    pre_reduce=pre_reduce,
                    return_recv_hook=return_recv_hook,
                    num_ranks=self._num_ranks,
                    num_sms=self._num_sms(None, is_low_latency=True),
                    check=self._check_routing,
                )
            except Exception as error:
                self._backend.reject(turn, Rejectable.LOW_LATENCY_COMBINE, error)
                raise
            receive = self._backend.low_latency_combine(turn, request)
            assert framework is not None  # or there was no request
            self._counters["low_latency_combine_calls"] += 1
            hook = self._hook("low_latency_combine", turn, framework, request, receive)
            event = turn.finish(request)
            return LowLatencyCombineResult(turn.export(request.out, framework) if out is None else out, event, hook)

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Any:
        """Memory to write the experts' outputs into, for the next `low_latency_combine` with ``zero_copy=True``.

        Undefined content. Waits until the peers have read what the memory held two combines ago: on the host backend
        here; on CUDA what is launched later in the current stream waits. Not collective, but on CUDA for the first call
        of a size: that allocates two buffers on all ranks and blocks the host, and cannot be captured in a graph.

        Returns:
            bfloat16 ``[L, R * M, hidden]`` in the framework of the dispatch; valid until the next combine.

        Raises:
            ImmutableArray: a JAX handle. Call `low_latency_combine` without `zero_copy` there.
            RingFull: two combines still wait for their hook.
            InputError: the first call of a size under capture.
            CapacityError: no room on the GPU.
        """
        with Entry(self, "get_next_low_latency_combine_buffer"):
            self._check_mode()
            framework = handle.framework if isinstance(handle, LowLatencyHandle) else None
            turn = self._backend.turn(framework, None, None, False)
            checked = self._low_latency_handle(handle, turn)
            writable_framework(
                checked.framework, "get_next_low_latency_combine_buffer", "call low_latency_combine without zero_copy"
            )
            shape = (*checked.src_info.shape, checked.hidden)
            self._combine_buffer = self._backend.low_latency_combine_buffer(turn, shape)
            turn.finish(None)
            return turn.export(self._combine_buffer, checked.framework)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Kept for programs written for DeepEP: nothing has to be cleaned between modes or shapes. Not collective.

        Raises:
            ShapeError: a size below 1, or a Buffer whose `num_rdma_bytes` was given and is too small for these.
        """
        with Entry(self, "clean_low_latency_buffer"):
            hint = low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, self._num_ranks, num_experts)
            if 0 < self.num_rdma_bytes < hint:
                raise ShapeError(
                    "num_rdma_bytes",
                    got=str(self.num_rdma_bytes),
                    wanted=f"at least {hint}",
                    do="size the Buffer with get_low_latency_rdma_size_hint",
                )

    def _low_latency_handle(self, handle: Any, turn: Turn) -> LowLatencyHandle:
        checked = low_latency_handle(handle, self.id, self._epoch, turn)
        if checked.dispatch_id in self._unreceived:
            raise HandleError("handle", got="one whose rows are not received", do="call the hook of its dispatch first")
        return checked

    def _check_low_latency(self, async_finish: bool, return_recv_hook: bool) -> None:
        self._check_mode()
        if async_finish and return_recv_hook:
            raise InputError("async_finish", got="also return_recv_hook", wanted="one of the two")

    def _hook(
        self,
        operation: str,
        turn: Turn,
        framework: str,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
        receive: Callable[[Turn], None],
        dispatch_id: int | None = None,
    ) -> Callable[[], None]:
        """Run the receive half now, or return a function that runs it when it is first called."""
        if not request.is_postponed:
            receive(turn)
            return _nothing_to_receive
        pending = [(receive, request)]

        def hook() -> None:
            with Entry(self, f"{operation} hook"):
                if pending:
                    later = self._backend.turn(framework, None, None, False)
                    receive, request = pending.pop()
                    receive(later)
                    if dispatch_id is not None:
                        self._unreceived.discard(dispatch_id)
                    later.finish(request)

        return hook


def _nothing_to_receive() -> None:
    """The hook of a call that has received."""


def _in_place_rows(framework: str | None, handle: LowLatencyHandle, handed_out: Array | None) -> Array:
    """What get_next_low_latency_combine_buffer handed out, if it can be the rows of a combine with this handle."""
    if framework == "jax":
        raise ImmutableArray("zero_copy", got="a JAX array", do="call low_latency_combine without zero_copy")
    if handed_out is None or handed_out.shape != (*handle.src_info.shape, handle.hidden):
        raise InputError(
            "zero_copy",
            got="no buffer of this handle's shape handed out since the last combine",
            do="write into what get_next_low_latency_combine_buffer(handle) returns first",
        )
    return handed_out
