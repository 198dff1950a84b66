"""The bench: options, data, that it refuses to time wrong results, interleaving, table and JSON. No MPI."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import pytest

from epcomm import cli, env
from epcomm.bootstrap import SoloCommunicator, run_local
from epcomm.bootstrap.topology import discover
from epcomm.buffer import Buffer
from epcomm.cli import bench, job
from epcomm.cli.bench import case as cases
from epcomm.cli.bench import report
from epcomm.cli.bench.low_latency import run_low_latency
from epcomm.cli.bench.measure import Measured, Operation, Run, digest, find_differences, measure
from epcomm.cli.bench.throughput import PAIR


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch):
    for name in env.LAUNCHER_SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def make_case(**changes) -> cases.Case:
    parameters = {
        "mode": "low-latency",
        "backend": "host",
        "ranks": 2,
        "ranks_per_node": None,
        "tokens": 5,
        "hidden": 128,
        "topk": 2,
        "experts": 8,
        "dtype": "bf16",
        "routing": "uniform",
        "repeats": 2,
        "json": None,
    }
    return cases.Case(**{**parameters, **changes})


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--experts", "6"], "--experts: got 6; wanted a multiple of the 4 ranks"),
        (["--topk", "33"], "--topk: got 33; wanted 1 to 32 for 64 experts"),
        (["--tokens", "0"], "--tokens: got 0; wanted at least 1"),
        (["--repeats", "0"], "--repeats: got 0; wanted at least 1"),
        (["--hidden", "12"], "--hidden: got 12; wanted a multiple of 8 for bf16"),
        (["--hidden", "6", "--dtype", "fp32"], "--hidden: got 6; wanted a multiple of 4 for fp32"),
        (["--hidden", "64", "--dtype", "fp8"], "--hidden: got 64; wanted a multiple of 128 for fp8"),
        (["--ranks-per-node", "3"], "--ranks-per-node: got 3; wanted a divisor of the 4 ranks"),
        (["--nic-gbs", "0"], "--nic-gbs: got 0.0; wanted more than 0"),
        (["--nvlink-gbs", "inf"], "--nvlink-gbs: got inf; wanted more than 0"),
        (["--mode", "low-latency", "--dtype", "fp32"], "--dtype: got fp32; wanted bf16"),
        (["--json", "no-such-folder/x"], "--json: got no-such-folder/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line_and_status_2(options, named, capsys, monkeypatch):
    monkeypatch.setattr(job, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"epcomm bench: {named}")
    assert captured.err.count("\n") == 1


def test_the_parser_knows_what_the_cases_know():
    subparsers = argparse.ArgumentParser().add_subparsers()
    bench.add_parser(subparsers)
    choices = {action.dest: action.choices for action in subparsers.choices["bench"]._actions}
    assert choices["dtype"] == tuple(cases.DTYPES)
    assert choices["routing"] == cases.ROUTINGS


def test_throughput_without_mpi_has_the_pip_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    assert cli.main(["bench", "--ranks=1"]) == 1
    assert "pip install 'epcomm[mpi]'" in capsys.readouterr().err


# -- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_ranks_have_different_inputs(routing):
    ours, theirs = (cases.make_inputs(make_case(routing=routing, tokens=32), rank) for rank in range(2))
    assert (ours.x != theirs.x).any()
    assert (ours.topk_idx != theirs.topk_idx).any()
    assert (ours.topk_weights >= 0).all()


def test_grouped_routing_stays_on_half_of_the_ranks():
    case = make_case(ranks=4, experts=16, topk=3, tokens=64, routing="grouped")
    ranks = cases.make_inputs(case, 1).topk_idx // 4
    assert max(len(set(row)) for row in ranks.tolist()) == 2


def test_grouped_routing_takes_as_many_ranks_as_the_choices_need():
    case = make_case(ranks=4, experts=4, topk=3, tokens=64, routing="grouped")
    assert cases.make_inputs(case, 0).topk_idx.shape == (64, 3)


def test_fp8_rows_come_with_scales():
    inputs = cases.make_inputs(make_case(dtype="fp8", hidden=256), 0)
    x, scales = inputs.payload
    assert (x.dtype.name, x.shape, scales.shape) == ("float8_e4m3fn", (5, 256), (5, 2))
    assert make_case(dtype="fp8", hidden=256).scale_bytes == scales[0].nbytes
    assert cases.make_inputs(make_case(), 0).payload.dtype.name == "bfloat16"


# -- comparison ---------------------------------------------------------------------------------------------------


def test_digests_see_bits_shapes_and_dtypes():
    zeros = np.zeros((2, 3), np.float32)
    others = [-zeros, zeros.reshape(3, 2), zeros.view(np.int32), zeros[:1]]
    assert len({digest(array) for array in [zeros, *others]}) == 5
    assert digest(zeros) == digest(zeros.copy())
    assert digest(zeros[:, ::2]) == digest(np.zeros((2, 2), np.float32))
    assert digest(zeros, zeros) != digest(zeros)


def test_differences_are_named_on_all_ranks():
    def program(comm):
        found = {"a": "1", "b": "2" if comm.rank == 0 else "9"}
        return find_differences(comm, found, lambda: [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}])

    assert run_local(2, program) == [["b on rank 1 differs from epcomm.reference"]] * 2


def test_a_result_that_is_missing_differs():
    assert find_differences(SoloCommunicator(), {}, lambda: [{"a": "1"}]) == [
        "a on rank 0 differs from epcomm.reference"
    ]


@pytest.mark.parametrize(
    ("hidden", "dtypes"), [(128, {"bf16", "fp8"}), (64, {"bf16"})], ids=["fp8_too", "no_fp8_for_this_hidden"]
)
def test_low_latency_is_right_and_measured(hidden, dtypes):
    case = make_case(hidden=hidden)
    runs = run_local(2, run_low_latency, case)
    assert runs[0].differences == []
    names = [result.operation.name for result in runs[0].measured]
    expected = [f"dispatch, {dtype}" for dtype in sorted(dtypes)] + ["combine", "combine, zero copy"]
    assert names == expected + [f"dispatch {dtype} + combine" for dtype in sorted(dtypes)]
    assert [result.times_s for result in runs[0].measured] == [result.times_s for result in runs[1].measured]
    (combine,) = [result.operation for result in runs[0].measured if result.operation.name == "combine"]
    owners = np.stack([cases.make_inputs(case, rank).topk_idx // 4 for rank in range(2)])
    num_sent = int((owners != np.arange(2)[:, None, None]).sum())
    assert (combine.logical_bytes, combine.wire_bytes) == (owners.size * 2 * hidden, num_sent * 2 * hidden)


def test_wrong_results_are_not_measured(monkeypatch, capsys):
    combine = Buffer.low_latency_combine

    def broken(buffer, *args, **kwargs):
        result = combine(buffer, *args, **kwargs)
        result.combined_x.view(np.uint16)[0, 0] ^= 1
        return result

    monkeypatch.setattr(Buffer, "low_latency_combine", broken)
    assert cli.main(["bench", "--ranks=1", "--mode=low-latency", "--tokens=4", "--hidden=128", "--experts=8"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "combine on rank 0 differs from epcomm.reference; nothing was measured" in captured.err
    assert "dispatch" not in captured.err


# -- timing -------------------------------------------------------------------------------------------------------


def test_operations_run_in_turn():
    calls: list[str] = []
    operations = [
        Operation("a", lambda: calls.append("a"), 1, 1),
        Operation("b", lambda: calls.append("b"), 1, 1, before=lambda: calls.append("before b")),
    ]
    measured = measure(operations, SoloCommunicator(), repeats=4)
    assert calls == ["a", "before b", "b"] * (len(calls) // 3)
    assert len(calls) // 3 > 4  # the first turns are not counted
    assert [len(result.times_s) for result in measured] == [4, 4]


def test_percentiles():
    result = Measured(Operation("a", print, 1, 1), tuple(float(n) for n in range(101)))
    assert (result.p50_s, result.p99_s) == (50.0, 99.0)


# -- report -------------------------------------------------------------------------------------------------------


def make_run() -> Run:
    """A dispatch that takes three times as long as its Alltoallv, and the pair one and a half times."""
    operations = [
        (Operation("get_dispatch_layout", print, 0, 0), 1e-4),
        (Operation("Alltoallv of dispatch", print, 8_000_000, 4_000_000), 1e-3),
        (Operation("dispatch", print, 8_000_000, 4_000_000, "Alltoallv of dispatch"), 3e-3),
        (Operation("Alltoallv, both", print, 16_000_000, 8_000_000), 2e-3),
        (Operation(PAIR, print, 16_000_000, 8_000_000, "Alltoallv, both"), 3e-3),
    ]
    measured = [Measured(operation, (time_s, time_s)) for operation, time_s in operations]
    return Run(discover(SoloCommunicator(), 1), "host", [], measured)


@pytest.mark.parametrize("mode", ["throughput", "low-latency"])
def test_table_fits_a_terminal(mode):
    case = make_case(mode=mode, tokens=4096, hidden=7168, topk=8, experts=256, routing="uniform", ranks=8)
    text = report.to_text(case, make_run())
    assert max(map(len, text.splitlines())) <= 80
    assert text.endswith("dispatch + combine: 1.50 x the Alltoallv pair (goal: at most 2)")
    (line,) = [line for line in text.splitlines() if line.startswith("  dispatch  ")]
    assert line.split() == ["dispatch", "3.000", "3.000", "1.00", "0.50", "0.33", "0.17", "3.00"]
    assert "logical: " in text
    assert "wire: " in text


def test_json_lines():
    case = make_case(mode="throughput")
    records = [json.loads(line) for line in report.to_json_lines(case, make_run())]
    assert [record["operation"] for record in records][2] == "dispatch"
    dispatch = records[2]
    assert dispatch["p50_us"] == pytest.approx(3000)
    assert dispatch["logical_bytes_per_rank"] == 4_000_000
    assert dispatch["wire_gb_per_s"] == pytest.approx(2 / 3)
    assert dispatch["ratio_to_alltoallv"] == pytest.approx(3)
    assert records[0]["ratio_to_alltoallv"] is None
    for name in ("ranks", "tokens_per_rank", "hidden", "topk", "experts", "dtype", "routing", "python", "numpy", "cpu"):
        assert dispatch[name] is not None
    assert dispatch["cores"] >= 1
