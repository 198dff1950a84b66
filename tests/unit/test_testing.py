"""The public test helpers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epcomm import reference, testing
from epcomm.errors import DtypeError, RoutingError, ShapeError

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

GENERATORS = {
    "uniform": testing.uniform_routing,
    "zipf": testing.zipf_routing,
    "grouped": lambda *args, **kw: testing.grouped_routing(*args, num_groups=4, num_topk_groups=2, **kw),
    "one_hot": lambda *args, **kw: testing.one_hot_routing(*args, expert=3, **kw),
    "masked": lambda *args, **kw: testing.masked_routing(*args, masked_fraction=0.3, **kw),
}


@pytest.fixture(params=GENERATORS)
def generator(request):
    return GENERATORS[request.param]


class TestRouting:
    def test_rows_hold_different_experts(self, generator):
        topk_idx = generator(500, 32, 8, seed=1)
        assert topk_idx.shape == (500, 8)
        assert topk_idx.dtype == np.int64
        assert topk_idx.min() >= -1
        reference.get_dispatch_layout(topk_idx, 32, 4)  # raises on a repeated or impossible expert

    def test_a_row_depends_on_the_global_token_only(self, generator):
        whole = generator(100, 32, 8, seed=5)
        for begin, end in [(0, 1), (37, 64), (99, 100), (50, 50)]:
            part = generator(end - begin, 32, 8, seed=5, first_token=begin)
            assert part.tolist() == whole[begin:end].tolist()

    @pytest.mark.parametrize("name", ["uniform", "zipf", "grouped", "masked"])
    def test_seeds_differ_and_repeat(self, name):
        make = GENERATORS[name]
        assert make(50, 32, 8, seed=1).tolist() == make(50, 32, 8, seed=1).tolist()
        assert make(50, 32, 8, seed=1).tolist() != make(50, 32, 8, seed=2).tolist()
        assert make(50, 32, 8, seed=-1).tolist() != make(50, 32, 8, seed=1).tolist()

    def test_uniform_is_uniform(self):
        counts = np.bincount(testing.uniform_routing(20000, 16, 4, seed=0).ravel(), minlength=16)
        assert abs(counts / 5000 - 1).max() < 0.06  # 4.6 standard deviations
        first = np.bincount(testing.uniform_routing(20000, 16, 4, seed=0)[:, 0], minlength=16)
        assert abs(first / 1250 - 1).max() < 0.14  # 5 standard deviations

    def test_all_experts_can_be_chosen(self):
        assert np.sort(testing.uniform_routing(5, 6, 6, seed=0), axis=1).tolist() == [list(range(6))] * 5

    def test_zipf_follows_its_weights(self):
        counts = np.bincount(testing.zipf_routing(20000, 8, 1, seed=0, exponent=2.0)[:, 0], minlength=8)
        weights = 1 / np.arange(1, 9) ** 2.0
        want = 20000 * weights / weights.sum()
        assert (abs(counts - want) < 5 * np.sqrt(want)).all()

    def test_grouped_stays_in_its_best_groups(self):
        topk_idx = GENERATORS["grouped"](300, 32, 8, seed=3)
        assert all(len(set(row // 8)) <= 2 for row in topk_idx)
        # The best expert of all lies in the best group, so the first choice is that of uniform routing.
        assert topk_idx[:, 0].tolist() == testing.uniform_routing(300, 32, 8, seed=3)[:, 0].tolist()

    def test_one_hot(self):
        assert testing.one_hot_routing(2, 4, 3, expert=2).tolist() == [[2, -1, -1]] * 2

    def test_masked_fraction(self):
        make = testing.masked_routing
        assert (make(100, 8, 4, seed=0, masked_fraction=1.0) == -1).all()
        uniform = testing.uniform_routing(2000, 8, 4, seed=0)
        assert make(2000, 8, 4, seed=0, masked_fraction=0.0).tolist() == uniform.tolist()
        some = make(2000, 8, 4, seed=0, masked_fraction=0.25)
        assert 0.22 < (some == -1).mean() < 0.28
        assert (some[some >= 0] == uniform[some >= 0]).all()

    def test_errors(self):
        with pytest.raises(ShapeError, match="num_topk"):
            testing.uniform_routing(1, 4, 5, seed=0)
        with pytest.raises(ShapeError, match="num_topk"):
            testing.uniform_routing(1, 4, 0, seed=0)
        with pytest.raises(ShapeError, match="num_groups=3"):
            testing.grouped_routing(1, 4, 1, seed=0, num_groups=3, num_topk_groups=1)
        with pytest.raises(ShapeError, match="at most 1 groups of 2 experts"):
            testing.grouped_routing(1, 4, 3, seed=0, num_groups=2, num_topk_groups=1)
        with pytest.raises(RoutingError, match="expert"):
            testing.one_hot_routing(1, 4, 1, expert=4)


class TestTokenData:
    DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int8")

    @pytest.mark.parametrize("name", DTYPES)
    def test_a_row_depends_on_the_global_token_only(self, name):
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        # 70000 channels are more than one block, 700 make blocks of many rows.
        for num_tokens, hidden in [(3, 70000), (200, 700)]:
            whole = testing.token_data(num_tokens, hidden, dtype, seed=4)
            part = testing.token_data(1, hidden, dtype, seed=4, first_token=num_tokens - 1)
            assert part.tobytes() == whole[-1].tobytes()
            assert len({row.tobytes() for row in whole}) == num_tokens
        assert testing.token_data(2, 8, dtype, seed=1).tobytes() != testing.token_data(2, 8, dtype, seed=2).tobytes()

    @pytest.mark.parametrize("name", DTYPES[:5])
    def test_floats_spread_over_their_range(self, name):
        x = testing.token_data(64, 1024, getattr(ml_dtypes, name, name))
        assert x.dtype.name == name
        values = x.astype(np.float32)
        assert -4 <= values.min() < -3.9
        assert 3.9 < values.max() <= 4
        assert abs(values.mean()) < 0.05
        negative_zeros = ((values == 0) & np.signbit(values)).mean()
        assert 0.01 < negative_zeros < 0.025

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8])
    def test_bytes_take_all_values(self, dtype):
        assert len(np.unique(testing.token_data(16, 1024, dtype))) == 256

    def test_no_tokens_and_no_channels(self):
        assert testing.token_data(0, 7, BF16).shape == (0, 7)
        assert testing.token_data(7, 0, BF16).shape == (7, 0)

    def test_other_dtypes_are_refused(self):
        with pytest.raises(DtypeError, match="float64"):
            testing.token_data(1, 1, np.float64)


class TestGroupsAndRanks:
    def test_grouped_scores(self):
        scores = np.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], np.float32)
        got = testing.create_grouped_scores(scores, np.array([[0, 2], [1, 1]]), 3)
        assert got.tolist() == [[1, 2, 0, 0, 5, 6], [0, 0, 4, 3, 0, 0]]
        assert got.dtype == np.float32
        assert scores[0, 2] == 3

    def test_grouped_scores_need_equal_groups(self):
        with pytest.raises(ShapeError, match="num_groups=4"):
            testing.create_grouped_scores(np.ones((1, 6)), np.array([[0]]), 4)

    @pytest.mark.parametrize(
        ("row", "want"),
        [
            ([1, 0, 1, 1], [1, 0, -1, -1]),
            ([0, 0, 0, 2], [2, 0, -1, -1]),
            ([-1, 3, -1, 3], [3, -1, -1, -1]),
            ([-1, -1, -5, -1], [-1, -1, -1, -1]),
            ([0, 1, 2, 3], [3, 2, 1, 0]),
        ],
        ids=["repeated", "largest_first", "holes", "nothing", "all_different"],
    )
    def test_unique(self, row, want):
        x = np.array([row])
        assert testing.inplace_unique(x, 4) is None
        assert x.tolist() == [want]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.integers(-1, 5), min_size=4, max_size=4), max_size=5))
    def test_unique_is_the_set_of_each_row(self, rows):
        x = np.array(rows, np.int32).reshape(-1, 4)
        testing.inplace_unique(x, 6)
        for got, row in zip(x.tolist(), rows, strict=True):
            values = sorted({v for v in row if v >= 0}, reverse=True)
            assert got == values + [-1] * (4 - len(values))

    def test_unique_refuses_what_is_no_slot(self):
        with pytest.raises(RoutingError, match="num_slots=4"):
            testing.inplace_unique(np.array([[4]]), 4)


class TestDiffAndCasts:
    def test_diff_by_hand(self):
        # (x + 1, y + 1) = (1, 2), (2, 1): 1 - 2 * 4 / 10.
        assert testing.calc_diff(np.array([0, 1]), np.array([1, 0])) == pytest.approx(0.2)
        assert testing.calc_diff(np.array([3, 4], BF16), np.array([3, 4], np.float64)) == 0
        assert testing.calc_diff(np.array([-1.0]), np.array([-1.0])) == 0
        assert testing.calc_diff(np.zeros(0), np.zeros(0)) == 0
        assert np.isnan(testing.calc_diff(np.array([np.nan]), np.array([np.nan])))

    def test_diff_does_not_broadcast(self):
        with pytest.raises(ShapeError):
            testing.calc_diff(np.zeros((2, 1)), np.zeros(2))

    def test_cast_and_back_by_hand(self):
        x = np.zeros((1, 256), np.float32)
        x[0, :2], x[0, 128:130] = [896, -2], [224, 0.5]
        q, scales = testing.per_token_cast_to_fp8(x)
        assert q[0, [0, 1, 128, 129]].astype(np.float32).tolist() == [448, -1, 448, 1]
        assert scales.tolist() == [[2, 0.5]]
        back = testing.per_token_cast_back(q, scales)
        assert back.dtype == BF16
        assert back.astype(np.float32).tolist() == x.tolist()

    def test_cast_back_unpacks_ue8m0(self):
        x = testing.token_data(5, 640, BF16)
        q, scales = reference.cast_fp8(x, round_scale=True)
        packed = reference.cast_fp8(x, round_scale=True, use_ue8m0=True)[1]
        column_major = np.asfortranarray(packed)
        back = testing.per_token_cast_back(q, column_major)
        testing.assert_bitwise(back, testing.per_token_cast_back(q, scales))
        assert 0 < testing.calc_diff(x, back) < 1e-3

    def test_cast_of_no_tokens(self):
        q, scales = testing.per_token_cast_to_fp8(np.zeros((0, 256), BF16))
        assert testing.per_token_cast_back(q, scales).shape == (0, 256)

    def test_errors(self):
        with pytest.raises(ShapeError, match="multiple of 128"):
            testing.per_token_cast_to_fp8(np.zeros((1, 130), BF16))
        with pytest.raises(ShapeError, match="multiple of 128"):
            testing.per_token_cast_back(np.zeros((1, 130), E4M3), np.zeros((1, 1), np.float32))
        with pytest.raises(ShapeError, match=r"wanted \(1, 2\)"):
            testing.per_token_cast_back(np.zeros((1, 256), E4M3), np.zeros((1, 1), np.float32))
        with pytest.raises(DtypeError, match="float64"):
            testing.per_token_cast_back(np.zeros((1, 128), E4M3), np.zeros((1, 1)))


class TestAssertBitwise:
    @pytest.mark.parametrize(
        "dtype", [BF16, E4M3, np.float16, np.float32, np.float64, np.int64, np.uint8, bool], ids=str
    )
    def test_equal(self, dtype):
        x = np.array([[0, 1], [1, 0]], dtype)
        testing.assert_bitwise(x, x.copy(order="F"))
        with pytest.raises(AssertionError, match=r"1 of 4 elements differ\n  \(1, 0\): got (1|True)"):
            testing.assert_bitwise(x, np.array([[0, 1], [0, 0]], dtype))

    def test_every_nan_equals_every_nan_and_nothing_else(self):
        nans = np.array([0x7FC0, 0xFFC0, 0x7F81], np.uint16).view(BF16)
        testing.assert_bitwise(nans, np.roll(nans, 1))
        for other in (0.0, np.inf):
            with pytest.raises(AssertionError, match="1 of 1"):
                testing.assert_bitwise(nans[:1], np.array([other], BF16))
            with pytest.raises(AssertionError, match="1 of 1"):
                testing.assert_bitwise(np.array([other], BF16), nans[:1])

    def test_zeros_of_different_sign_differ_and_bits_are_shown(self):
        with pytest.raises(AssertionError) as caught:
            testing.assert_bitwise(np.array([1.0, -0.0], np.float32), np.array([1.0, 0.0], np.float32), "combined_x")
        assert str(caught.value) == (
            "combined_x: 1 of 2 elements differ\n  (1,): got -0.0 (0x80000000), wanted 0.0 (0x00000000)"
        )

    def test_only_the_first_differences_are_listed(self):
        with pytest.raises(AssertionError) as caught:
            testing.assert_bitwise(np.zeros(100, np.int8), np.ones(100, np.int8))
        lines = str(caught.value).splitlines()
        assert lines[0] == "100 of 100 elements differ"
        assert len(lines) == 9

    def test_dtype_and_shape_count(self):
        with pytest.raises(AssertionError, match="got dtype float16, wanted bfloat16"):
            testing.assert_bitwise(np.zeros(2, np.float16), np.zeros(2, BF16))
        with pytest.raises(AssertionError, match=r"got shape \(2, 1\), wanted \(2,\)"):
            testing.assert_bitwise(np.zeros((2, 1), BF16), np.zeros(2, BF16))

    def test_empty_and_zero_dimensional(self):
        testing.assert_bitwise(np.zeros((0, 3), BF16), np.zeros((0, 3), BF16))
        with pytest.raises(AssertionError, match=r"\(\): got 1"):
            testing.assert_bitwise(np.array(1), np.array(2))


class FakeClock:
    """A clock that only its owner moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class RecordingComm:
    """Rank 0 of two; rank 1 took `other_times`."""

    rank, size = 0, 2

    def __init__(self, calls, other_times):
        self.calls, self.other_times = calls, other_times

    def barrier(self):
        self.calls.append("barrier")

    def allgather(self, obj):
        return [obj, self.other_times]


