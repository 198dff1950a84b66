"""What every rank must have received and summed: all rows and all their bits, made again from the routing.

Nothing here shares code with the kernels or with the Buffer: it knows which token chose which expert (gathered by the
communicator), that received rows are in the order of source rank and token, and how combine sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import Communicator
from epcomm.cli.bench.case import Case, make_routing, marks_of
from epcomm.cli.bench.cuda.data import make_bits
from epcomm.cli.bits import as_bits, round_to, widen
from epcomm.handle import DispatchResult, LayoutResult

__all__ = ["Routing", "check_combine", "check_dispatch", "check_layout", "gather_routing", "output_bits"]

_FLOAT32 = np.dtype(np.float32)
_SCALES_SEED = 1 << 20  # plus the seed of the rows
_OUTPUT_SEED = 1 << 21  # plus the rank whose experts' output it is

_Download = Callable[[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Routing:
    """The choices of all tokens; R ranks, T tokens a rank, K choices.

    Attributes:
        topk_idx, topk_weights: ``[R, T, K]``.
        is_token_in_rank: bool ``[R, T, R]``, by source rank, token and destination.
        num_local: experts of a rank.
    """

    topk_idx: NDArray[np.int64]
    topk_weights: NDArray[np.float32]
    is_token_in_rank: NDArray[np.bool_]
    num_local: int

    def received_by(self, rank: int) -> list[NDArray[np.int64]]:
        """The tokens (indices at their source) that each source sends to `rank`."""
        return [np.flatnonzero(sent[:, rank]) for sent in self.is_token_in_rank]

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 ``[R, R]``, rows from rank i to rank j."""
        counts: NDArray[np.int64] = self.is_token_in_rank.sum(axis=1, dtype=np.int64)
        return counts


