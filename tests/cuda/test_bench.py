"""``epcomm bench`` and ``epcomm demo`` on a GPU, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.examples import import_path
from helpers.gpu import need_gpu

cupy = need_gpu()

SMALL = ["--tokens=96", "--hidden=512", "--experts=16", "--topk=4", "--repeats=4"]


def epcomm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program; it starts its ranks, and MPS for them, itself."""
    return subprocess.run(
        [sys.executable, "-m", "epcomm", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": import_path()},
    )


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "fp32"), (2, "bf16"), (3, "fp8")])
def test_everything_is_checked_and_measured(ranks, dtype, tmp_path):
    file = tmp_path / "lines.json"
    experts = ["--experts=15"] if ranks == 3 else []
    done = epcomm("bench", f"--ranks={ranks}", f"--dtype={dtype}", "--sms=4,2", f"--json={file}", *SMALL, *experts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every row of every rank was right in all its bits, before and after" in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["sms"] for record in records] == 8 * [4] + 8 * [2]
    for record in records:
        assert record["backend"] == "cuda"
        assert 0 < record["p50_us"] <= record["p99_us"]
        assert record["chain_us"] > 0
        # A floor is one only if nothing is faster; small rows stay in the cache, so it says little here.
        assert (record["floor_us"] is None) == (record["operation"] == "get_dispatch_layout")


def test_nodes_are_checked_and_measured(tmp_path):
    file = tmp_path / "lines.json"
    rates = ["--nic-gbs=50", "--nvlink-gbs=370"]
    done = epcomm("bench", "--ranks=4", "--ranks-per-node=2", "--sms=4", f"--json={file}", *rates, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 ranks on " in done.stdout
    assert "2 virtual nodes" in done.stdout
    # The run compares what the kernels count with the routing, and ends if it differs.
    assert "counted by the backend, and as sums that came back" in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 8
    assert {record["ranks_per_node"] for record in records} == {2}
    for record in records[1:]:
        assert record["network_row_bytes_per_rank"] > 0
        assert record["link_floor_us"] == max(record["network_us"], record["nvlink_us"]) > 0


def test_low_latency_between_nodes(tmp_path):
    file = tmp_path / "lines.json"
    sizes = ["--tokens=12", "--hidden=256", "--experts=16", "--topk=4", "--repeats=2", "--sms=2"]
    done = epcomm("bench", "--mode=low-latency", "--ranks=2", "--ranks-per-node=1", f"--json={file}", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 virtual nodes" in done.stdout
    for record in map(json.loads, file.read_text().splitlines()):
        network = record["network_row_bytes_per_rank"] + record["network_other_bytes_per_rank"]
        assert network == record["wire_bytes_per_rank"] > 0  # each rank is a node
        assert record["nvlink_bytes_per_rank"] == 0


@pytest.mark.parametrize(("ranks", "hidden", "num_rows"), [(1, 264, 6), (2, 512, 10)])
def test_low_latency_is_checked_and_measured(ranks, hidden, num_rows, tmp_path):
    file = tmp_path / "lines.json"
    sizes = ["--tokens=12", f"--hidden={hidden}", "--experts=16", "--topk=4", "--repeats=4"]
    done = epcomm("bench", "--mode=low-latency", f"--ranks={ranks}", "--sms=4,2", f"--json={file}", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every row of every rank was right in all its bits, before and after" in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["sms"] for record in records] == num_rows * [4] + num_rows * [2]
    for record in records:
        assert 0 < record["p50_us"] <= record["p99_us"]
        assert min(record["row_us"], record["graph_us"], record["python_us"]) > 0
        assert (record["send_us"] is None) == record["operation"].startswith("pair")


def test_one_wrong_bit_of_low_latency_ends_it():
    wrong = WRONG.replace("Buffer.combine", "Buffer.low_latency_combine")
    done = subprocess.run(
        [sys.executable, "-c", wrong, "--mode=low-latency", *SMALL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "combine, outside: sums differ" in done.stderr


WRONG = """
import sys
import epcomm
from epcomm.__main__ import main
from epcomm.cli.bits import as_bits
combine = epcomm.Buffer.combine
def broken(buffer, *args, **options):
    result = combine(buffer, *args, **options)
    as_bits(result.combined_x)[5, 7] ^= 1
    return result
epcomm.Buffer.combine = broken
sys.exit(main(["bench", "--backend=cuda", "--ranks=1", *sys.argv[1:]]))
"""


def test_one_wrong_bit_ends_it():
    done = subprocess.run(
        [sys.executable, "-c", WRONG, *SMALL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "combine: sums: 1 of 96 differ, first number 5" in done.stderr


@pytest.mark.parametrize("ranks", [1, 3])
def test_demo(ranks):
    done = epcomm("demo", f"--ranks={ranks}", "--backend=cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend  cuda (CuPy on " in done.stdout
    assert done.stdout.endswith("\nall checks hold\n")


def test_demo_takes_the_gpu_by_itself():
    environment = {name: value for name, value in os.environ.items() if name != "EPCOMM_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-m", "epcomm", "demo", "--ranks=1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**environment, "PYTHONPATH": import_path()},
    )
    assert "backend  cuda (CuPy on " in done.stdout, done.stdout + done.stderr
