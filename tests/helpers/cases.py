"""Named cases of dispatch and combine, for all ranks at once.

Every input is a function of the seed and the global index of its token (the tokens of rank 0 come first), so each rank
builds the inputs of all ranks and runs the oracle, `epcomm.reference`, by itself: nothing that is compared has
travelled any other way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from epcomm import reference, testing

__all__ = [
    "CASES",
    "LOGFMT_CASES",
    "LOW_LATENCY_CASES",
    "PLACING_CASES",
    "PRE_REDUCE_CASES",
    "Case",
    "Inputs",
    "LowLatencyCase",
    "LowLatencyInputs",
]

Array: TypeAlias = NDArray[Any]
Scales: TypeAlias = Callable[[int, int], Array]  # (tokens of all ranks, seed) -> [tokens, ...]

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)

masked = functools.partial(testing.masked_routing, masked_fraction=0.2)
all_masked = functools.partial(testing.masked_routing, masked_fraction=1.0)
to_one_expert = functools.partial(testing.one_hot_routing, expert=0)

# What sums must carry exactly: signed zeros, infinities that meet, NaN, subnormals, and sums that overflow.
SPECIAL = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, 6e-8, -6e-8, 1e-39, -1e-40, 6e4, 6.5e4, 3.3e38, -3.3e38, 1.0])
# A small one is lost in the sum with a large one, unless both large ones come before it.
CANCELLING = np.array([2.0**25, -(2.0**25), 1.0, 3.0]).astype(BF16)
# What is made from one seed must not be equal by chance of its seed.
_SPECIAL_SEED, _WEIGHTS_SEED, _BIAS_SEED, _SCALES_SEED, _OUTPUT_SEED = (k << 20 for k in range(1, 6))


def rows(num_tokens: int, hidden: int, dtype: DTypeLike, seed: int, is_special: bool = False) -> Array:
    """Rows of the tokens of all ranks; with `is_special`, half of their elements are values of `SPECIAL`."""
    x = testing.token_data(num_tokens, hidden, dtype, seed=seed)
    if is_special:
        pick = testing.token_data(num_tokens, hidden, np.uint8, seed=seed + _SPECIAL_SEED)
        with np.errstate(over="ignore"):
            values = SPECIAL.astype(np.float32).astype(x.dtype)
        x = np.where(pick < 128, values[pick % len(SPECIAL)], x)
    return x


def strided_scales(num_tokens: int, seed: int) -> Array:
    """float16 [T, 3]: every second column of a wider array."""
    return rows(num_tokens, 6, np.float16, seed)[:, ::2]


def column_major_scales(num_tokens: int, seed: int) -> Array:
    """float32 [T, 5] with the token dimension fastest in memory."""
    return np.asfortranarray(rows(num_tokens, 5, np.float32, seed))


def row_major_scales(num_tokens: int, seed: int) -> Array:
    """float32 [T, 4]."""
    return rows(num_tokens, 4, np.float32, seed)


def vector_scales(num_tokens: int, seed: int) -> Array:
    """float32 [T]."""
    return rows(num_tokens, 1, np.float32, seed)[:, 0]


def byte_scales(num_tokens: int, seed: int) -> Array:
    """int8 [T, 3]."""
    return rows(num_tokens, 3, np.int8, seed)


@dataclass(frozen=True)
class Case:
    """One dispatch and one combine of all ranks.

    Attributes:
        tokens: number of tokens of each rank; starts over when there are more ranks.
        num_topk: choices of a token; fewer where there are fewer experts.
        routing: generator of `epcomm.testing`.
        scales: generator of what travels beside the rows, or None.
        is_special: weights, biases and the rows to be summed have NaN, Inf, signed zeros and subnormals.
        worst: num_worst_tokens: "" for none, "exact" for what the busiest rank receives, "room" for more, "overflow"
            for about half of it.
    """

    name: str
    tokens: tuple[int, ...] = (13, 7, 16, 1, 9, 12, 3, 10)
    hidden: int = 64
    dtype: np.dtype[Any] = BF16
    combine_dtype: np.dtype[Any] = BF16
    experts_per_rank: int = 3
    num_topk: int = 4
    routing: Callable[..., Array] = masked
    topk_dtype: type = np.int64
    has_weights: bool = True
    scales: Scales | None = None
    is_special: bool = False
    num_biases: int = 0
    expert_alignment: int = 1
    worst: str = ""

    def inputs(self, num_ranks: int, seed: int = 0) -> Inputs:
        """The case on a number of ranks."""
        return _inputs(self, num_ranks, seed)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A case on a number of ranks. Lists are indexed by rank."""

    case: Case
    num_experts: int
    num_worst_tokens: int
    topk_idx: list[Array]
    topk_weights: list[Array] | None
    biases: list[tuple[Array, ...]]
    x: list[Array]
    scales: list[Array] | None

    @property
    def num_tokens(self) -> list[int]:
        return [len(choices) for choices in self.topk_idx]

    def with_rows(self, seed: int) -> Inputs:
        """Other rows and scales for the same routing."""
        x, scales = _payload(self.case, self.num_tokens, seed)
        return replace(self, x=x, scales=scales)

    @functools.cached_property
    def dispatched(self) -> list[reference.Dispatched]:
        """What every rank receives."""
        return reference.dispatch(
            self.x,
            self.topk_idx,
            self.num_experts,
            topk_weights=self.topk_weights,
            scales=self.scales,
            expert_alignment=self.case.expert_alignment,
            num_worst_tokens=self.num_worst_tokens,
        )

    def is_overflowing(self, rank: int) -> bool:
        """Whether rows for this rank are dropped."""
        return self.dispatched[rank].num_recv_tokens < self.dispatched[rank].rank_prefix_matrix[-1, rank]

    @functools.cached_property
    def outputs(self) -> list[Array]:
        """What the experts of every rank make of its rows: a function of the rank and of the row's token."""
        case, total = self.case, sum(self.num_tokens)
        first_tokens = np.cumsum(self.num_tokens) - self.num_tokens
        results = []
        for rank, received in enumerate(self.dispatched):
            made = rows(total, self.biases[0][0].shape[1], case.combine_dtype, _OUTPUT_SEED + rank, case.is_special)
            num_real = received.num_recv_tokens
            token = first_tokens[received.recv_src_rank[:num_real]] + received.recv_src_idx[:num_real]
            output = np.zeros((len(received.recv_x), made.shape[1]), made.dtype)
            output[:num_real] = made[token]
            results.append(output)
        return results

    @functools.cached_property
    def output_weights(self) -> list[Array]:
        """float32 ``[N, K]`` for every rank, to be summed by combine."""
        shapes = [(len(received.recv_x), self.topk_idx[0].shape[1]) for received in self.dispatched]
        return [rows(*shape, np.float32, -1 - rank, self.case.is_special) for rank, shape in enumerate(shapes)]

    def combined(self, ranks_per_node: int, num_biases: int, with_weights: bool) -> list[tuple[Array, Array | None]]:
        """What every rank gets back for `outputs`."""
        key = (ranks_per_node, num_biases, with_weights)
        if key not in self._sums:
            self._sums[key] = reference.combine(
                self.outputs,
                self.topk_idx,
                self.num_experts,
                ranks_per_node=ranks_per_node,
                topk_weights=self.output_weights if with_weights else None,
                bias=[biases[:num_biases] for biases in self.biases],
                num_worst_tokens=self.num_worst_tokens,
            )
        return self._sums[key]

    @functools.cached_property
    def _sums(self) -> dict[tuple[int, int, bool], list[tuple[Array, Array | None]]]:
        return {}