def gather_routing(comm: Communicator, case: Case) -> Routing:
    """Every rank makes its own part. Collective."""
    parts = comm.allgather(make_routing(case, comm.rank))
    topk_idx, topk_weights = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    return Routing(topk_idx, topk_weights, marks_of(case, topk_idx), case.experts // case.ranks)


def scales_bits(xp: Any, case: Case, tokens: Any, seed: int) -> Any:
    """uint32 ``[T, H / 128]``, the bits of the scales of fp8 rows."""
    return make_bits(xp, tokens, case.scale_bytes // 4, _FLOAT32, _SCALES_SEED + seed)


def output_bits(xp: Any, case: Case, routing: Routing, rank: int) -> Any:
    """What the experts of `rank` put out for all rows it received, in their order."""
    tokens = [source * case.tokens + sent for source, sent in enumerate(routing.received_by(rank))]
    return make_bits(xp, xp.asarray(np.concatenate(tokens)), case.hidden, case.combine_dtype, _OUTPUT_SEED + rank)


def check_layout(download: _Download, routing: Routing, rank: int, layout: LayoutResult) -> Iterator[str]:
    """Differences of what ``get_dispatch_layout`` returned on `rank`."""
    marks = routing.is_token_in_rank[rank]
    num_experts = routing.num_local * marks.shape[1]
    yield from _small("tokens per rank", download(layout.num_tokens_per_rank), marks.sum(axis=0))
    per_expert = np.bincount(routing.topk_idx[rank].reshape(-1), minlength=num_experts)
    yield from _small("tokens per expert", download(layout.num_tokens_per_expert), per_expert)
    yield from _small("tokens in ranks", download(layout.is_token_in_rank), marks)


def check_dispatch(
    xp: Any, download: _Download, case: Case, routing: Routing, rank: int, seed: int, got: DispatchResult
) -> Iterator[str]:
    """Differences of what `rank` received of rows made with `seed`; of a cached dispatch the rows and scales.

    Args:
        xp: numpy or cupy, whose arrays `got` has.
        download: makes a NumPy array of an `xp` one.
        case: the sizes.
        routing: of all ranks.
        rank: whose result it is.
        seed: with which all ranks made their rows.
        got: the result.
    """
    recv_x, recv_scales = got.recv_x if isinstance(got.recv_x, tuple) else (got.recv_x, None)
    sent = routing.received_by(rank)
    num_rows = sum(map(len, sent))
    if recv_x.shape != (num_rows, case.hidden):
        yield f"rows: shape {list(recv_x.shape)}, not {[num_rows, case.hidden]}"
        return
    begin = 0
    for source, tokens in enumerate(sent):
        rows = slice(begin, begin + len(tokens))
        begin += len(tokens)
        everywhere = xp.asarray(source * case.tokens + tokens)
        wanted = make_bits(xp, everywhere, case.hidden, recv_x.dtype, seed)
        yield from _rows(xp, f"rows from rank {source}", as_bits(recv_x)[rows], wanted)
        if recv_scales is not None:
            wanted = scales_bits(xp, case, everywhere, seed)
            yield from _rows(xp, f"scales from rank {source}", as_bits(recv_scales)[rows], wanted)
    if got.recv_topk_idx is not None:
        yield from _check_beside(download, routing, rank, sent, got)


def _check_beside(
    download: _Download, routing: Routing, rank: int, sent: list[NDArray[np.int64]], got: DispatchResult
) -> Iterator[str]:
    """What travels with the rows, and counts."""
    first = rank * routing.num_local
    chosen = np.concatenate([routing.topk_idx[source, tokens] for source, tokens in enumerate(sent)]) - first
    weights = np.concatenate([routing.topk_weights[source, tokens] for source, tokens in enumerate(sent)])
    is_local = (chosen >= 0) & (chosen < routing.num_local)
    yield from _small("expert indices", download(got.recv_topk_idx), np.where(is_local, chosen, -1))
    yield from _small("weights", download(got.recv_topk_weights), np.where(is_local, weights, np.float32(0)))
    per_expert = np.bincount(chosen[is_local], minlength=routing.num_local)
    yield from _small("tokens per expert", np.array(got.num_recv_tokens_per_expert_list), per_expert)
    if got.handle.ranks_per_node < len(sent):
        yield from _small("prefix sums", download(got.handle[-4]), np.cumsum(routing.rows[:, rank]))
        return
    yield from _small("source tokens", download(got.handle[3]), np.concatenate(sent))
    yield from _small("rank prefix matrix", download(got.handle[0]), np.cumsum(routing.rows, axis=0))


def check_combine(xp: Any, case: Case, routing: Routing, rank: int, combined: Any) -> Iterator[str]:
    """Differences of the sums of `output_bits` of all ranks, for the tokens of `rank`."""
    dtype = case.combine_dtype
    tokens = xp.arange(rank * case.tokens, (rank + 1) * case.tokens)
    per_node = case.ranks_per_node or case.ranks
    total, near = (xp.zeros((case.tokens, case.hidden), np.float32) for _ in range(2))
    for destination in range(case.ranks):  # ascending, and the order of float32 sums matters
        visited = xp.asarray(routing.is_token_in_rank[rank, :, destination])
        rows = widen(xp, make_bits(xp, tokens, case.hidden, dtype, _OUTPUT_SEED + destination), dtype)
        near += xp.where(visited[:, None], rows, np.float32(0))
        if (destination + 1) % per_node == 0:  # of several nodes, each rounds its sum
            total += near if per_node == case.ranks else widen(xp, round_to(xp, near, dtype), dtype)
            near[...] = 0
    yield from _rows(xp, "sums", as_bits(combined), round_to(xp, total, dtype))


def _rows(xp: Any, what: str, got: Any, wanted: Any) -> Iterator[str]:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        yield f"{what}: {got.dtype} {list(got.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        return
    differing = xp.flatnonzero((got != wanted).any(axis=1))
    if len(differing):
        yield f"{what}: {len(differing)} of {len(got)} differ, first number {int(differing[0])}"


def _small(what: str, got: NDArray[Any], wanted: NDArray[Any]) -> Iterator[str]:
    if got.shape != wanted.shape:
        yield f"{what}: shape {list(got.shape)}, not {list(wanted.shape)}"
        return
    if wanted.dtype == np.float32:
        got, wanted = as_bits(got), as_bits(wanted)
    if (got != wanted).any():
        where = tuple(int(i) for i in np.argwhere(got != wanted)[0])
        yield f"{what}: {np.count_nonzero(got != wanted)} of {got.size} differ, first at {list(where)}"
