"""The oracle itself, pinned by cases small enough to work out by hand."""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm import reference
from epcomm.errors import CapacityError, InputError, RoutingError, ShapeError

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

# Two ranks, four experts: experts 0, 1 on rank 0 and 2, 3 on rank 1.
TWO_RANKS_TOPK = [
    np.array([[0, 3], [1, 0], [-1, -1]]),  # token 0 -> both, token 1 -> rank 0 once, token 2 -> nowhere
    np.array([[2, -1], [-1, 1]]),  # token 0 -> rank 1, token 1 -> rank 0
]


def two_ranks_x():
    return [np.array([[10, 10], [11, 11], [12, 12]], np.float32), np.array([[20, 20], [21, 21]], np.float32)]


def everywhere(num_ranks):
    """One token on rank 0 that visits every rank (one expert each); no tokens on the others."""
    return [np.arange(num_ranks)[None]] + [np.zeros((0, num_ranks), int)] * (num_ranks - 1)


def combine_one_token(values, dtype, **options):
    """Combine one token of rank 0, hidden 1, that rank r returned as values[r]."""
    x = [np.array([[value]], dtype) for value in values]
    return reference.combine(x, everywhere(len(values)), len(values), **options)[0][0]


class TestLayout:
    def test_by_hand(self):
        layout = reference.get_dispatch_layout(TWO_RANKS_TOPK[0], 4, 2)
        assert layout.num_tokens_per_rank.tolist() == [2, 1]
        assert layout.num_tokens_per_rdma_rank is None
        assert layout.num_tokens_per_expert.tolist() == [2, 1, 0, 1]
        assert layout.is_token_in_rank.tolist() == [[True, True], [True, False], [False, False]]
        assert layout.num_tokens_per_rank.dtype == layout.num_tokens_per_expert.dtype == np.int32

    def test_two_nodes_count_a_token_once_per_node(self):
        layout = reference.get_dispatch_layout(np.array([[0, 1], [1, 2], [3, -1]]), 4, 4, ranks_per_node=2)
        assert layout.num_tokens_per_rank.tolist() == [1, 2, 1, 1]
        assert layout.num_tokens_per_rdma_rank.tolist() == [2, 2]
        assert layout.num_tokens_per_rdma_rank.dtype == np.int32

    def test_no_tokens(self):
        layout = reference.get_dispatch_layout(np.zeros((0, 3), np.int64), 4, 4, ranks_per_node=2)
        assert layout.is_token_in_rank.shape == (0, 4)
        assert layout.num_tokens_per_rdma_rank.tolist() == [0, 0]

    @pytest.mark.parametrize("row", [[0, 4], [-2, 0], [1, 1]], ids=["too_large", "below_minus_one", "repeated"])
    def test_bad_routing_names_the_token(self, row):
        with pytest.raises(RoutingError, match=r"topk_idx\[1\]"):
            reference.get_dispatch_layout(np.array([[0, 1], row]), 4, 2)

    @pytest.mark.parametrize(("num_experts", "num_ranks", "ranks_per_node"), [(5, 2, None), (6, 3, 2), (0, 1, None)])
    def test_sizes_must_divide(self, num_experts, num_ranks, ranks_per_node):
        with pytest.raises(ShapeError):
            reference.get_dispatch_layout(np.array([[-1]]), num_experts, num_ranks, ranks_per_node)