def _by_rank(array: Array, num_tokens: list[int]) -> list[Array]:
    """The tokens of every rank, as views."""
    return np.split(array, np.cumsum(num_tokens)[:-1])


def _num_tokens(tokens: tuple[int, ...], num_ranks: int) -> list[int]:
    return [tokens[rank % len(tokens)] for rank in range(num_ranks)]


def _payload(case: Case, num_tokens: list[int], seed: int) -> tuple[list[Array], list[Array] | None]:
    total = sum(num_tokens)
    x = _by_rank(rows(total, case.hidden, case.dtype, seed), num_tokens)
    return x, None if case.scales is None else _by_rank(case.scales(total, seed + _SCALES_SEED), num_tokens)


@functools.lru_cache(maxsize=4)
def _inputs(case: Case, num_ranks: int, seed: int) -> Inputs:
    num_tokens = _num_tokens(case.tokens, num_ranks)
    total, num_experts = sum(num_tokens), case.experts_per_rank * num_ranks
    num_topk = min(case.num_topk, num_experts)
    choices = case.routing(total, num_experts, num_topk, seed=seed).astype(case.topk_dtype)
    busiest = int(reference.get_dispatch_layout(choices, num_experts, num_ranks).num_tokens_per_rank.max())
    worst = {"": 0, "exact": max(busiest, 1), "room": busiest + 5, "overflow": busiest // 2 + 1}
    weights = rows(total, num_topk, np.float32, seed + _WEIGHTS_SEED, case.is_special)
    # The experts' outputs need not be as wide as the rows they come from.
    width = case.hidden if case.dtype.itemsize > 1 else case.hidden // 2
    biases = [rows(total, width, case.combine_dtype, seed + _BIAS_SEED + i, case.is_special) for i in range(2)]
    x, scales = _payload(case, num_tokens, seed)
    return Inputs(
        case=case,
        num_experts=num_experts,
        num_worst_tokens=worst[case.worst],
        topk_idx=_by_rank(choices, num_tokens),
        topk_weights=_by_rank(weights, num_tokens) if case.has_weights else None,
        biases=list(zip(*(_by_rank(bias, num_tokens) for bias in biases), strict=True)),
        x=x,
        scales=scales,
    )


_F16, _F32, _BYTES = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.uint8)

