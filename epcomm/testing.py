"""Helpers for tests and benchmarks of programs that use epcomm: routing, data, fp8 casts, comparison, timing.

Routing and data depend on the seed and on the *global* index of a token only, so any rank can recompute any
row that it received: row i of ``f(n, ..., first_token=a)`` is row ``a + i`` of ``f(a + n, ...)``.

Nothing here is collective except `bench` with a communicator. Arguments called array may be NumPy arrays or
CPU arrays of another framework.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from epcomm import reference
from epcomm.errors import DtypeError, RoutingError, ShapeError

if TYPE_CHECKING:
    from epcomm.bootstrap import Communicator

__all__ = [
    "BenchResult",
    "assert_bitwise",
    "bench",
    "calc_diff",
    "create_grouped_scores",
    "grouped_routing",
    "init_dist",
    "inplace_unique",
    "masked_routing",
    "one_hot_routing",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "run_local",
    "token_data",
    "uniform_routing",
    "zipf_routing",
]

Array: TypeAlias = NDArray[Any]

# Rows are hashed in pieces of about this many elements, which stay in the cache between the steps.
_BLOCK_ELEMENTS = 1 << 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(h: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, in place: every input bit reaches every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h ^= h >> np.uint64(shift)
        h *= np.uint64(factor)
    h ^= h >> np.uint64(31)
    return h


def _hashes(seed: int, first_token: int, num_tokens: int, num_columns: int) -> NDArray[np.uint64]:
    """uint64 ``[num_tokens, num_columns]``, a function of (seed, token, column) that looks random."""
    key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    tokens = np.arange(first_token, first_token + num_tokens, dtype=np.uint64)
    columns = np.arange(num_columns, dtype=np.uint64)
    return _mix(_mix(tokens * _GOLDEN + key)[:, None] + columns * _GOLDEN)


def _unit(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform in (0, 1]; never 0, so it has a logarithm and differs from a masked score."""
    return ((hashes >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def _topk(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """int64 ``[T, k]``, the columns with the largest scores of each row, largest first."""
    if not 0 < k <= scores.shape[1]:
        raise ShapeError("num_topk", got=k, wanted=f"1 .. {scores.shape[1]}, the number of experts (or groups)")
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1).astype(np.int64, copy=False)


def uniform_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int, first_token: int = 0
) -> NDArray[np.int64]:
    """Every set of experts equally likely.

    Args:
        num_tokens: T, may be 0.
        num_experts: E.
        num_topk: K, 1 .. E.
        seed: any integer.
        first_token: global index of the first token.

    Returns:
        topk_idx, int64 ``[T, K]``, different experts in every row.

    Raises:
        ShapeError: `num_topk` is not in 1 .. E.
    """
    return _topk(_unit(_hashes(seed, first_token, num_tokens, num_experts)), num_topk)


def zipf_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int, first_token: int = 0, exponent: float = 1.2
) -> NDArray[np.int64]:
    """Expert e drawn with weight ``1 / (e + 1) ** exponent``, without replacement.

    The popular experts are neighbours, so rank 0 gets most of the tokens: the least balanced placement.
    Arguments, result and errors as for `uniform_routing`.
    """
    weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    # Exponential race: with arrival times of rate w, the first K to arrive are K draws without replacement.
    arrival = -np.log(_unit(_hashes(seed, first_token, num_tokens, num_experts))) / weights
    return _topk(-arrival, num_topk)