class TestDispatch:
    def test_by_hand(self):
        weights = [np.array([[0.1, 0.2], [0.3, 0.4], [9, 9]], np.float32), np.array([[0.5, 9], [9, 0.6]], np.float32)]
        scales = [np.array([[1], [2], [3]], np.int32), np.array([[4], [5]], np.int32)]
        first, second = reference.dispatch(two_ranks_x(), TWO_RANKS_TOPK, 4, topk_weights=weights, scales=scales)

        assert first.recv_x.tolist() == [[10, 10], [11, 11], [21, 21]]
        assert first.recv_scales.tolist() == [[1], [2], [5]]
        assert first.recv_topk_idx.tolist() == [[0, -1], [1, 0], [-1, 1]]
        assert first.recv_topk_weights.tolist() == np.array([[0.1, 0], [0.3, 0.4], [0, 0.6]], np.float32).tolist()
        assert first.num_recv_tokens_per_expert_list == [2, 2]
        assert (first.recv_src_rank.tolist(), first.recv_src_idx.tolist()) == ([0, 0, 1], [0, 1, 1])
        assert first.num_recv_tokens == 3

        assert second.recv_x.tolist() == [[10, 10], [20, 20]]
        assert second.recv_scales.tolist() == [[1], [4]]
        assert second.recv_topk_idx.tolist() == [[-1, 1], [0, -1]]
        assert second.recv_topk_weights.tolist() == np.array([[0, 0.2], [0.5, 0]], np.float32).tolist()
        assert second.num_recv_tokens_per_expert_list == [1, 1]
        assert (second.recv_src_rank.tolist(), second.recv_src_idx.tolist()) == ([0, 1], [0, 0])

        for received in (first, second):
            assert received.rank_prefix_matrix.tolist() == [[2, 1], [3, 2]]
            assert received.rank_prefix_matrix.dtype == np.int32
            assert received.recv_src_rank.dtype == received.recv_src_idx.dtype == np.int32

    def test_alignment_rounds_up_and_keeps_zero(self):
        topk = [np.array([[0], [0], [0], [0], [0]])]
        assert reference.dispatch([np.zeros((5, 1))], topk, 2, expert_alignment=4)[
            0
        ].num_recv_tokens_per_expert_list == [
            8,
            0,
        ]

    def test_worst_tokens_fill(self):
        weights = [np.ones((3, 2), np.float32), np.ones((2, 2), np.float32)]
        first = reference.dispatch(two_ranks_x(), TWO_RANKS_TOPK, 4, topk_weights=weights, num_worst_tokens=5)[0]
        assert first.recv_x.tolist() == [[10, 10], [11, 11], [21, 21], [0, 0], [0, 0]]
        assert first.recv_topk_idx.tolist() == [[0, -1], [1, 0], [-1, 1], [-1, -1], [-1, -1]]
        assert first.recv_topk_weights.tolist() == [[1, 0], [1, 1], [0, 1], [0, 0], [0, 0]]
        assert first.recv_src_rank.tolist() == [0, 0, 1, -1, -1]
        assert first.recv_src_idx.tolist() == [0, 1, 1, -1, -1]
        assert first.num_recv_tokens == 3
        assert first.num_recv_tokens_per_expert_list == []

    def test_worst_tokens_drop_the_last_rows(self):
        first = reference.dispatch(two_ranks_x(), TWO_RANKS_TOPK, 4, num_worst_tokens=2)[0]
        assert first.recv_x.tolist() == [[10, 10], [11, 11]]
        assert first.num_recv_tokens == 2
        assert first.rank_prefix_matrix.tolist() == [[2, 1], [3, 2]]

    @pytest.mark.parametrize("dtype", [BF16, E4M3, np.float16, np.uint8], ids=str)
    def test_dtypes_are_kept(self, dtype):
        topk = [np.array([[0]], np.int32), np.zeros((0, 1), np.int32)]
        x = [np.array([[3]], dtype), np.zeros((0, 1), dtype)]
        weights = [np.array([[2]], BF16), np.zeros((0, 1), BF16)]
        first, second = reference.dispatch(x, topk, 2, topk_weights=weights)
        assert first.recv_x.dtype == second.recv_x.dtype == dtype
        assert first.recv_topk_idx.dtype == second.recv_topk_idx.dtype == np.int32
        assert first.recv_topk_weights.dtype == BF16
        assert second.recv_x.shape == (0, 1)
        assert second.recv_topk_idx.shape == (0, 1)

    def test_lengths_must_agree(self):
        with pytest.raises(ShapeError, match="topk_idx"):
            reference.dispatch([np.zeros((2, 1))], [np.array([[0]])], 1)


