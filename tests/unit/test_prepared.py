"""What calls find again of earlier ones that looked the same: checks, and the plans of a CUDA job."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import moe

from epcomm import Buffer
from epcomm.backends.cuda.job import Job
from epcomm.buffer import low_latency_arguments, throughput_arguments
from epcomm.errors import CapacityError, DtypeError, EpcommError, HandleError, LayoutError, ShapeError


@pytest.fixture
def buffer():
    with Buffer(low_latency_mode=True) as one:
        yield one


def strided(array):
    """The same elements, not next to each other."""
    return np.repeat(array, 2, axis=0)[::2]


MINE = moe.inputs(0, 1)
EXPERTS = moe.num_experts(1)
WRONG = {
    "float": (ShapeError, {"num_max_dispatch_tokens_per_rank": float(moe.MAX_TOKENS)}),
    "no_number": (ShapeError, {"num_max_dispatch_tokens_per_rank": [moe.MAX_TOKENS]}),
    "float_experts": (ShapeError, {"num_experts": float(EXPERTS)}),
    "no_number_of_experts": (ShapeError, {"num_experts": np.array([EXPERTS])}),
    "too_many_tokens": (CapacityError, {"num_max_dispatch_tokens_per_rank": 1}),
    "dtype": (DtypeError, {"topk_idx": MINE.topk_idx.astype(np.int16)}),
    "gaps": (LayoutError, {"x": strided(MINE.x)}),
    "shape": (ShapeError, {"topk_idx": MINE.topk_idx[:-1]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_good_call_hides_nothing_from_the_next(buffer, name):
    """Also where the arguments are equal to those of the good one."""
    good = {
        "x": MINE.x,
        "topk_idx": MINE.topk_idx,
        "num_max_dispatch_tokens_per_rank": moe.MAX_TOKENS,
        "num_experts": EXPERTS,
        "use_fp8": False,
    }
    error, change = WRONG[name]
    messages = []
    for _ in range(2):
        buffer.low_latency_dispatch(**good)
        with pytest.raises(EpcommError) as caught:
            buffer.low_latency_dispatch(**{**good, **change})
        assert type(caught.value) is error
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_calls_that_look_the_same_are_checked_once(buffer):
    checks = {
        low_latency_arguments._dispatch_terms: lambda: buffer.low_latency_dispatch(
            MINE.x.copy(), MINE.topk_idx.copy(), moe.MAX_TOKENS, EXPERTS, use_fp8=False
        ),
        throughput_arguments._check_payload: lambda: buffer.dispatch(MINE.x.copy(), handle=handle),
        throughput_arguments._check_combine: lambda: buffer.combine(received.recv_x.copy(), handle),
    }
    layout = moe.layout_arguments(buffer.get_dispatch_layout(MINE.topk_idx, EXPERTS))
    received = buffer.dispatch(MINE.x, **layout)
    handle = received.handle
    for check, call in checks.items():
        for _ in range(16):  # one for each alignment of the copies
            call()
        before = check.cache_info()
        for _ in range(5):
            call()
        after = check.cache_info()
        assert (after.hits - before.hits, after.misses - before.misses) == (5, 0), check.__name__


def test_another_handle_is_another_matter(buffer):
    """Rows that fit one handle and look the same do not fit one with fewer rows."""
    layouts = [buffer.get_dispatch_layout(MINE.topk_idx[:count], EXPERTS) for count in (len(MINE.x), len(MINE.x) - 1)]
    first, second = (
        buffer.dispatch(MINE.x[:count], **moe.layout_arguments(layout))
        for count, layout in zip((len(MINE.x), len(MINE.x) - 1), layouts, strict=True)
    )
    buffer.combine(first.recv_x, first.handle)
    with pytest.raises(HandleError):
        buffer.combine(first.recv_x, second.handle)
    with pytest.raises(HandleError):
        buffer.dispatch(MINE.x, handle=second.handle)
    buffer.combine(first.recv_x, first.handle)


def test_plans_are_made_once(monkeypatch):
    made = []

    class Plan:
        def __init__(self, job, *terms):
            if terms == ("impossible",):
                raise CapacityError("plan")
            made.append(terms)

    class OtherPlan(Plan):
        pass

    job = Job.__new__(Job)
    job._plans = {}
    assert job.plan(Plan, 1, "a") is job.plan(Plan, 1, "a")
    assert job.plan(Plan, 1, "b") is not job.plan(Plan, 1, "a")
    assert type(job.plan(OtherPlan, 1, "a")) is OtherPlan
    assert made == [(1, "a"), (1, "b"), (1, "a")]
    for _ in range(2):  # what cannot be is said each time
        with pytest.raises(CapacityError):
            job.plan(Plan, "impossible")
    monkeypatch.setattr("epcomm.backends.cuda.job._MANY_PLANS", 10)
    for number in range(100):
        job.plan(Plan, number)
        assert len(job._plans) <= 10