def grouped_routing(
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    *,
    seed: int,
    num_groups: int,
    num_topk_groups: int,
    first_token: int = 0,
) -> NDArray[np.int64]:
    """Group-limited routing: the experts of a token lie in its `num_topk_groups` best groups.

    A group is ``E / num_groups`` neighbours, say the experts of one node; its score is that of its best
    expert. Other arguments and the result as for `uniform_routing`.

    Raises:
        ShapeError: E is not a multiple of `num_groups`, or the chosen groups have fewer than K experts.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError("num_experts", got=num_experts, wanted=f"a multiple of num_groups={num_groups}")
    if num_topk > num_topk_groups * (num_experts // num_groups):
        raise ShapeError(
            "num_topk", got=num_topk, wanted=f"at most {num_topk_groups} groups of {num_experts // num_groups} experts"
        )
    scores = _unit(_hashes(seed, first_token, num_tokens, num_experts))
    group_scores = scores.reshape(num_tokens, num_groups, num_experts // num_groups).max(axis=2)
    return _topk(create_grouped_scores(scores, _topk(group_scores, num_topk_groups), num_groups), num_topk)


def one_hot_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int = 0, first_token: int = 0, expert: int = 0
) -> NDArray[np.int64]:
    """One expert takes all: the first choice of every token is `expert`, the others are -1.

    `seed` and `first_token` change nothing; they are there so that generators can be exchanged.

    Raises:
        RoutingError: `expert` is not in 0 .. E - 1.
    """
    if not 0 <= expert < num_experts:
        raise RoutingError("expert", got=expert, wanted=f"0 .. {num_experts - 1}")
    topk_idx = np.full((num_tokens, num_topk), -1, np.int64)
    topk_idx[:, :1] = expert
    return topk_idx


def masked_routing(
    num_tokens: int, num_experts: int, num_topk: int, *, seed: int, masked_fraction: float, first_token: int = 0
) -> NDArray[np.int64]:
    """`uniform_routing` with about `masked_fraction` (0 .. 1) of the entries set to -1.

    Some tokens lose all their choices.
    """
    topk_idx = uniform_routing(num_tokens, num_experts, num_topk, seed=seed, first_token=first_token)
    # ~seed: hashes that have nothing to do with those that chose the experts.
    topk_idx[_unit(_hashes(~seed, first_token, num_tokens, num_topk)) <= masked_fraction] = -1
    return topk_idx


def token_data(num_tokens: int, hidden: int, dtype: DTypeLike, *, seed: int = 0, first_token: int = 0) -> Array:
    """Rows that look random.

    Floats lie in [-4, 4], one element in 64 is -0; 8-bit integers take all their values.

    Args:
        num_tokens: T, may be 0.
        hidden: H, channels.
        dtype: bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8.
        seed: any integer.
        first_token: global index of the first token.

    Returns:
        ``[T, H]`` of `dtype`.

    Raises:
        DtypeError: another dtype.
    """
    dtype = np.dtype(dtype)
    names = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int8")
    if dtype.name not in names:
        raise DtypeError("dtype", got=dtype.name, wanted=f"one of {', '.join(names)}")
    x = np.empty((num_tokens, hidden), dtype)
    rows_per_block = max(1, _BLOCK_ELEMENTS // max(1, hidden))
    for begin in range(0, num_tokens, rows_per_block):
        block = x[begin : begin + rows_per_block]
        hashes = _hashes(seed, first_token + begin, *block.shape)
        if dtype.itemsize == 1 and dtype.kind in "iu":
            block.view(np.uint8)[...] = hashes >> np.uint64(56)
            continue
        values = (hashes >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-21) - np.float32(4)
        values[hashes & np.uint64(63) == 0] = -0.0
        block[...] = values.astype(dtype)
    return x


def create_grouped_scores(scores: Any, group_idx: Any, num_groups: int) -> Any:
    """Scores with 0 for the experts outside of the groups of their token.

    Args:
        scores: array ``[T, E]``.
        group_idx: integer array ``[T, num_topk_groups]``, the groups of each token.
        num_groups: groups of ``E / num_groups`` neighbouring experts.

    Returns:
        A new array like `scores`, of the same framework.

    Raises:
        ShapeError: E is not a multiple of `num_groups`.
    """
    host_scores = _host(scores, "scores")
    num_tokens, num_experts = host_scores.shape
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError("scores", got=f"{num_experts} experts", wanted=f"a multiple of num_groups={num_groups}")
    is_chosen = np.zeros((num_tokens, num_groups), bool)
    np.put_along_axis(is_chosen, _host(group_idx, "group_idx"), True, axis=1)
    grouped = np.where(np.repeat(is_chosen, num_experts // num_groups, axis=1), host_scores, host_scores.dtype.type(0))
    return _like(grouped, scores)


def inplace_unique(x: Any, num_slots: int) -> None:
    """Replace each row by its distinct non-negative values, the largest first, then -1.

    Turns the expert indices of a token, divided by the experts of a rank, into the ranks it visits.

    Args:
        x: integer array ``[T, K]``, values below `num_slots`; negative ones select nothing.
        num_slots: number of ranks, or of nodes.

    Raises:
        RoutingError: a value of `num_slots` or more.
        ImmutableArray: x is a JAX array.
    """
    rows = _host(x, "x", writable=True)
    if rows.size and rows.max() >= num_slots:
        raise RoutingError("x", got=int(rows.max()), wanted=f"values below num_slots={num_slots}")
    ascending = np.sort(np.maximum(rows, -1), axis=1)
    ascending[:, 1:][ascending[:, 1:] == ascending[:, :-1]] = -1
    rows[...] = np.sort(ascending, axis=1)[:, ::-1]


def calc_diff(x: Any, y: Any) -> float:
    """``1 - 2 sum(x y) / sum(x x + y y)`` of x + 1 and y + 1, in float64.

    Args:
        x: array of numbers.
        y: array of the same shape.

    Returns:
        About the squared relative error: 0.0 when equal, also when both are empty or -1 throughout; NaN if
        there is a NaN.

    Raises:
        ShapeError: the shapes differ.
    """
    a, b = (_host(v, name).astype(np.float64) + 1 for v, name in ((x, "x"), (y, "y")))
    if a.shape != b.shape:
        raise ShapeError("x and y", got=f"{a.shape} and {b.shape}", wanted="equal shapes")
    denominator = float((a * a + b * b).sum())
    return 1.0 - 2.0 * float((a * b).sum()) / denominator if denominator else 0.0


def per_token_cast_to_fp8(x: Any) -> tuple[Any, Any]:
    """Cast rows to float8_e4m3fn with one float32 scale for 128 channels: `epcomm.reference.cast_fp8`.

    Args:
        x: array ``[T, H]`` bfloat16, float16 or float32; H a multiple of 128.

    Returns:
        ``(q [T, H], scales [T, H / 128])`` of the framework of x.

    Raises:
        ShapeError: H is not a multiple of 128.
    """
    q, scales = reference.cast_fp8(_host(x, "x"))
    return _like(q, x), _like(scales, x)


def per_token_cast_back(q: Any, scales: Any) -> Any:
    """``q * scale``, multiplied in float32 and rounded to bfloat16.

    Args:
        q: array ``[..., H]`` float8_e4m3fn; H a multiple of 128.
        scales: array, float32 ``[..., H / 128]``, or int32 ``[..., ceil(H / 512)]`` of four UE8M0 exponent
            bytes each; any strides.

    Returns:
        bfloat16 ``[..., H]`` of the framework of q.

    Raises:
        ShapeError: H is not a multiple of 128, or `scales` does not belong to it.
        DtypeError: `scales` is neither float32 nor int32.
    """
    host_q, host_scales = _host(q, "q"), _host(scales, "scales")
    if host_q.shape[-1] % 128:
        raise ShapeError("q", got=f"{host_q.shape[-1]} channels", wanted="a multiple of 128")
    num_groups = host_q.shape[-1] // 128
    if host_scales.dtype not in (np.float32, np.int32):
        raise DtypeError("scales", got=host_scales.dtype, wanted="float32, or int32 of UE8M0 bytes")
    packed = host_scales.dtype == np.int32
    wanted = (*host_q.shape[:-1], -(-num_groups // 4) if packed else num_groups)
    if host_scales.shape != wanted:
        raise ShapeError("scales", got=f"shape {host_scales.shape}", wanted=wanted)
    if packed:
        exponents = np.ascontiguousarray(host_scales.astype("<i4")).view(np.uint8)[..., :num_groups]
        host_scales = (exponents.astype(np.uint32) << 23).view(np.float32)
    groups = host_q.astype(np.float32).reshape(*host_scales.shape, 128)
    with np.errstate(all="ignore"):
        x = (groups * host_scales[..., None]).astype(ml_dtypes.bfloat16)
    return _like(x.reshape(host_q.shape), q)


def assert_bitwise(got: Any, want: Any, what: str = "") -> None:
    """Check that two arrays have the same dtype, shape and bits; NaN equals NaN whatever its payload.

    Args:
        got: array.
        want: array.
        what: name of the array in the message.

    Raises:
        AssertionError: they differ; has the number of differing elements, and the first of them with
            their values and bits.
    """
    prefix = f"{what}: " if what else ""
    a, b = _host(got, "got"), _host(want, "want")
    if a.dtype != b.dtype:
        raise AssertionError(f"{prefix}got dtype {a.dtype}, wanted {b.dtype}")
    if a.shape != b.shape:
        raise AssertionError(f"{prefix}got shape {a.shape}, wanted {b.shape}")
    word = np.dtype(f"u{a.dtype.itemsize}")
    a_bits, b_bits = (np.ascontiguousarray(v).view(word).reshape(v.shape) for v in (a, b))
    with np.errstate(invalid="ignore"):  # signalling NaN
        differs = (a_bits != b_bits) & ~(np.isnan(a) & np.isnan(b))
    num_differing = np.count_nonzero(differs)
    if not num_differing:
        return
    digits = 2 * word.itemsize
    lines = [
        f"  {index}: got {a[index]} (0x{int(a_bits[index]):0{digits}x}), "
        f"wanted {b[index]} (0x{int(b_bits[index]):0{digits}x})"
        for index in map(tuple, np.argwhere(differs)[:8].tolist())
    ]
    raise AssertionError("\n".join([f"{prefix}{num_differing} of {a.size} elements differ", *lines]))


@dataclass(frozen=True)
class BenchResult:
    """Times of one function; every repeat counts with its slowest rank.

    Attributes:
        p50_s: median, in seconds.
        p99_s: 99th percentile.
        mean_s: mean.
        min_s: fastest repeat.
        max_s: slowest repeat.
        slowest_rank: the rank that was last in the most repeats.
        times_s: all repeats, in the order they ran.
    """

    p50_s: float
    p99_s: float
    mean_s: float
    min_s: float
    max_s: float
    slowest_rank: int
    times_s: tuple[float, ...]


def bench(
    fn: Callable[[], object],
    *,
    warmup: int = 3,
    repeats: int = 20,
    comm: Communicator | None = None,
    before: Callable[[], object] | None = None,
) -> BenchResult:
    """Time a function on the host clock.

    Collective when `comm` is given: all ranks must use the same `warmup` and `repeats`, and get the same
    result.

    Args:
        fn: what is timed; must return when its work is done, so on a GPU it ends with a synchronisation.
        warmup: runs that are not counted.
        repeats: runs that are, at least 1.
        comm: ranks that run `fn` together; they meet in a barrier before each run.
        before: called before each run, and its barrier, untimed; to empty caches, say.

    Raises:
        ShapeError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ShapeError("repeats", got=repeats, wanted="at least 1")
    own_times = []
    for _ in range(warmup + repeats):
        if before is not None:
            before()
        if comm is not None:
            comm.barrier()
        start = time.perf_counter()
        fn()
        own_times.append(time.perf_counter() - start)
    own_times = own_times[warmup:]
    by_rank = np.array(comm.allgather(own_times) if comm is not None else [own_times])
    times = by_rank.max(axis=0)
    return BenchResult(
        p50_s=float(np.percentile(times, 50)),
        p99_s=float(np.percentile(times, 99)),
        mean_s=float(times.mean()),
        min_s=float(times.min()),
        max_s=float(times.max()),
        slowest_rank=int(np.bincount(by_rank.argmax(axis=0)).argmax()),
        times_s=tuple(times.tolist()),
    )