class TestCombine:
    def test_by_hand(self):
        outputs = [np.array([[1], [2], [4]], np.float32), np.array([[8], [16]], np.float32)]
        weights = [np.array([[1, 0], [2, 3], [0, 4]], np.float32), np.array([[0, 5], [6, 0]], np.float32)]
        first, second = reference.combine(outputs, TWO_RANKS_TOPK, 4, topk_weights=weights)
        assert first[0].tolist() == [[9], [2], [0]]
        assert first[1].tolist() == [[1, 5], [2, 3], [0, 0]]
        assert second[0].tolist() == [[16], [4]]
        assert second[1].tolist() == [[6, 0], [0, 4]]

    def test_no_weights_gives_none(self):
        assert reference.combine([np.ones((1, 1), BF16)], [np.array([[0]])], 1)[0][1] is None

    def test_ranks_ascend(self):
        # 2^24 + 1 is a tie and goes back to 2^24 each time; the other order would give 2^24 + 2.
        assert combine_one_token([2.0**24, 1, 1], np.float32) == 2.0**24
        assert combine_one_token([1, 1, 2.0**24], np.float32) == 2.0**24 + 2

    def test_bias_comes_first_and_is_rounded_with_the_sum(self):
        one = np.ones((1, 1), np.float32)
        no_tokens = [None, None]
        got = combine_one_token([1, 2.0**24, -(2.0**24)], np.float32, bias=[(one, one), *no_tokens])
        assert got == 4  # 1 + 1 + 1 = 3; 2^24 + 3 is a tie, to 2^24 + 4; bias last would give 2
        # bfloat16 holds 256 and 258; 256 + 1 + 1 is exact in float32 and is rounded once.
        ones = np.ones((1, 1), BF16)
        assert combine_one_token([256], BF16, bias=[(ones, ones)]) == 258
        # Nor is the sum of the biases rounded before the rows come: 256 + 1 is 256 in bfloat16.
        assert combine_one_token([1], BF16, bias=[(ones * BF16.type(256), ones)]) == 258

    def test_one_rounding_to_nearest_even(self):
        assert combine_one_token([256, 1], BF16) == 256
        assert combine_one_token([258, 1], BF16) == 260
        assert combine_one_token([256, 1, 2.0**-8], BF16) == 258  # just above the tie
        assert combine_one_token([2048, 1], np.float16) == 2048

    def test_token_sent_nowhere_gives_its_bias(self):
        topk = [np.array([[-1]])]
        empty = [np.zeros((0, 2), BF16)]
        assert reference.combine(empty, topk, 1)[0][0].tolist() == [[0, 0]]
        got = reference.combine(empty, topk, 1, bias=[np.array([[3, -4]], BF16)])[0][0]
        assert got.tolist() == [[3, -4]]

    def test_negative_zeros_sum_to_positive_zero(self):
        assert not np.signbit(combine_one_token([-0.0, -0.0], BF16)).any()
        assert not np.signbit(combine_one_token([-0.0, -0.0], BF16, ranks_per_node=1)).any()

    def test_subnormals_are_kept(self):
        smallest = np.finfo(np.float32).smallest_subnormal
        assert combine_one_token([smallest, smallest], np.float32).view(np.uint32) == 2
        assert combine_one_token([2.0**-133], BF16).view(np.uint16) == 1

    def test_nan_and_inf(self):
        assert np.isnan(combine_one_token([np.nan, 1], BF16)).all()
        assert np.isnan(combine_one_token([np.inf, -np.inf], BF16)).all()
        assert combine_one_token([3e38, 3e38], BF16) == np.inf

    def test_two_levels_round_each_node_the_own_one_too(self):
        # 256 + 1 is rounded to 256 in a node; all in float32, 256 + 1 + 1 = 258.
        assert combine_one_token([256, 1, 1], BF16) == 258
        assert combine_one_token([256, 1, 1, 0], BF16, ranks_per_node=2) == 256
        # In float32 nothing is rounded between, but the ranks of a node come together first.
        assert combine_one_token([2.0**24, 1, 1, 0], np.float32, ranks_per_node=2) == 2.0**24
        assert combine_one_token([2.0**24, 0, 1, 1], np.float32, ranks_per_node=2) == 2.0**24 + 2

    def test_nodes_ascend(self):
        assert combine_one_token([2.0**24, 1, 1], np.float32, ranks_per_node=1) == 2.0**24
        assert combine_one_token([1, 1, 2.0**24], np.float32, ranks_per_node=1) == 2.0**24 + 2

    def test_two_levels_add_the_bias_after_the_nodes_were_rounded(self):
        bias = [np.ones((1, 1), BF16), None]
        # One node: 1 + 256 + 1 = 258. Two nodes of one rank: the same, for partials of one row are exact.
        assert combine_one_token([256, 1], BF16, bias=bias) == 258
        assert combine_one_token([256, 1], BF16, bias=bias, ranks_per_node=1) == 258
        # Two nodes of two ranks: the first node rounds 256 + 1 to 256, then 1 + 256 rounds to 256.
        biases = [np.ones((1, 1), BF16), None, None, None]
        assert combine_one_token([256, 1, 0, 0], BF16, bias=biases) == 258
        assert combine_one_token([256, 1, 0, 0], BF16, bias=biases, ranks_per_node=2) == 256

    def test_two_levels_sum_the_weights_in_the_same_order(self):
        x = [np.zeros((1, 1), BF16)] * 4
        weights = [np.array([[w, 0, 0, 0]], np.float32) for w in (2.0**24, 0, 1, 1)]
        one = reference.combine(x, everywhere(4), 4, topk_weights=weights)[0][1]
        two = reference.combine(x, everywhere(4), 4, topk_weights=weights, ranks_per_node=2)[0][1]
        assert (one[0, 0], two[0, 0]) == (2.0**24, 2.0**24 + 2)
        assert two.dtype == np.float32

    def test_dropped_rows_add_nothing(self):
        topk = [np.array([[0, 1], [0, 1]]), np.array([[0, 1]])]
        x = [np.array([[1], [2]], np.float32), np.array([[8], [16]], np.float32)]
        (first, _), (second, _) = reference.combine(x, topk, 2, num_worst_tokens=2)
        assert first.tolist() == [[9], [18]]
        assert second.tolist() == [[0]]

    def test_padding_rows_are_not_read(self):
        x = [np.array([[1], [np.nan]], np.float32)]
        assert reference.combine(x, [np.array([[0]])], 1, num_worst_tokens=2)[0][0].tolist() == [[1]]

    def test_missing_rows(self):
        with pytest.raises(ShapeError, match="x of rank 1"):
            reference.combine([np.ones((1, 1), BF16), np.ones((0, 1), BF16)], everywhere(2), 2)


