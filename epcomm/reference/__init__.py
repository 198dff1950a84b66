"""The definition of correct: dispatch and combine over all ranks, in one process, in plain NumPy.

Every function takes and returns lists indexed by rank; nothing here communicates, so nothing is collective.
Backends must agree with this package bit for bit. R ranks, E experts, L = E / R experts a rank, T tokens of a
rank, K choices a token, N rows received by a rank, H channels. Expert e lives on rank e // L.

Arithmetic, which is part of the definition:

* Sums run in float32, one term after the other, and are rounded once, to nearest even. A product and the sum
  it goes into are two roundings; there is no fused multiply-add. ``np.sum`` is never used, for it adds in an
  order of its own.
* Sums start from +0, so a sum of negative zeros is +0.
* Subnormals are kept, in inputs, in partial sums and in results.
* NaN and Inf go through sums as IEEE 754 says. The payload and sign of a NaN are not defined.
"""

from epcomm.reference.formats import (
    LOGFMT_CALC_DIFF,
    LOGFMT_FLOOR,
    LOGFMT_RELATIVE_ERROR,
    cast_fp8,
    decode_logfmt,
    encode_logfmt,
    logfmt_bound,
)
from epcomm.reference.low_latency import LowLatencyDispatched, low_latency_combine, low_latency_dispatch
from epcomm.reference.throughput import Dispatched, Layout, combine, dispatch, get_dispatch_layout

__all__ = [
    "LOGFMT_CALC_DIFF",
    "LOGFMT_FLOOR",
    "LOGFMT_RELATIVE_ERROR",
    "Dispatched",
    "Layout",
    "LowLatencyDispatched",
    "cast_fp8",
    "combine",
    "decode_logfmt",
    "dispatch",
    "encode_logfmt",
    "get_dispatch_layout",
    "logfmt_bound",
    "low_latency_combine",
    "low_latency_dispatch",
]
