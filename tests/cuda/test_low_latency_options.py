"""Options of a low-latency combine on a GPU: LogFMT within its bound, sums of each owner bitwise."""

from __future__ import annotations

import pytest
from helpers import checks, low_latency
from helpers.cases import LowLatencyCase
from helpers.gpu import need_gpu
from helpers.low_latency import BF16, COMBINES, LOGFMT, PRE_REDUCE, combine_cases, either_option
from helpers.low_latency import make_cuda_buffer as make_buffer
from helpers.nodes import nodes  # noqa: F401

from epcomm.testing import uniform_routing

need_gpu()
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def buffer():
    """One Buffer for all cases of a job: each finds what the ones before it have left behind."""
    with make_buffer() as shared:
        yield shared
        shared.check()


@pytest.mark.ranks((1, 2, 3, 5, 8))
@combine_cases
def test_case(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


WIDE = {
    "7176_channels": LowLatencyCase("7176 channels", hidden=7176, tokens=(3, 16, 1), combine=("pre_reduce",)),
    "48_bytes": LowLatencyCase("48 bytes", hidden=24, combine=("pre_reduce",)),
    "topk_32": LowLatencyCase(
        "topk 32", num_topk=32, experts_per_rank=40, routing=uniform_routing, combine=("pre_reduce",)
    ),
    "logfmt_of_100_tokens": LowLatencyCase(
        "LogFMT of 100 tokens", tokens=(97, 100, 3), max_tokens=100, hidden=896, combine=("use_logfmt",)
    ),
    "logfmt_topk_32": LowLatencyCase(
        "LogFMT topk 32", num_topk=32, experts_per_rank=40, routing=uniform_routing, combine=("use_logfmt",)
    ),
}


@pytest.mark.ranks((1, 3))
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_sizes(buffer, num_ranks, case):
    checks.low_latency_round_trip(buffer, case.inputs(num_ranks))


@pytest.mark.ranks((2, 5))
def test_calls_of_changing_shape(buffer, num_ranks):
    low_latency.calls_of_changing_shape(buffer, 30, combines=COMBINES)


@pytest.mark.ranks(3)
def test_combines_of_several_kinds_in_flight(buffer, comm):
    low_latency.combines_of_several_kinds_in_flight(comm, buffer)


@pytest.mark.ranks(3)
def test_zero_copy_with_logfmt(buffer, num_ranks):
    low_latency.zero_copy(buffer, LOGFMT["full"].inputs(num_ranks))


@pytest.mark.ranks(3)
@pytest.mark.parametrize("ignored", low_latency.IGNORED.values(), ids=low_latency.IGNORED)
def test_masks(buffer, comm, ignored):
    low_latency.masks_that_the_user_sets(comm, buffer, ignored, (LOGFMT["bfloat16"], PRE_REDUCE["bfloat16"], BF16))


@pytest.mark.ranks(3)
@either_option
def test_mask_set_between_dispatch_and_combine(buffer, comm, options):
    low_latency.mask_set_between_dispatch_and_combine(comm, buffer, options["bfloat16"])


@pytest.mark.ranks(3)
@either_option
def test_rank_that_stops_answering_between_dispatch_and_combine(comm, options):
    with make_buffer(comm, enable_shrink=True, timeout_s=2.0) as buffer:
        low_latency.rank_that_stops_answering_between_dispatch_and_combine(comm, buffer, options["full"])
