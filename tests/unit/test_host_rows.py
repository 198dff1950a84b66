"""Parts of the host backend by themselves: headers, selections of tokens, ordered sums."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from epcomm import Buffer, reference, run_local
from epcomm.backends.host import rows as host_rows
from epcomm.backends.host.header import Header
from epcomm.backends.host.rows import OrderedSum, select_tokens
from epcomm.layout import HEADER_BYTES, MAX_TEXT
from epcomm.testing import assert_bitwise

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (BF16, np.dtype(np.float16), np.dtype(np.float32))


def header(**changes) -> Header:
    plain = {
        "sequence": 7,
        "operation": 3,
        "messages": 0,
        "grew": 1,
        "window": 2,
        "window_bytes": 1 << 40,
        "agreed": tuple(range(16)),
        "fields": tuple(range(32)),
        "selects": (1, 64, 0, 128),
        "window_name": "/proc/1/fd/2:3:4",
        "rejection": "",
    }
    return Header(**{**plain, **changes})


def test_header_survives_its_cell():
    cell = memoryview(bytearray(HEADER_BYTES))
    header().write(cell)
    assert Header.read(cell) == header()
    assert header().field(2) == (8, 9, 10, 11)
    assert header().select(1) == (0, 128)


def test_header_leaves_nothing_of_the_one_before():
    cell = memoryview(bytearray(b"\xff" * HEADER_BYTES))
    header(rejection="x" * 2000).write(cell)
    header(agreed=(5,), fields=(), selects=(), window_name="", rejection="bad").write(cell)
    read = Header.read(cell)
    assert (read.window_name, read.rejection) == ("", "bad")
    assert read.agreed == (5, *[0] * 15)
    assert not any(read.fields + read.selects)


@pytest.mark.parametrize("text", ["é" * MAX_TEXT, "x" + "é" * MAX_TEXT, "\udc80 lone"])
def test_header_cuts_and_mends_texts(text):
    cell = memoryview(bytearray(HEADER_BYTES))
    header(rejection=text).write(cell)
    read = Header.read(cell).rejection
    assert read
    assert len(read.encode()) <= MAX_TEXT
    assert read == text.encode(errors="replace").decode()[: len(read)]


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 1), (40, 7)])
def test_selected_tokens_ascend_rank_by_rank(shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    selection = select_tokens(mask)
    assert selection.indices.dtype == np.int32
    for rank in range(shape[1]):
        np.testing.assert_array_equal(selection.rows_for(rank), np.flatnonzero(mask[:, rank]))


def random_bits(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Any bits, and every fourth number one of those that sums treat specially."""
    values = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0], dtype)
    return np.where(rng.random(shape) < 0.25, rng.choice(special, shape), values)


@np.errstate(all="ignore")
def sum_by_token(parts: list[np.ndarray], mask: np.ndarray, width: int, biases: list[np.ndarray]) -> np.ndarray:
    """The contract, token by token."""
    sums = np.zeros((len(mask), width), np.float32)
    taken = np.zeros(mask.shape[1], int)
    for token, selected in enumerate(mask):
        for bias in biases:
            sums[token] = sums[token] + bias[token].astype(np.float32)
        for part in np.flatnonzero(selected):
            sums[token] = sums[token] + parts[part][taken[part]].astype(np.float32)
            taken[part] += 1
    return sums


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.8, 1.0, "mixed"])
def test_ordered_sum_has_the_bits_of_the_contract(monkeypatch, dtype, num_biases, density):
    monkeypatch.setattr(host_rows, "_BLOCK_BYTES", 4 * 16 * 10)  # 10 tokens a block, and a last one of 3
    rng = np.random.default_rng(3)
    num_tokens, width = 43, 16
    mask = rng.random((num_tokens, 4)) < ([0.1, 0.9, 0.0, 0.6] if density == "mixed" else density)
    mask[7] = False
    parts = [random_bits(rng, (int(mask[:, part].sum()), width), dtype) for part in range(4)]
    biases = [random_bits(rng, (num_tokens, width), dtype) for _ in range(num_biases)]
    sums = OrderedSum(mask)
    assert sums.counts == mask.sum(axis=0).tolist()
    as_bytes = [part.view(np.uint8).reshape(len(part), width * dtype.itemsize) for part in parts]
    with np.errstate(all="ignore"):
        wanted = sum_by_token(parts, mask, width, biases).astype(dtype)
    for _ in range(2):  # working memory is used again
        assert_bitwise(sums.reduce(as_bytes, width, dtype, biases), wanted)


def test_sums_of_negative_zeros_are_positive():
    part = np.full((3, 16), -0.0, BF16).view(np.uint8)
    summed = OrderedSum(np.ones((3, 2), np.bool_)).reduce([part, part], 16, BF16)
    assert not summed.view(np.uint16).any()


def test_weights_that_live_elsewhere_are_zero_whatever_they_were():
    num_experts, num_tokens, num_topk = 4, 6, 3
    odd = np.array([np.nan, -np.inf, -1.0], np.float32)
    topk_idx = [np.array([[0, 3, 2]] * num_tokens), np.array([[1, -1, 3]] * num_tokens)]
    x = [np.ones((num_tokens, 16), np.float32)] * 2
    weights = [np.broadcast_to(odd, (num_tokens, num_topk)).copy()] * 2
    wanted = reference.dispatch(x, topk_idx, num_experts, topk_weights=weights)

    def program(comm):
        with Buffer(comm) as buffer:
            layout = buffer.get_dispatch_layout(topk_idx[comm.rank], num_experts)
            routing = {"topk_idx": topk_idx[comm.rank], "topk_weights": weights[comm.rank]}
            return buffer.dispatch(x[comm.rank], **layout.arguments(), **routing)

    for got, want in zip(run_local(2, program), wanted, strict=True):
        assert_bitwise(got.recv_topk_idx, want.recv_topk_idx)
        assert_bitwise(got.recv_topk_weights, want.recv_topk_weights)
