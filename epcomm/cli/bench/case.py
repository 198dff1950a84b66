"""What is measured: sizes, and data that any rank can make for any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import Communicator, Topology
from epcomm.numerics import BFLOAT16, FP8_BLOCK, FP8_E4M3
from epcomm.testing import grouped_routing, per_token_cast_to_fp8, token_data, uniform_routing, zipf_routing

__all__ = [
    "DTYPES",
    "ROUTINGS",
    "Case",
    "Inputs",
    "expert_rows",
    "gather_marks",
    "make_inputs",
    "make_routing",
    "marks_of",
]

DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": BFLOAT16,
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp8": FP8_E4M3,
}
ROUTINGS = ("uniform", "zipf", "grouped")

_SEED = 20
_EXPERT_ROWS_SEED = 1000  # plus the rank: the rows of two ranks for one token differ


@dataclass(frozen=True)
class Case:
    """All parameters of a run; `tokens` are those of one rank, `experts` those of all ranks.

    `sms` are numbers of SMs to measure with in turn, on CUDA; empty for the Buffer's own. `nic_gbs` and `nvlink_gbs`
    are rates of the links of one GPU, each way, in 1e9 bytes a second, for floors; None: there are none.
    `ranks_per_node` is what was asked for until `on_nodes` says what was found.
    """

    mode: str
    backend: str
    ranks: int
    ranks_per_node: int | None
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str
    routing: str
    repeats: int
    json: str | None
    sms: tuple[int, ...] = ()
    nic_gbs: float | None = None
    nvlink_gbs: float | None = None
    hosts: int = 1

    def on_nodes(self, topology: Topology) -> Case:
        """With the nodes and hosts of the job."""
        return replace(self, ranks_per_node=topology.ranks_per_node, hosts=len(set(topology.hosts)))

    @property
    def num_nodes(self) -> int:
        """Hosts, or virtual nodes."""
        return self.ranks // (self.ranks_per_node or self.ranks)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one fp8 row."""
        return 4 * (self.hidden // FP8_BLOCK)

    @property
    def combine_dtype(self) -> np.dtype[Any]:
        """What experts put out: fp8 rows come back as bfloat16."""
        return BFLOAT16 if self.dtype == "fp8" else DTYPES[self.dtype]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one rank puts in; `scales` float32 ``[T, H / 128]`` with fp8 rows, else None."""

    x: NDArray[Any]
    scales: NDArray[np.float32] | None
    topk_idx: NDArray[np.int64]
    topk_weights: NDArray[np.float32]

    @property
    def payload(self) -> Any:
        """What ``Buffer.dispatch`` takes as x."""
        return self.x if self.scales is None else (self.x, self.scales)


def make_inputs(case: Case, rank: int) -> Inputs:
    """The inputs of `rank`, for whoever asks."""
    first = rank * case.tokens
    topk_idx, topk_weights = make_routing(case, rank)
    dtype = BFLOAT16 if case.dtype == "fp8" else DTYPES[case.dtype]
    x, scales = token_data(case.tokens, case.hidden, dtype, seed=_SEED, first_token=first), None
    if case.dtype == "fp8":
        x, scales = per_token_cast_to_fp8(x)
    return Inputs(x, scales, topk_idx, topk_weights)


def make_routing(case: Case, rank: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The choices of the tokens of `rank` and their weights, ``[T, K]`` each."""
    first = rank * case.tokens
    weights = token_data(case.tokens, case.topk, np.float32, seed=_SEED + 1, first_token=first)
    return _routing(case, first), np.abs(weights)


def marks_of(case: Case, topk_idx: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool ``[..., R]``: the ranks that own an expert among those of a token, ``[..., K]``."""
    owners = topk_idx // (case.experts // case.ranks)
    marks: NDArray[np.bool_] = (owners[..., None] == np.arange(case.ranks)).any(axis=-2)
    return marks


def gather_marks(comm: Communicator, case: Case) -> NDArray[np.bool_]:
    """``[R, T, R]``, by source rank, token and destination. Every rank makes its own part. Collective."""
    return np.stack(comm.allgather(marks_of(case, make_routing(case, comm.rank)[0])))


def _routing(case: Case, first: int) -> NDArray[np.int64]:
    sizes = (case.tokens, case.experts, case.topk)
    if case.routing == "uniform":
        return uniform_routing(*sizes, seed=_SEED, first_token=first)
    if case.routing == "zipf":
        return zipf_routing(*sizes, seed=_SEED, first_token=first)
    # The experts of a token lie on half of the ranks, or on as many as it takes.
    needed = -(-case.topk * case.ranks // case.experts)
    kept = max(-(-case.ranks // 2), needed)
    return grouped_routing(*sizes, seed=_SEED, num_groups=case.ranks, num_topk_groups=kept, first_token=first)


def expert_rows(case: Case, rank: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """What the experts of `rank` put out, ``[..., H]`` of the combine's dtype."""
    num_rows = int(np.prod(shape[:-1], dtype=np.int64))
    return token_data(num_rows, case.hidden, case.combine_dtype, seed=_EXPERT_ROWS_SEED + rank).reshape(shape)