CASES = (
    Case("uniform", routing=testing.uniform_routing, num_biases=1),
    Case("zero_tokens_on_one_rank", tokens=(9, 0, 11), num_biases=2),
    Case("zero_tokens_everywhere", tokens=(0,), num_biases=1),
    Case("all_to_one_expert", routing=to_one_expert),
    Case("all_masked", routing=all_masked, num_biases=2),
    Case("zipf_skew", routing=testing.zipf_routing, experts_per_rank=4, expert_alignment=16),
    Case("topk_1", num_topk=1, topk_dtype=np.int32),
    Case("topk_32", num_topk=32, experts_per_rank=32),
    Case("one_expert_per_rank", experts_per_rank=1, num_topk=2, expert_alignment=3),
    Case("tiny_rows", hidden=8),
    Case("hidden_7168", hidden=7168, tokens=(3, 1), num_biases=1),
    Case("float16", dtype=_F16, combine_dtype=_F16, num_biases=2, topk_dtype=np.int32),
    Case("float32", dtype=_F32, combine_dtype=_F32, num_biases=1, has_weights=False),
    Case("fp8_with_scales", dtype=FP8, hidden=128, scales=row_major_scales),
    Case("bytes_with_int8_scales", dtype=_BYTES, hidden=48, scales=byte_scales),
    Case("column_major_scales", dtype=FP8, hidden=128, scales=column_major_scales),
    Case("sliced_scales", scales=strided_scales),
    Case("vector_scales", dtype=FP8, hidden=128, scales=vector_scales, tokens=(6, 0, 9)),
    Case("special_bfloat16", is_special=True, num_biases=1),
    Case("special_float16", is_special=True, dtype=_F16, combine_dtype=_F16),
    Case("special_float32", is_special=True, dtype=_F32, combine_dtype=_F32, num_biases=2),
    Case("worst_exact", worst="exact", num_biases=1),
    Case("worst_room", worst="room", routing=testing.zipf_routing, scales=row_major_scales, dtype=FP8, hidden=128),
    Case("worst_overflow", worst="overflow", num_biases=1, scales=byte_scales),
    Case("worst_zero_tokens", worst="room", tokens=(0,)),
)

# The cases that differ in which bytes go where, rather than in arithmetic or in what callers are told.
PLACING_CASES = tuple(
    case
    for case in CASES
    if case.tokens == (0,)
    or case.scales is not None
    or case.name in ("uniform", "zero_tokens_on_one_rank", "all_masked", "tiny_rows", "worst_exact")
)


