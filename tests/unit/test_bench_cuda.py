"""The GPU bench without a GPU: data, checks that must notice what is wrong, floors, tables. NumPy stands for CuPy."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from epcomm import cli, reference
from epcomm.bootstrap import run_local
from epcomm.buffer import Buffer
from epcomm.cli import bench, bits, job
from epcomm.cli.bench import links
from epcomm.cli.bench.case import DTYPES, Case, make_routing
from epcomm.cli.bench.cuda import calls as checked_calls
from epcomm.cli.bench.cuda import checks, data, report, run, timing
from epcomm.cli.bench.cuda.calls import Calls
from epcomm.cli.bench.cuda.link_speed import RowSpeeds
from epcomm.errors import InputError

RANKS = 3


def make_case(**changes: Any) -> Case:
    parameters = {
        "mode": "throughput",
        "backend": "cuda",
        "ranks": RANKS,
        "ranks_per_node": None,
        "tokens": 13,
        "hidden": 128,
        "topk": 4,
        "experts": 12,
        "dtype": "bf16",
        "routing": "uniform",
        "repeats": 3,
        "json": None,
    }
    return Case(**{**parameters, **changes})


# -- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_rows_are_functions_of_their_tokens(dtype, monkeypatch):
    tokens = np.array([7, 0, 3, 7, 2**31 + 5])
    whole = data.make_bits(np, tokens, 40, dtype, seed=1)
    monkeypatch.setattr(data, "_BLOCK_ELEMENTS", 80)
    assert (data.make_bits(np, tokens, 40, dtype, seed=1) == whole).all()
    assert (whole[0] == whole[3]).all()
    assert len({row.tobytes() for row in whole}) == 4
    assert (data.make_bits(np, tokens, 40, dtype, seed=2) != whole).any(axis=1).all()
    values = np.abs(bits.as_rows(whole, dtype).astype(np.float32))
    assert ((values >= 0.5) & (values < 2)).all()
    assert (bits.as_bits(bits.as_rows(whole, dtype)) == whole).all()


@pytest.mark.parametrize("dtype", [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)], ids=str)
def test_rounding_is_that_of_the_dtype(dtype):
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    values[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, -0.0]  # ties, and a sign
    rounded = bits.round_to(np, values, dtype)
    assert np.isnan(bits.as_rows(bits.round_to(np, np.full(2, -np.nan, np.float32), dtype), dtype)).all()
    assert (rounded == bits.as_bits(values.astype(dtype))).all()
    assert (bits.widen(np, rounded, dtype) == values.astype(dtype).astype(np.float32)).all()


def test_the_expected_sums_are_those_of_the_reference():
    case = make_case()
    topk_idx = [make_routing(case, rank)[0] for rank in range(RANKS)]
    routing = run_local(RANKS, checks.gather_routing, case)[0]
    y = [bits.as_rows(checks.output_bits(np, case, routing, rank), case.combine_dtype) for rank in range(RANKS)]
    for rank, (combined, _) in enumerate(reference.combine(y, topk_idx, case.experts)):
        assert list(checks.check_combine(np, case, routing, rank, combined)) == []


def test_sums_of_nodes_are_rounded_first():
    case = make_case(ranks_per_node=1)
    topk_idx = [make_routing(case, rank)[0] for rank in range(RANKS)]
    routing = run_local(RANKS, checks.gather_routing, case)[0]
    y = [bits.as_rows(checks.output_bits(np, case, routing, rank), case.combine_dtype) for rank in range(RANKS)]
    for rank, (combined, _) in enumerate(reference.combine(y, topk_idx, case.experts, ranks_per_node=1)):
        assert list(checks.check_combine(np, case, routing, rank, combined)) == []


# -- checks -------------------------------------------------------------------------------------------------------


def differences(case: Case, spoil: str = "") -> list[str]:
    """What rank 1 finds on the host backend, when the results of its method `spoil` are spoilt on the way."""

    def program(comm: Any) -> list[str]:
        routing = checks.gather_routing(comm, case)
        options: Any = {"backend": "host", "ranks_per_node": case.ranks_per_node}
        with Buffer(comm, **options) as buffer, Buffer(comm, **options) as outside:
            calls = Calls(np, buffer, outside, case, routing)
            if spoil and comm.rank == 1:
                right = getattr(calls, spoil)
                setattr(calls, spoil, lambda *args: spoilt(right(*args)))
            return calls.differences()

    return run_local(RANKS, program)[1]


def spoilt(result: Any) -> Any:
    """One bit of the last row, or of what else there is."""
    rows = getattr(result, "recv_x", getattr(result, "is_token_in_rank", result))
    rows = (rows[0] if isinstance(rows, tuple) else rows).copy()
    rows.view(np.uint8)[-1, -1] ^= 1
    if hasattr(result, "recv_x"):
        return result._replace(recv_x=(rows, result.recv_x[1]) if isinstance(result.recv_x, tuple) else rows)
    return result._replace(is_token_in_rank=rows) if hasattr(result, "is_token_in_rank") else rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_are_right(dtype):
    assert differences(make_case(dtype=dtype)) == []


def test_right_results_of_nodes_are_right():
    assert differences(make_case(ranks_per_node=1)) == []


def test_rows_that_are_counted_wrongly_are_found(monkeypatch):
    """After the first look at the counters there seems to be a row more."""
    right, looks = links.crossings, []

    def wrong(buffer: Buffer) -> tuple[int, int]:
        sent, returned = right(buffer)
        if buffer.rank == 1:
            looks.append(None)
        return sent + (buffer.rank == 1 and len(looks) > 1), returned

    monkeypatch.setattr(checked_calls, "crossings", wrong)
    (found,) = differences(make_case(ranks_per_node=1))
    assert re.fullmatch(r"dispatch: (\d+) rows sent to other nodes by stats, (\d+) by the routing", found)


@pytest.mark.parametrize("routing", ["zipf", "grouped"])
def test_other_routings(routing):
    assert differences(make_case(routing=routing)) == []


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("layout", "get_dispatch_layout: tokens in ranks: 1 of 39 differ"),
        ("dispatch", "dispatch: rows from rank 2: 1 of "),
        ("cached_dispatch", "dispatch, cached: rows from rank 2: 1 of "),
        ("cached_dispatch_outside", "dispatch, cached, outside: rows from rank 2: 1 of "),
        ("combine", "combine: sums: 1 of 13 differ, first number 12"),
        ("combine_in_arena", "combine, in the arena: sums: 1 of 13 differ, first number 12"),
        ("combine_by_window", "combine, by window: sums: 1 of 13 differ, first number 12"),
    ],
)
def test_one_wrong_bit_is_found(method, found):
    assert differences(make_case(), method)[0].startswith(found)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("recv_topk_idx", "expert indices: 1 of"),
        ("recv_topk_weights", "weights: 1 of"),
        ("num_recv_tokens_per_expert_list", "tokens per expert: 1 of 4 differ"),
        ("recv_x", "rows: shape"),
        ("scales", "scales from rank 2: 1 of"),
    ],
)
def test_what_travels_with_rows_is_compared(field, found):
    case = make_case(dtype="fp8", hidden=256)

    def program(comm: Any) -> list[str]:
        routing = checks.gather_routing(comm, case)
        with Buffer(comm, backend="host") as buffer, Buffer(comm, backend="host") as outside:
            calls = Calls(np, buffer, outside, case, routing)
            got = calls.dispatch(buffer)
            rows, scales = got.recv_x
            if field == "recv_x":
                got = got._replace(recv_x=(rows[1:], scales[1:]))
            elif field == "scales":
                scales[-1, -1] *= 2
            else:
                value = np.array(getattr(got, field)).copy()
                value.reshape(-1)[-1] += 1
                got = got._replace(**{field: value})
            return list(checks.check_dispatch(np, np.asarray, case, routing, comm.rank, calls._seed, got))

    assert run_local(RANKS, program)[1][0].startswith(found)


# -- the run, with NumPy for CuPy and the host backend for CUDA ---------------------------------------------------


class FakeMemory:
    """A MemoryPointer."""

    def copy_from_device_async(self, source: FakeMemory, num_bytes: int, stream: Any) -> None:
        return


class FakeArray(np.ndarray):
    data = property(lambda self: FakeMemory())


class FakeEvent:
    def record(self, stream: Any) -> None:
        self.time_s = time.perf_counter()

    def synchronize(self) -> None:
        return


class FakeStream:
    ptr = 1

    def __init__(self, non_blocking: bool = False) -> None:
        return

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def synchronize(self) -> None:
        return


_OF_NUMPY = ("arange", "asarray", "empty", "flatnonzero", "float16", "float32", "isnan", "where")
FAKE_CUPY = SimpleNamespace(
    **{name: getattr(np, name) for name in _OF_NUMPY},
    asnumpy=np.asarray,
    zeros=lambda shape, dtype: np.zeros(min(shape, 64) if isinstance(shape, int) else shape, dtype).view(FakeArray),
    __version__="0",
    get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
    cuda=SimpleNamespace(
        Event=FakeEvent,
        Stream=FakeStream,
        Device=lambda: SimpleNamespace(id=0),
        get_elapsed_time=lambda start, end: 1e3 * (end.time_s - start.time_s),
        runtime=SimpleNamespace(
            memGetInfo=lambda: (512, 512),
            getDeviceProperties=lambda _: {"name": b"a GPU", "uuid": b"0" * 16, "multiProcessorCount": 132},
            runtimeGetVersion=lambda: 13000,
            deviceGetAttribute=lambda _attribute, _device: 1,
        ),
    ),
)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", FAKE_CUPY)
    monkeypatch.setattr(run, "Buffer", lambda comm, _arena, **options: Buffer(comm, backend="host"))
    copy_speed = run.copy_speed  # of nothing: far below that of a GPU, and then floors do not fit the table
    monkeypatch.setattr(run, "copy_speed", lambda *arguments: 4.3e12 + copy_speed(*arguments))
    monkeypatch.setattr(timing, "_DELAY_US", 0)
    monkeypatch.setattr(run, "construction_s", lambda: (2.5, 0.125))


@pytest.mark.slow
def test_the_whole_run(fake_gpu, capsys, tmp_path):
    file = tmp_path / "lines.json"
    case = make_case(sms=(8, 16), json=str(file))
    assert run_local(RANKS, bench.cuda.main, case) == [0] * RANKS
    text = capsys.readouterr().out
    assert "3 ranks on one GPU of 1 node" in text
    assert "a GPU, 132 SMs, 3 ranks a GPU, under MPS" in text
    assert "every row of every rank was right in all its bits, before and after" in text
    assert "2.50 s compiling all kernels, 0.12 s from the disk cache" in text
    assert [line for line in text.splitlines() if len(line) > 80] == []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 2 * 8
    assert {record["ranks_on_gpu"] for record in records} == {RANKS}
    by_name = {record["operation"]: record for record in records}
    assert {name for name, record in by_name.items() if record["python_us"]} == set(run._PYTHON_TIMES)
    assert all(record["p50_us"] <= record["p99_us"] for record in records)
    assert [by_name[name]["waits_on_host"] for name in ("dispatch", "dispatch, cached", "combine")] == [
        True,
        False,
        False,
    ]


def test_wrong_results_have_no_times(fake_gpu, monkeypatch, capsys):
    combine = Buffer.combine

    def broken(buffer: Buffer, *args: Any, **options: Any) -> Any:
        result = combine(buffer, *args, **options)
        if buffer.rank == 2:
            result.combined_x.view(np.uint16)[3, 0] ^= 1
        return result

    monkeypatch.setattr(Buffer, "combine", broken)
    assert run_local(RANKS, bench.cuda.main, make_case()) == [1] * RANKS
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rank 2, before: combine: sums: 1 of 13 differ, first number 3" in captured.err
    assert captured.err.endswith("the results are wrong; no times\n")


# -- figures ------------------------------------------------------------------------------------------------------


def make_run(names_us: dict[str, float], case: Case, copy_bytes_per_s: float = 4.3e12) -> run.CudaRun:
    routing = checks.Routing(*(np.stack(arrays) for arrays in _routings(case)), case.experts // case.ranks)
    calls = object.__new__(Calls)
    calls._case, calls._routing, calls._outside = case, routing, object()
    calls.links = links.CaseLinks(case, links.RoutedRows(routing.is_token_in_rank, case.ranks))
    machine = run.Machine("NVIDIA H200", 132, case.ranks, 1, True, "580.1", "13.0", "14.2.0", copy_bytes_per_s, None)
    measured = [
        run.Measured(operation, 16, [names_us[operation.name]], names_us[operation.name], None)
        for operation, _ in calls.operations()
        if operation.name in names_us
    ]
    return run.CudaRun([], machine, 1 << 30, (1.0, 0.1), None, calls.links.crossing, measured)


def _routings(case: Case) -> Any:
    parts = [make_routing(case, rank) for rank in range(case.ranks)]
    owners = [idx // (case.experts // case.ranks) for idx, _ in parts]
    marks = [(owner[..., None] == np.arange(case.ranks)).any(axis=1) for owner in owners]
    return [idx for idx, _ in parts], [weights for _, weights in parts], marks


@pytest.mark.parametrize(
    ("dtype", "name", "floor_us"),
    [
        ("bf16", "dispatch", 687),
        ("bf16", "dispatch, cached", 687),
        ("bf16", "dispatch, cached, outside", 1844),
        ("fp8", "dispatch", 354),
        ("bf16", "combine, in the arena", 687),
        ("bf16", "combine", 1844),
    ],
)
def test_floors_of_eight_ranks_with_uniform_routing(dtype, name, floor_us):
    # A smaller batch has the same share of rows; scaled up to 4096 tokens a rank.
    case = make_case(ranks=8, tokens=512, hidden=7168, topk=8, experts=256, dtype=dtype)
    found = make_run({name: 1000.0}, case)
    assert report.floor_us(case, found, found.measured[0]) * 8 == pytest.approx(floor_us, rel=0.005)


def test_rates_are_of_the_chain_unless_the_call_waits():
    case = make_case()
    found = make_run({"dispatch": 50.0, "dispatch, cached": 50.0}, case)
    whole, cached = (run.Measured(result.operation, 16, [50.0], 25.0, None) for result in found.measured)
    assert (whole.telling_us, cached.telling_us) == (50.0, 25.0)


def test_rows_alone_are_told_where_they_were_measured():
    case = make_case()
    found = make_run({"dispatch": 50.0}, case)
    assert "rows alone" not in report.to_text(case, found)
    (one,) = found.measured
    found.measured[:] = [
        replace(one, num_sms=8, row_speeds=RowSpeeds(3.36e11, 3.01e11)),
        replace(one, num_sms=24, row_speeds=RowSpeeds(3.38e11, 3.3e11)),
    ]
    lines = report.to_text(case, found).splitlines()
    assert [line.split(": ")[1] for line in lines if "rows alone, GB/s" in line] == [
        "336 written, 301 read",
        "338 written, 330 read",
    ]
    assert sum(line.strip().startswith("rows alone: what") for line in lines) == 1
    records = [json.loads(line) for line in report.to_json_lines(case, found)]
    assert [record["rows_read_bytes_per_s"] for record in records] == [3.01e11, 3.3e11]


# -- options ------------------------------------------------------------------------------------------------------


@pytest.fixture
def says_cuda(monkeypatch):
    monkeypatch.setattr(job, "backend_here", lambda wanted, **_: "host" if wanted == "host" else "cuda")


def prepared(*options: str, num_ranks: int = 4) -> Case:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return bench._prepare(parser.parse_args(["bench", *options]), num_ranks)


def test_defaults_are_those_of_the_backend(says_cuda):
    case = prepared("--sms=8,16", "--dtype=fp8")
    assert (case.backend, case.tokens, case.hidden, case.experts, case.sms) == ("cuda", 4096, 7168, 256, (8, 16))
    case = prepared("--backend=host")
    assert (case.backend, case.tokens, case.hidden, case.experts, case.sms) == ("host", 512, 1024, 64, ())
    assert prepared("--ranks-per-node=2", "--mode=low-latency").backend == "cuda"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sms=0"], "--sms: got 0; wanted numbers of at least 1"),
        (["--sms=8,x"], "--sms: got 8,x"),
        (["--sms=8", "--backend=host"], "--sms: got 8; wanted none with the host backend"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(says_cuda, options, named):
    with pytest.raises(InputError, match=f"^{named.replace('(', '.')}"):
        prepared(*options)


def test_cuda_where_there_is_none(capsys):
    assert cli.main(["bench", "--backend=cuda"]) == 1
    assert "backend='cuda'" in capsys.readouterr().err
