"""What ranks tell each other at the start of a call, and the comparison of it.

Every call of the host backend carries a header, so a rank that rejects its input, or that disagrees with the
others, makes all ranks raise in that same call and leaves every Buffer usable.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from epcomm.errors import PeerError, RankMismatch
from epcomm.layout import HEADER, MAX_AGREED
from epcomm.numerics import ROW_DTYPES

__all__ = ["Operation", "check_headers", "dtype_code", "write_header"]


class Operation(IntEnum):
    """Calls that ranks must make together; `label` is the method's name."""

    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    FORWARD_DISPATCH = 4
    FORWARD_COMBINE = 5
    LOW_LATENCY_DISPATCH = 6
    LOW_LATENCY_COMBINE = 7
    CLEAN_MASKS = 8
    BARRIER = 9

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {
    Operation.DISPATCH: "dispatch",
    Operation.CACHED_DISPATCH: "dispatch(handle=...)",
    Operation.COMBINE: "combine",
    Operation.FORWARD_DISPATCH: "dispatch, second hop",
    Operation.FORWARD_COMBINE: "combine, second hop",
    Operation.LOW_LATENCY_DISPATCH: "low_latency_dispatch",
    Operation.LOW_LATENCY_COMBINE: "low_latency_combine",
    Operation.CLEAN_MASKS: "low_latency_clean_mask_buffer",
    Operation.BARRIER: "barrier",
}

# Names of the values that must agree, by operation, in the order of HEADER["agreed"].
_PAYLOAD = ("hidden", "dtype", "num_scales", "scales_itemsize")
_CONFIG = ("config nvl_send", "config nvl_recv", "config rdma_send", "config rdma_recv")
_LOW_LATENCY = ("hidden", "num_topk", "num_experts", "num_max_dispatch_tokens_per_rank")
AGREED: dict[Operation, tuple[str, ...]] = {
    Operation.DISPATCH: (
        *_PAYLOAD,
        "num_topk",
        "num_experts",
        "topk_idx itemsize",
        "topk_weights",
        "num_worst_tokens",
        "expert_alignment",
        *_CONFIG,
    ),
    Operation.CACHED_DISPATCH: (*_PAYLOAD, "handle of dispatch", *_CONFIG),
    Operation.COMBINE: ("hidden", "dtype", "num_topk", "handle of dispatch", *_CONFIG),
    Operation.FORWARD_DISPATCH: (),
    Operation.FORWARD_COMBINE: (),
    Operation.LOW_LATENCY_DISPATCH: (*_LOW_LATENCY, "use_fp8", "round_scale", "use_ue8m0"),
    Operation.LOW_LATENCY_COMBINE: _LOW_LATENCY,
    Operation.CLEAN_MASKS: (),
    Operation.BARRIER: (),
}


def dtype_code(dtype: np.dtype[np.generic]) -> int:
    """Number of a row dtype in headers."""
    return ROW_DTYPES.index(dtype)


def write_header(
    header: NDArray[np.void],
    operation: Operation,
    sequence: int,
    agreed: Mapping[str, int],
    num_tokens: int,
    rejection: str,
) -> None:
    """Fill a header cell; `rejection` is empty, or why this rank rejects its own input."""
    header[...] = np.zeros((), HEADER)
    header["sequence"], header["operation"], header["num_tokens"] = sequence, operation, num_tokens
    header["status"] = bool(rejection)
    if rejection:
        header["text"] = rejection.encode()[: HEADER["text"].itemsize].decode(errors="ignore").encode()
    else:
        values = [agreed[name] for name in AGREED[operation]]
        header["agreed"][: len(values)] = values
    assert len(AGREED[operation]) <= MAX_AGREED


def _show(name: str, value: int) -> str:
    return ROW_DTYPES[value].name if name == "dtype" else str(value)


def _by_rank(values: Mapping[int, str]) -> list[str]:
    """A column of `RankMismatch.table`; masked ranks are not in `values`."""
    return [values.get(rank, "masked") for rank in range(max(values) + 1)]


def check_headers(operation: Operation, rank: int, headers: Mapping[int, NDArray[np.void]]) -> None:
    """Compare the headers of the ranks of a call.

    Raises:
        PeerError: another rank rejected its input. A rank that rejected its own raises that error itself.
        RankMismatch: the ranks made different calls, or calls with different values.
    """
    if len({int(h["operation"]) for h in headers.values()}) > 1:
        calls = {r: Operation(int(h["operation"])).label for r, h in headers.items()}
        raise RankMismatch("ranks made different calls", {"call": _by_rank(calls)})
    rejected = {r: h["text"].item().decode() for r, h in headers.items() if h["status"]}
    if rejected:
        if rank in rejected:
            return  # its caller raises the original exception
        raise PeerError(operation.label, rejected)
    first = next(iter(headers.values()))["agreed"].tobytes()
    if all(h["agreed"].tobytes() == first for h in headers.values()):
        return
    table = {}
    for index, name in enumerate(AGREED[operation]):
        values = {r: int(h["agreed"][index]) for r, h in headers.items()}
        if len(set(values.values())) > 1:
            table[name] = _by_rank({r: _show(name, value) for r, value in values.items()})
    raise RankMismatch(f"{operation.label}: ranks disagree", table)
