"""Helpers for tests and benchmarks of programs that use epcomm: routing, data, fp8 casts, comparison, timing.

Routing and data depend on the seed and on the *global* index of a token only, so any rank can recompute any
row that it received: row i of ``f(n, ..., first_token=a)`` is row ``a + i`` of ``f(a + n, ...)``.

Nothing here is collective except `bench` with a communicator. Arguments called array may be NumPy arrays or
CPU arrays of another framework.
"""

from epcomm.testing.routing import (
    grouped_routing,
    masked_routing,
    one_hot_routing,
    token_data,
    uniform_routing,
    zipf_routing,
)
from epcomm.testing.timing import BenchResult, bench, init_dist, run_local
from epcomm.testing.values import (
    assert_bitwise,
    calc_diff,
    create_grouped_scores,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
)

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
