"""Low-latency dispatch and combine on a GPU: every case bitwise equal to the oracle, hooks, graphs, masks."""

from __future__ import annotations

import pytest
from helpers import checks
from helpers.calls import TIMEOUT_S
from helpers.cases import LOW_LATENCY_CASES
from helpers.gpu import need_gpu

from epcomm import Buffer

cupy = need_gpu()
pytestmark = pytest.mark.gpu

AREA_BYTES = 16 << 20
BY_NAME = {case.name: case for case in LOW_LATENCY_CASES}
BF16, FP8, UE8M0 = (BY_NAME[name] for name in ("bfloat16", "fp8", "fp8_ue8m0"))

all_cases = pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.name)


def make_buffer(comm=None, num_rdma_bytes: int = AREA_BYTES, **settings) -> Buffer:
    settings = {"timeout_s": TIMEOUT_S, **settings}
    return Buffer(comm, 1 << 20, num_rdma_bytes, low_latency_mode=True, backend="cuda", **settings)


@pytest.fixture(scope="module")
def buffer():
    """One Buffer for all cases of a job: each finds what the ones before it have left behind."""
    with make_buffer() as shared:
        yield shared


@pytest.mark.ranks((1, 2, 3, 5, 8))
@all_cases
def test_case(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))
