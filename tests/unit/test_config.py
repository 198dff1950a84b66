"""Config, its tables, and the size hints against the formulas of their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
from helpers.calls import raises

from epcomm import Buffer, Config, config
from epcomm.buffer.tuning import Tuning
from epcomm.errors import ShapeError
from epcomm.numerics import BFLOAT16

MIB = 1 << 20
NAMES = (
    "num_sms",
    "num_max_nvl_chunked_send_tokens",
    "num_max_nvl_chunked_recv_tokens",
    "num_max_rdma_chunked_send_tokens",
    "num_max_rdma_chunked_recv_tokens",
)
METADATA_BYTES = 400  # of a row: 32 choices of 8 + 4 bytes, and where it comes from


@pytest.fixture
def num_sms():
    """Restores the class-wide number of SMs."""
    before = Buffer.num_sms
    yield before
    Buffer.set_num_sms(before)


def test_positions_and_defaults_are_deepeps():
    assert tuple(inspect.signature(Config).parameters) == NAMES
    assert Config().values() == (20, 6, 256, 6, 256)
    assert Config(1, 2, 3, 4, 5).values() == (1, 2, 3, 4, 5)


def test_frozen_and_comparable():
    assert Config(24) == Config(24) != Config(20)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().num_sms = 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [0, -1, 2.0, "6", None])
def test_every_value_is_a_count(name, wrong):
    with raises(ShapeError, f"^Config.{name}: got .*; wanted an integer from 1 to 2147483647"):
        Config(**{name: wrong})


@pytest.mark.parametrize("link", ["nvl", "rdma"])
def test_a_send_fits_its_ring(link):
    send, recv = f"num_max_{link}_chunked_send_tokens", f"num_max_{link}_chunked_recv_tokens"
    assert getattr(Config(**{send: 16, recv: 16}), send) == 16
    with raises(ShapeError, f"^Config.{send}: got 17; wanted at most the ring of 16"):
        Config(**{send: 17, recv: 16})


# -- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("get", [Buffer.get_dispatch_config, Buffer.get_combine_config])
def test_tables_have_every_number_of_ranks(get, num_sms):
    """1, 3, 5 and 7 as well as what DeepEP knows, and more than that."""
    for num_ranks in (*range(1, 200), 1000):
        assert get(num_ranks).num_sms == num_sms
    with raises(ShapeError, "^num_ranks: got 0; wanted at least 1"):
        get(0)


@pytest.mark.parametrize(
    ("get", "num_ranks", "wanted"),
    [
        (Buffer.get_dispatch_config, 2, (24, 256, 6, 128)),
        (Buffer.get_dispatch_config, 8, (6, 256, 6, 128)),
        (Buffer.get_dispatch_config, 144, (32, 720, 12, 128)),
        (Buffer.get_combine_config, 2, (10, 256, 6, 128)),
        (Buffer.get_combine_config, 8, (4, 256, 6, 128)),
        (Buffer.get_combine_config, 64, (1, 288, 8, 128)),
    ],
)
def test_rows_that_deepep_documents(get, num_ranks, wanted):
    assert get(num_ranks).values()[1:] == wanted


@pytest.mark.parametrize(("between", "like"), [(1, 2), (3, 4), (5, 8), (9, 16), (65, 96), (161, 160)])
def test_numbers_between_rows_take_the_next_larger_one(between, like):
    assert Buffer.get_dispatch_config(between) == Buffer.get_dispatch_config(like)
    assert Buffer.get_combine_config(between) == Buffer.get_combine_config(like)


def test_number_of_sms_is_that_of_the_class(num_sms):
    Buffer.set_num_sms(7)  # odd numbers too
    assert Buffer.get_dispatch_config(8).num_sms == Buffer.get_combine_config(8).num_sms == 7
    with Buffer() as buffer:
        assert buffer.num_sms == buffer.get_dispatch_config(8).num_sms == 7


# -- size hints ---------------------------------------------------------------------------------------------------


def round_up(value, unit):
    return -(-value // unit) * unit


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("hidden_bytes", [16, 100, 4096, 14336])
def test_the_arena_has_room_for_8192_tokens_a_rank(hidden_bytes, num_ranks):
    local_ranks = min(num_ranks, 8)
    needed = 8192 * local_ranks * (round_up(hidden_bytes, 16) + METADATA_BYTES)
    hint = Config().get_nvl_buffer_size_hint(hidden_bytes, num_ranks)
    assert needed <= hint < needed + 2 * MIB
    assert hint % (2 * MIB) == 0


def test_metadata_of_a_row_fits():
    """The formula's 400 bytes hold 32 indices of 8 bytes and 32 weights of 4."""
    assert 32 * (np.dtype(np.int64).itemsize + np.dtype(np.float32).itemsize) <= METADATA_BYTES
    assert "400 bytes" in inspect.getdoc(Config.get_nvl_buffer_size_hint)


@pytest.mark.parametrize("num_ranks", [1, 2, 7, 8])
def test_one_node_needs_no_ring_between_nodes(num_ranks):
    assert Config().get_rdma_buffer_size_hint(14336, num_ranks) == 0


