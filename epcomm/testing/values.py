"""Helpers over values: group masks, distinct values, fp8 casts, differences, bitwise comparison."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm import reference
from epcomm.errors import DtypeError, RoutingError, ShapeError

__all__ = [
    "assert_bitwise",
    "calc_diff",
    "create_grouped_scores",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
]

Array: TypeAlias = NDArray[Any]


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