@dataclass(frozen=True)
class LowLatencyCase:
    """One low-latency dispatch and combine of all ranks; fields as in `Case`.

    Attributes:
        max_tokens: num_max_dispatch_tokens_per_rank.
        cast: the options of low_latency_dispatch that choose the format of the rows.
        combine: the options of low_latency_combine that choose how rows come back.
        is_special: rows, outputs and weights have NaN, Inf, signed zeros and subnormals.
        is_cancelling: in half of the outputs' channels, the order of the terms makes a difference to their sum.
    """

    name: str
    tokens: tuple[int, ...] = (8, 3, 16, 1, 5, 7, 2, 10)
    max_tokens: int = 16
    hidden: int = 256
    experts_per_rank: int = 2
    num_topk: int = 3
    routing: Callable[..., Array] = masked
    topk_dtype: type = np.int64
    cast: tuple[str, ...] = ()
    combine: tuple[str, ...] = ()
    is_special: bool = False
    is_cancelling: bool = False

    @property
    def options(self) -> dict[str, bool]:
        """Keywords of dispatch, here and in the oracle."""
        return {name: name in self.cast for name in ("use_fp8", "round_scale", "use_ue8m0")}

    @property
    def combine_options(self) -> dict[str, bool]:
        """Keywords of combine, likewise."""
        return {name: name in self.combine for name in ("use_logfmt", "pre_reduce")}

    def inputs(self, num_ranks: int, seed: int = 0) -> LowLatencyInputs:
        """The case on a number of ranks."""
        return _low_latency_inputs(self, num_ranks, seed)


@dataclass(frozen=True, eq=False)
class LowLatencyInputs:
    """A low-latency case on a number of ranks. Lists are indexed by rank."""

    case: LowLatencyCase
    num_experts: int
    x: list[Array]
    topk_idx: list[Array]
    topk_weights: list[Array]
    outputs: list[Array]

    def dispatched(self, masks: list[Array] | None = None) -> list[reference.LowLatencyDispatched]:
        """What every rank receives."""
        case = self.case
        return reference.low_latency_dispatch(
            self.x, self.topk_idx, case.max_tokens, self.num_experts, masks=masks, **case.options
        )

    def combined(self, masks: list[Array] | None = None, at_dispatch: list[Array] | None = None) -> list[Array]:
        """What every rank gets back for `outputs`; the dispatch may have had fewer `masks`."""
        return self._combined(self.outputs, self.topk_weights, masks, at_dispatch, self.case.combine_options)

    def combined_in_logfmt(
        self, masks: list[Array] | None = None, at_dispatch: list[Array] | None = None
    ) -> list[tuple[Array, Array]]:
        """The same with rows that travel as they are, and how far the sums of rows in LogFMT may be from that."""
        sums = self._combined(self.outputs, self.topk_weights, masks, at_dispatch, {})
        bounds = [reference.logfmt_bound(rows) for rows in self.outputs]
        weights = [np.abs(array) for array in self.topk_weights]
        # Both sums are rounded to bfloat16; the sum of the bounds is, too.
        slack = [1.01 * bound.astype(np.float64) for bound in self._combined(bounds, weights, masks, at_dispatch, {})]
        with np.errstate(invalid="ignore"):  # Inf and NaN
            return [
                (x, far + 2.0**-7 * (np.abs(x.astype(np.float64)) + far) + 1e-40)
                for x, far in zip(sums, slack, strict=True)
            ]

    def _combined(
        self, outputs: list[Array], weights: list[Array], masks: Any, at_dispatch: Any, options: dict[str, bool]
    ) -> list[Array]:
        return reference.low_latency_combine(
            outputs, self.topk_idx, weights, self.dispatched(at_dispatch), masks=masks, **options
        )