def init_dist(comm: Any = None) -> tuple[int, int, Communicator]:
    """Start MPI if need be and say who we are.

    Args:
        comm: an mpi4py communicator, an object with the `Communicator` protocol, or None for all ranks.

    Returns:
        ``(rank, size, communicator)``.

    Raises:
        BootstrapError: the ranks cannot find each other.
    """
    from epcomm.bootstrap import as_communicator

    communicator = as_communicator(comm)
    return communicator.rank, communicator.size, communicator


def run_local(n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
    """Run ``fn(comm, *args)`` on n ranks that are threads of this process: `epcomm.bootstrap.run_local`.

    Returns:
        The results, by rank.

    Raises:
        TimeoutError: a rank did not return in `timeout_s` seconds.
    """
    from epcomm import bootstrap

    return bootstrap.run_local(n, fn, *args, timeout_s=timeout_s)


def _host(array: Any, name: str, *, writable: bool = False) -> Array:
    """The memory of a CPU array of any framework as a NumPy array."""
    if isinstance(array, np.ndarray):
        return array
    from epcomm.arrays import import_array

    return import_array(array, name, writable=writable).numpy()


def _like(result: Array, array: Any) -> Any:
    """`result` as an array of the framework of `array`."""
    if isinstance(array, np.ndarray):
        return result
    from epcomm.arrays import export_array, framework_of

    return export_array(result, framework_of(array))