@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(9, 2), (16, 2), (17, 3), (64, 8)])
@pytest.mark.parametrize(("num_sms", "channels"), [(1, 1), (2, 1), (20, 10), (21, 10)])
def test_rings_between_nodes(num_ranks, num_nodes, num_sms, channels):
    tuning = Config(num_sms, 6, 256, 6, 128)
    needed = 2 * num_nodes * channels * 128 * (14336 + METADATA_BYTES)
    hint = tuning.get_rdma_buffer_size_hint(14336, num_ranks)
    assert hint == round_up(needed, 2 * MIB)


def test_hints_of_throughput_grow_with_everything():
    def inside(hidden_bytes=4096, num_ranks=4):
        return Config().get_nvl_buffer_size_hint(hidden_bytes, num_ranks)

    def between(hidden_bytes=4096, num_ranks=16, ring=128, num_sms=20):
        return Config(num_sms, 6, 256, 6, ring).get_rdma_buffer_size_hint(hidden_bytes, num_ranks)

    assert inside(num_ranks=2) < inside() < inside(num_ranks=8) == inside(num_ranks=16)
    assert inside(hidden_bytes=512) < inside() < inside(hidden_bytes=14336)
    assert between(hidden_bytes=512) < between() < between(hidden_bytes=14336)
    assert between() < min(between(num_ranks=64), between(ring=512), between(num_sms=40))


LOW_LATENCY = {"num_max_dispatch_tokens_per_rank": 128, "hidden": 7168, "num_ranks": 8, "num_experts": 288}


@pytest.mark.parametrize(
    ("tokens", "hidden", "num_ranks", "num_experts"),
    list(itertools.product([1, 128], [8, 128, 7168], [1, 3, 8], [24, 288])),
)
def test_low_latency_formula(tokens, hidden, num_ranks, num_experts):
    def num_pieces(row, most):
        wanted = max(math.ceil(row / most), min(math.ceil(row / 512), math.ceil(512 / tokens)))
        return math.ceil(row / round_up(math.ceil(row / wanted), 512))

    row = round_up(max(2 * hidden, hidden + 4 * math.ceil(hidden / 128)), 128)
    pieces = max(num_pieces(2 * hidden, 4096), num_pieces(hidden, 2048))
    dispatch = 8 * (math.ceil(num_experts / num_ranks) + 1 + tokens * (11 + pieces))
    combine = math.ceil(8 * (num_experts + 10 * tokens * (num_ranks + num_pieces(2 * hidden, 4096))) / 10)
    part = round_up(max(math.ceil(tokens * row / 31), dispatch, combine), 128)
    wanted = round_up(2 * (num_ranks + 10) * 32 * part, 2 * MIB)
    assert Buffer.get_low_latency_rdma_size_hint(tokens, hidden, num_ranks, num_experts) == wanted


def test_low_latency_memory_of_a_large_model():
    """128 tokens, 288 experts, hidden 7168 on 8 ranks."""
    assert Buffer.get_low_latency_rdma_size_hint(**LOW_LATENCY) <= 80e6


@pytest.mark.parametrize("name", LOW_LATENCY)
def test_low_latency_hint_grows_with(name):
    sizes = {**LOW_LATENCY, "hidden": 128} if name == "num_experts" else LOW_LATENCY
    larger = {**sizes, name: 100 * sizes[name]}
    assert config.low_latency_size_hint(**larger) > config.low_latency_size_hint(**sizes)
    with raises(ShapeError, f"^{name}: got 0; wanted at least 1"):
        config.low_latency_size_hint(**{**LOW_LATENCY, name: 0})


def test_low_latency_calls_have_a_default_of_their_own(monkeypatch):
    seen = []
    with Buffer(low_latency_mode=True) as buffer:
        backend = buffer._backend
        run = backend.low_latency_dispatch, backend.low_latency_combine

        def dispatch(turn, request):
            seen.append(request.terms.num_sms)
            return run[0](turn, request)

        def combine(turn, request):
            seen.append(request.terms.num_sms)
            return run[1](turn, request)

        def num_sms(wanted, is_low_latency=False):
            return wanted or (64 if is_low_latency else 24)

        for name, value in {
            "low_latency_dispatch": dispatch,
            "low_latency_combine": combine,
            "num_sms": num_sms,
        }.items():
            monkeypatch.setattr(backend, name, value)
        x, topk_idx = np.zeros((2, 128), BFLOAT16), np.zeros((2, 1), np.int64)
        for is_chosen in (False, True):
            monkeypatch.setattr(Tuning, "_num_sms_chosen", is_chosen)
            monkeypatch.setattr(Tuning, "num_sms", 7)
            handle = buffer.low_latency_dispatch(x, topk_idx, 2, 1, use_fp8=False).handle
            buffer.low_latency_combine(np.zeros((1, 2, 128), BFLOAT16), topk_idx, np.ones((2, 1), np.float32), handle)
    assert seen == [64, 64, 7, 7]