@st.composite
def routed_ranks(draw):
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6]))
    num_experts = num_ranks * draw(st.integers(1, 3))
    num_topk = draw(st.integers(1, num_experts))
    row = st.permutations(range(num_experts)).map(lambda experts: experts[:num_topk])
    hole = st.lists(st.booleans(), min_size=num_topk, max_size=num_topk)
    rows = st.tuples(row, hole).map(lambda pair: [-1 if h else e for e, h in zip(*pair, strict=True)])
    topk = [np.array(draw(st.lists(rows, max_size=4)), np.int64).reshape(-1, num_topk) for _ in range(num_ranks)]
    return num_ranks, num_experts, topk


class TestDispatchCombineProperties:
    @settings(max_examples=60, deadline=None)
    @given(routed_ranks())
    def test_combine_of_ones_counts_the_ranks_a_token_visits(self, case):
        num_ranks, num_experts, topk = case
        received = reference.dispatch([np.zeros((len(t), 1)) for t in topk], topk, num_experts)
        ones = [np.ones((r.num_recv_tokens, 1), BF16) for r in received]
        for ranks_per_node in (None, 1):
            combined = reference.combine(ones, topk, num_experts, ranks_per_node=ranks_per_node)
            for choices, (sums, _) in zip(topk, combined, strict=True):
                visited = [len({e // (num_experts // num_ranks) for e in row if e >= 0}) for row in choices.tolist()]
                assert sums[:, 0].tolist() == visited

    @settings(max_examples=60, deadline=None)
    @given(routed_ranks())
    def test_rows_say_where_they_come_from(self, case):
        _, num_experts, topk = case
        x = [np.array([[rank, token] for token in range(len(t))]).reshape(-1, 2) for rank, t in enumerate(topk)]
        received = reference.dispatch(x, topk, num_experts)
        for rank, r in enumerate(received):
            assert r.recv_x.tolist() == np.stack([r.recv_src_rank, r.recv_src_idx], axis=1).tolist()
            assert r.recv_x.tolist() == sorted(r.recv_x.tolist())
            assert r.num_recv_tokens == r.rank_prefix_matrix[-1, rank] == len(r.recv_x)
            chosen = r.recv_topk_idx[r.recv_topk_idx >= 0].tolist()
            assert [chosen.count(e) for e in range(len(r.num_recv_tokens_per_expert_list))] == (
                r.num_recv_tokens_per_expert_list
            )

    @settings(max_examples=60, deadline=None)
    @given(routed_ranks())
    def test_weights_come_back_where_they_were_local(self, case):
        _, num_experts, topk = case
        weights = [np.arange(1, t.size + 1, dtype=np.float32).reshape(t.shape) for t in topk]
        received = reference.dispatch(
            [np.zeros((len(t), 1), BF16) for t in topk], topk, num_experts, topk_weights=weights
        )
        combined = reference.combine(
            [r.recv_x for r in received], topk, num_experts, topk_weights=[r.recv_topk_weights for r in received]
        )
        for t, w, (_, got) in zip(topk, weights, combined, strict=True):
            assert got.tolist() == np.where(t >= 0, w, 0).tolist()


# Every finite non-negative e4m3 value, ascending: index = bit pattern.
E4M3_VALUES = np.arange(127, dtype=np.uint8).view(E4M3).astype(float).tolist()


def nearest_e4m3(value):
    """Bit pattern of the e4m3 nearest to a float32, ties to the even pattern, saturating: by search."""
    magnitude = min(abs(float(value)), 448.0)
    below = min(bisect_right(E4M3_VALUES, magnitude) - 1, 125)
    middle = (E4M3_VALUES[below] + E4M3_VALUES[below + 1]) / 2  # exact, like the comparisons
    rounds_up = magnitude > middle or (magnitude == middle and below % 2 == 1)
    return below + rounds_up | (0x80 if np.signbit(value) else 0)


class TestCastFp8:
    def test_by_hand(self):
        x = np.zeros((1, 128), np.float32)
        x[0, :4] = [448, -224, 1, -0.0]
        q, scales = reference.cast_fp8(x)
        assert q[0, :4].astype(np.float32).tolist() == [448, -224, 1, 0]
        assert q.view(np.uint8)[0, 3] == 0x80
        assert scales.tolist() == [[1]]
        assert (q.dtype, scales.dtype) == (E4M3, np.float32)

    def test_zeros_have_the_scale_of_the_floor(self):
        q, scales = reference.cast_fp8(np.zeros((1, 128), BF16))
        assert not q.view(np.uint8).any()
        assert scales[0, 0] == np.float32(1e-4) / np.float32(448)

    def test_scale_of_every_bfloat16_maximum_is_a_division(self):
        amax = np.arange(1, 0x7F80, dtype=np.uint16).view(BF16)
        x = np.zeros((len(amax), 128), BF16)
        x[:, 77] = -amax
        scales = reference.cast_fp8(x)[1][:, 0]
        m = np.maximum(amax.astype(np.float32), np.float32(1e-4))
        # A float64 quotient of float32 values, rounded to float32, is the correctly rounded quotient.
        assert (scales == (m.astype(np.float64) / 448).astype(np.float32)).all()
        # Multiplying by the reciprocal is another function: this test tells them apart.
        assert (scales != m * (np.float32(1) / np.float32(448))).mean() > 0.3

    @pytest.mark.parametrize("round_scale", [False, True])
    def test_against_a_scalar_search(self, round_scale):
        rng = np.random.default_rng(7)
        x = (rng.standard_normal((6, 256)) * np.float32(10.0) ** rng.integers(-6, 5, (6, 1))).astype(BF16)
        q, scales = reference.cast_fp8(x, round_scale=round_scale)
        for token in range(len(x)):
            for group in range(2):
                values = x[token, group * 128 : (group + 1) * 128].astype(np.float32)
                m = max(np.float32(1e-4), *map(abs, values))
                s, scale = np.float32(448) / m, m / np.float32(448)
                if round_scale:
                    e = next(e for e in range(-60, 60) if Fraction(2) ** e >= Fraction(float(scale)))
                    s, scale = np.float32(2.0**-e), np.float32(2.0**e)
                assert scales[token, group] == scale
                want = [nearest_e4m3(value * s) for value in values]
                assert q[token, group * 128 : (group + 1) * 128].view(np.uint8).tolist() == want

    @pytest.mark.parametrize(
        ("amax", "exponent"),
        [(448, 0), (449, 1), (447, 0), (224, -1), (224.5, 0), (896, 1), (1e-9, -22), (3.3e38, 120)],
    )
    def test_power_of_two_scale_is_rounded_up(self, amax, exponent):
        x = np.zeros((1, 128), np.float32)
        x[0, 0] = amax
        q, scales = reference.cast_fp8(x, round_scale=True)
        assert scales[0, 0] == 2.0**exponent
        assert reference.cast_fp8(x, round_scale=True, use_ue8m0=True)[1].tolist() == [[exponent + 127]]
        assert q[0, 0].view(np.uint8) == nearest_e4m3(np.float32(amax) * np.float32(2.0**-exponent))

    def test_ue8m0_packs_little_endian_with_zeros_behind(self):
        x = np.repeat(np.array([[448 * 2.0**e for e in (0, 1, 2, 3, -1)]], np.float32), 128, axis=1)
        q, words = reference.cast_fp8(x, round_scale=True, use_ue8m0=True)
        assert words.dtype == np.int32
        assert words.astype("<i4").tobytes() == bytes([127, 128, 129, 130, 126, 0, 0, 0])
        assert (q.astype(np.float32) == 448).all()

    def test_nan_stays_and_does_not_count(self):
        x = np.full((1, 128), np.nan, np.float32)
        q, scales = reference.cast_fp8(x)
        assert np.isnan(q).all()
        assert scales[0, 0] == np.float32(1e-4) / np.float32(448)
        x[0, 1:] = 448
        q, scales = reference.cast_fp8(x)
        assert np.isnan(q[0, 0])
        assert (q[0, 1:].astype(np.float32) == 448).all()
        assert scales[0, 0] == 1

    def test_inf_gives_nan_and_zeroes_its_group(self):
        x = np.full((1, 256), -3, np.float32)
        x[0, 5] = -np.inf
        for options, scale in (({}, np.inf), ({"round_scale": True}, 2.0**127)):
            q, scales = reference.cast_fp8(x, **options)
            assert np.isnan(q[0, 5])
            assert np.delete(q.view(np.uint8)[0, :128], 5).tolist() == [0x80] * 127
            assert scales[0, 0] == scale
            assert np.isfinite(q[0, 128:].astype(np.float32)).all()
        words = reference.cast_fp8(x, round_scale=True, use_ue8m0=True)[1]
        assert words[0, 0] & 0xFF == 254

    def test_leading_axes_and_no_tokens(self):
        q, scales = reference.cast_fp8(np.ones((2, 3, 256), np.float16))
        assert (q.shape, scales.shape) == ((2, 3, 256), (2, 3, 2))
        q, words = reference.cast_fp8(np.ones((0, 640), BF16), round_scale=True, use_ue8m0=True)
        assert (q.shape, words.shape) == ((0, 640), (0, 2))

    def test_errors(self):
        with pytest.raises(ShapeError, match="multiple of 128"):
            reference.cast_fp8(np.ones((1, 64), BF16))
        with pytest.raises(InputError, match="round_scale=True"):
            reference.cast_fp8(np.ones((1, 128), BF16), use_ue8m0=True)


# Three choices over two ranks with two experts each.
LL_TOPK = [np.array([[2, 0, -1], [0, 3, 2]]), np.array([[0, -1, 2]])]


def low_latency_x():
    return [np.array([[1], [2]], BF16), np.array([[3]], BF16)]


def combine_choices(experts, values, weights=None, **options):
    """Combine one token of rank 0 of three, hidden 1, for which expert e, on rank e // 2, returned values[k]."""
    topk = [np.array([experts]), *[np.zeros((0, len(experts)), int)] * 2]
    received = reference.low_latency_dispatch([np.ones((len(t), 1), BF16) for t in topk], topk, 1, 6, use_fp8=False)
    outputs = [r.recv_x.astype(np.float32) for r in received]
    for expert, value in zip(experts, values, strict=True):
        if expert >= 0:
            outputs[expert // 2][expert % 2, 0] = value
    all_weights = [np.ones(t.shape, np.float32) for t in topk]
    if weights is not None:
        all_weights[0][0] = weights
    combined = reference.low_latency_combine(outputs, topk, all_weights, received, **options)
    return float(combined[0][0, 0])


class TestLowLatency:
    def test_dispatch_by_hand(self):
        first, second = reference.low_latency_dispatch(low_latency_x(), LL_TOPK, 2, 4, use_fp8=False)
        assert first.recv_scales is None
        assert first.recv_x[..., 0].tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]
        assert first.recv_count.tolist() == [3, 0]
        assert first.src_info.tolist() == [[0, 1, 0, -1], [-1] * 4]
        assert first.layout_range.tolist() == [[2, 2 << 32 | 1], [0, 0]]
        assert second.recv_x[..., 0].tolist() == [[1, 2, 3, 0], [2, 0, 0, 0]]
        assert second.recv_count.tolist() == [3, 1]
        assert second.src_info.tolist() == [[0, 1, 0, -1], [1, -1, -1, -1]]
        assert second.layout_range.tolist() == [[2, 2 << 32 | 1], [1, 1 << 32]]
        dtypes = (first.recv_x.dtype, first.recv_count.dtype, first.src_info.dtype, first.layout_range.dtype)
        assert dtypes == (BF16, np.int32, np.int32, np.int64)

    @pytest.mark.parametrize("options", [{}, {"round_scale": True}, {"round_scale": True, "use_ue8m0": True}])
    def test_fp8_rows_are_the_casts(self, options):
        x = [np.linspace(-3, 3, 3 * 640).reshape(3, 640).astype(BF16)]
        topk = [np.array([[0, 1], [1, -1], [-1, 0]])]
        (received,) = reference.low_latency_dispatch(x, topk, 4, 2, **options)
        q, scales = reference.cast_fp8(x[0], **options)
        assert received.recv_x.shape == (2, 4, 640)
        for expert, tokens in enumerate([[0, 2], [0, 1]]):
            assert received.recv_x[expert, :2].tobytes() == q[tokens].tobytes()
            assert received.recv_scales[expert, :2].tolist() == scales[tokens].tolist()
            assert not received.recv_scales[expert, 2:].any()
            assert not received.recv_x[expert, 2:].view(np.uint8).any()
        assert received.recv_scales.dtype == scales.dtype

    def test_combine_by_hand(self):
        received = reference.low_latency_dispatch(low_latency_x(), LL_TOPK, 2, 4, use_fp8=False)
        outputs = [r.recv_x.copy() for r in received]
        outputs[1] *= BF16.type(10)  # the experts of rank 1 multiply by 10
        weights = [np.array([[2, 3, np.nan], [4, 5, 6]], np.float32), np.array([[7, np.nan, 8]], np.float32)]
        first, second = reference.low_latency_combine(outputs, LL_TOPK, weights, received)
        assert first.tolist() == [[2 * 10 + 3 * 1], [4 * 2 + (5 + 6) * 20]]
        assert second.tolist() == [[260]]  # 7 * 3 + 8 * 30 = 261, a tie in bfloat16
        assert first.dtype == BF16

    def test_products_are_rounded_before_they_are_added(self):
        # The second product is what the first cancels, rounded; a fused multiply-add would leave the rounding error.
        w, x = np.float32(1 + 2.0**-23), np.float32(1 + 2.0**-7)
        assert Fraction(float(w * x)) != Fraction(float(w)) * Fraction(float(x))
        topk = [np.array([[0, 1]])]
        received = reference.low_latency_dispatch([np.ones((1, 1), BF16)], topk, 1, 2, use_fp8=False)
        outputs = [np.array([[[1]], [[x]]], BF16)]
        weights = [np.array([[-(w * x), w]], np.float32)]
        assert reference.low_latency_combine(outputs, topk, weights, received)[0].tolist() == [[0]]

    def test_choices_ascend(self):
        topk = [np.array([[0, 1, 2]])]
        received = reference.low_latency_dispatch([np.ones((1, 1), BF16)], topk, 1, 3, use_fp8=False)
        outputs = [np.array([[[2.0**24]], [[1]], [[-(2.0**24)]]], BF16)]
        weights = [np.ones((1, 3), np.float32)]
        combine = reference.low_latency_combine
        assert combine(outputs, topk, weights, received)[0].tolist() == [[0]]  # the 1 is lost in 2^24
        assert combine(outputs, [np.array([[0, 2, 1]])], weights, received)[0].tolist() == [[1]]

    def test_pre_reduce_rounds_the_part_of_each_rank(self):
        # 256 + 1 is a tie in bfloat16, back to 256; in one sum the second 1 tips it.
        assert combine_choices([0, 1, 2], [256, 1, 1]) == 258
        assert combine_choices([0, 1, 2], [256, 1, 1], pre_reduce=True) == 256
        assert combine_choices([2, 0, 3], [256, 1, 1], pre_reduce=True) == 256
        assert combine_choices([0, 2], [256, 1], pre_reduce=True) == 256
        # Of one choice: its product is rounded, 257 to 256.
        assert combine_choices([0, 2], [257 / 256, 1], weights=[256, 1], pre_reduce=True) == 256

    def test_pre_reduce_takes_ranks_in_order_and_their_choices_in_order(self):
        # The 1 is lost in 2^25, unless that has gone before.
        big = 2.0**25
        assert combine_choices([4, 2, 0], [big, -big, 1]) == 1
        assert combine_choices([4, 2, 0], [big, -big, 1], pre_reduce=True) == 0
        assert combine_choices([0, 2, 4], [big, -big, 1], pre_reduce=True) == 1
        assert combine_choices([1, 0, 2], [big, -big, 1], pre_reduce=True) == 1
        assert combine_choices([0, 1, 2], [big, 1, -big], pre_reduce=True) == 0
        assert combine_choices([5, 4, 0, 1], [big, -big, 1, 0], pre_reduce=True) == 1
        assert combine_choices([5, 0, 4], [big, 1, -big], pre_reduce=True) == 1

    def test_pre_reduce_skips_what_is_masked(self):
        masks = [np.array([False, True, False]), *[np.zeros(3, bool)] * 2]
        assert combine_choices([0, 2, -1, 4], [1, 2, 4, 8], pre_reduce=True) == 11
        assert combine_choices([0, 2, -1, 4], [1, 2, 4, 8], pre_reduce=True, masks=masks) == 9
        assert combine_choices([-1, 2], [1, np.nan], pre_reduce=True, masks=masks) == 0

    def test_pre_reduce_takes_no_logfmt(self):
        with pytest.raises(InputError, match="pre_reduce: got also use_logfmt"):
            combine_choices([0], [1], pre_reduce=True, use_logfmt=True)

    def test_logfmt_of_every_row(self):
        rng = np.random.default_rng(1)
        x, topk = [rng.standard_normal((2, 128)).astype(BF16)], [np.array([[0, 1], [1, -1]])]
        (received,) = reference.low_latency_dispatch(x, topk, 2, 2, use_fp8=False)
        weights = np.array([[2, 0.5], [-1, 9]], np.float32)
        back = reference.decode_logfmt(reference.encode_logfmt(x[0]), 128)
        assert (back != x[0]).mean() > 0.5
        (got,) = reference.low_latency_combine([received.recv_x], topk, [weights], [received], use_logfmt=True)
        assert got.tolist() == np.stack([2 * back[0] + 0.5 * back[0], -back[1]]).astype(BF16).tolist()

    def test_masks_cut_both_ways(self):
        masks = [np.array([False, True]), np.array([False, False])]  # only rank 0 ignores rank 1
        received = reference.low_latency_dispatch(low_latency_x(), LL_TOPK, 2, 4, use_fp8=False, masks=masks)
        assert received[0].src_info.tolist() == [[0, 1, -1, -1], [-1] * 4]
        assert received[1].src_info.tolist() == [[0, -1, -1, -1], [-1] * 4]
        assert received[1].layout_range.tolist() == [[0, 1], [0, 0]]
        weights = [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]
        outputs = [r.recv_x for r in received]
        first, second = reference.low_latency_combine(outputs, LL_TOPK, weights, received, masks=masks)
        assert first.tolist() == [[1], [2]]
        assert second.tolist() == [[3]]

    def test_a_rank_may_be_masked_between_dispatch_and_combine(self):
        received = reference.low_latency_dispatch(low_latency_x(), LL_TOPK, 2, 4, use_fp8=False)
        weights = [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]
        masks = [np.array([False, True]), np.array([False, False])]
        outputs = [r.recv_x for r in received]
        first, second = reference.low_latency_combine(outputs, LL_TOPK, weights, received, masks=masks)
        assert first.tolist() == [[1], [2]]
        assert second.tolist() == [[3]]

    def test_a_token_without_choices_gives_zero(self):
        topk = [np.array([[-1, -1]])]
        received = reference.low_latency_dispatch([np.ones((1, 2), BF16)], topk, 1, 2, use_fp8=False)
        got = reference.low_latency_combine([r.recv_x for r in received], topk, [np.ones((1, 2), np.float32)], received)
        assert got[0].tolist() == [[0, 0]]

    def test_errors(self):
        with pytest.raises(CapacityError, match="x of rank 0"):
            reference.low_latency_dispatch(low_latency_x(), LL_TOPK, 1, 4, use_fp8=False)
        received = reference.low_latency_dispatch(low_latency_x(), LL_TOPK, 2, 4, use_fp8=False)
        weights = [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]
        other_topk = [LL_TOPK[0], np.array([[1, -1, 2]])]
        with pytest.raises(RoutingError, match="rank 1"):
            reference.low_latency_combine([r.recv_x for r in received], other_topk, weights, received)

    @settings(max_examples=40, deadline=None)
    @given(routed_ranks())
    def test_combine_of_ones_counts_the_choices(self, case):
        num_ranks, num_experts, topk = case
        x = [np.ones((len(t), 1), BF16) for t in topk]
        received = reference.low_latency_dispatch(x, topk, 4, num_experts, use_fp8=False)
        assert sum(int(r.recv_count.sum()) for r in received) == sum(int((t >= 0).sum()) for t in topk)
        weights = [np.ones(t.shape, np.float32) for t in topk]
        combined = reference.low_latency_combine([r.recv_x for r in received], topk, weights, received)
        for t, got in zip(topk, combined, strict=True):
            assert got[:, 0].tolist() == (t >= 0).sum(axis=1).tolist()
        assert len(combined) == num_ranks


def test_cast_fp8_maximum_passes_over_nan_wherever_it_stands() -> None:
    # np.fmax.reduce drops elements beside a signalling NaN; check every position.
    x = np.full((128, 128), 2.0, ml_dtypes.bfloat16)
    x[:, 77] = 448.0
    np.fill_diagonal(x.view(np.uint16), 0x7F81)
    x[77, 78] = 448.0
    _, scales = reference.cast_fp8(x)
    assert (scales == 1).all()