@functools.lru_cache(maxsize=4)
def _low_latency_inputs(case: LowLatencyCase, num_ranks: int, seed: int) -> LowLatencyInputs:
    num_tokens = _num_tokens(case.tokens, num_ranks)
    total, num_experts = sum(num_tokens), case.experts_per_rank * num_ranks
    num_topk = min(case.num_topk, num_experts)
    shape = (case.experts_per_rank, num_ranks * case.max_tokens, case.hidden)
    weights = rows(total, num_topk, np.float32, seed + _WEIGHTS_SEED, case.is_special)
    num_outputs = num_ranks * shape[0] * shape[1]
    outputs = rows(num_outputs, case.hidden, BF16, seed + _OUTPUT_SEED, case.is_special)
    if case.is_cancelling:
        weights = np.copysign(np.float32(1), weights)
        outputs[:, ::2] = CANCELLING[testing.token_data(num_outputs, case.hidden, np.uint8, seed=seed)[:, ::2] % 4]
    return LowLatencyInputs(
        case=case,
        num_experts=num_experts,
        x=_by_rank(rows(total, case.hidden, BF16, seed, case.is_special), num_tokens),
        topk_idx=_by_rank(case.routing(total, num_experts, num_topk, seed=seed).astype(case.topk_dtype), num_tokens),
        topk_weights=_by_rank(weights, num_tokens),
        outputs=list(outputs.reshape(num_ranks, *shape)),
    )


LOW_LATENCY_CASES = (
    LowLatencyCase("bfloat16"),
    LowLatencyCase("bfloat16_tiny_rows", hidden=8, topk_dtype=np.int32),
    LowLatencyCase("fp8", cast=("use_fp8",)),
    LowLatencyCase("fp8_power_of_two", cast=("use_fp8", "round_scale"), hidden=384),
    LowLatencyCase("fp8_ue8m0", cast=("use_fp8", "round_scale", "use_ue8m0"), hidden=640),
    LowLatencyCase("fp8_ue8m0_hidden_7168", cast=("use_fp8", "round_scale", "use_ue8m0"), hidden=7168, tokens=(2, 3)),
    LowLatencyCase("full", tokens=(16,), num_topk=6, experts_per_rank=4, routing=testing.uniform_routing),
    LowLatencyCase("zero_tokens_on_one_rank", tokens=(4, 0, 9), cast=("use_fp8",)),
    LowLatencyCase("zero_tokens_everywhere", tokens=(0,), cast=("use_fp8", "round_scale")),
    LowLatencyCase("all_to_one_expert", routing=to_one_expert),
    LowLatencyCase("all_masked", routing=all_masked),
    LowLatencyCase("zipf_skew", routing=testing.zipf_routing, experts_per_rank=8, cast=("use_fp8",)),
    LowLatencyCase("one_expert_per_rank", experts_per_rank=1, num_topk=8),
    LowLatencyCase("cancelling", tokens=(16,), num_topk=6, experts_per_rank=4, is_cancelling=True),
    LowLatencyCase("special_bfloat16", is_special=True),
    LowLatencyCase("special_fp8", is_special=True, cast=("use_fp8",)),
    LowLatencyCase("special_fp8_ue8m0", is_special=True, cast=("use_fp8", "round_scale", "use_ue8m0")),
)


def _with_combine(option: str, names: tuple[str, ...]) -> tuple[LowLatencyCase, ...]:
    """Some of `LOW_LATENCY_CASES`, with an option of combine."""
    cases = [case for case in LOW_LATENCY_CASES if case.name in names]
    assert len(cases) == len(names)
    return tuple(replace(case, name=f"{option}_{case.name}", combine=(option,)) for case in cases)


_ROUTED = (
    "bfloat16",
    "full",
    "zero_tokens_on_one_rank",
    "zero_tokens_everywhere",
    "all_to_one_expert",
    "all_masked",
    "zipf_skew",
    "one_expert_per_rank",
    "special_bfloat16",
)
LOGFMT_CASES = (
    *_with_combine("use_logfmt", (*_ROUTED, "fp8_ue8m0")),
    LowLatencyCase("use_logfmt_hidden_7168", hidden=7168, tokens=(2, 3), max_tokens=4, combine=("use_logfmt",)),
)
PRE_REDUCE_CASES = _with_combine(
    "pre_reduce", (*_ROUTED, "bfloat16_tiny_rows", "fp8", "fp8_ue8m0_hidden_7168", "cancelling")
)