class TestBench:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = FakeClock()
        monkeypatch.setattr("epcomm.testing.timing.time.perf_counter", clock)
        return clock

    def test_one_rank(self, clock):
        durations = iter([100, 1, 4, 2, 3])

        def fn():
            clock.now += next(durations)

        def before():
            clock.now += 1000

        result = testing.bench(fn, warmup=1, repeats=4, before=before)
        assert result.times_s == (1, 4, 2, 3)
        assert (result.min_s, result.max_s, result.mean_s, result.p50_s) == (1, 4, 2.5, 2.5)
        assert 3.9 < result.p99_s < 4
        assert result.slowest_rank == 0

    def test_the_slowest_rank_of_each_repeat_counts(self, clock):
        calls = []

        def fn():
            calls.append("fn")
            clock.now += 2

        comm = RecordingComm(calls, [1.0, 5.0, 3.0])
        result = testing.bench(fn, warmup=1, repeats=3, comm=comm, before=lambda: calls.append("before"))
        assert calls == ["before", "barrier", "fn"] * 4
        assert result.times_s == (2, 5, 3)
        assert result.slowest_rank == 1

    def test_no_repeats(self):
        with pytest.raises(ShapeError, match="repeats"):
            testing.bench(lambda: None, repeats=0)


class TestRanks:
    def test_run_local_and_init_dist(self):
        def whoami(comm, offset):
            rank, size, communicator = testing.init_dist(comm)
            assert communicator is comm
            return offset + rank, size, communicator.allgather(rank)

        assert testing.run_local(3, whoami, 10) == [(10 + rank, 3, [0, 1, 2]) for rank in range(3)]

    def test_bench_gives_every_rank_the_same_result(self):
        results = testing.run_local(2, lambda comm: testing.bench(comm.barrier, warmup=0, repeats=3, comm=comm))
        assert results[0] == results[1]
        assert len(results[0].times_s) == 3


class TestTorch:
    def test_arrays_of_torch(self):
        torch = pytest.importorskip("torch")
        x = torch.tensor([[1, 0, 1], [-1, 2, 2]])
        testing.inplace_unique(x, 3)
        assert x.tolist() == [[1, 0, -1], [2, -1, -1]]
        scores = torch.tensor([[1.0, 2, 3, 4]])
        grouped = testing.create_grouped_scores(scores, torch.tensor([[1]]), 2)
        assert isinstance(grouped, torch.Tensor)
        assert grouped.tolist() == [[0, 0, 3, 4]]
        rows = torch.linspace(-3, 3, 512, dtype=torch.bfloat16).reshape(2, 256)
        q, scales = testing.per_token_cast_to_fp8(rows)
        assert (q.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        back = testing.per_token_cast_back(q, scales)
        assert back.dtype == torch.bfloat16
        assert 0 < testing.calc_diff(rows, back) < 1e-3
        testing.assert_bitwise(back, back.clone())
        with pytest.raises(AssertionError, match="elements differ"):
            testing.assert_bitwise(rows, back)
