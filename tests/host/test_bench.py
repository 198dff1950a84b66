"""`epcomm bench` as a program, in throughput mode, which needs MPI."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from epcomm import reference
from epcomm.bootstrap import run_ranks
from epcomm.testing import uniform_routing

SMALL = ["--tokens=16", "--hidden=128", "--experts=8", "--topk=2", "--repeats=3"]

NOTHING_RIGHT = """\
import sys
import numpy
from epcomm import Buffer
from epcomm.cli import main
combine = Buffer.combine
def broken(buffer, *args):
    result = combine(buffer, *args)
    result.combined_x.view(numpy.uint16)[0, 0] ^= buffer.rank
    return result
Buffer.combine = broken
sys.exit(main(["bench", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_throughput_on_two_ranks(tmp_path):
    path = tmp_path / "bench.jsonl"
    command = [sys.executable, "-m", "epcomm", "bench", "--ranks=2", "--dtype=fp8", *SMALL, f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "every result was bitwise equal to epcomm.reference" in done.stdout
    assert "x the Alltoallv pair (goal: at most 2)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80

    records = {record["operation"]: record for record in map(json.loads, path.read_text().splitlines())}
    pairs = {
        "dispatch": "Alltoallv of dispatch",
        "dispatch, cached": "Alltoallv of dispatch",
        "combine": "Alltoallv of combine",
        "combine, in place": "Alltoallv of combine",
        "dispatch + combine": "Alltoallv, both",
    }
    assert records.keys() == {"get_dispatch_layout", *pairs, *pairs.values()}
    for name, baseline in pairs.items():
        assert records[name]["ratio_to_alltoallv"] == records[name]["p50_us"] / records[baseline]["p50_us"]
    topk_idx = [uniform_routing(16, 8, 2, seed=20, first_token=16 * rank) for rank in range(2)]
    rows = np.stack([reference.get_dispatch_layout(choices, 8, 2).num_tokens_per_rank for choices in topk_idx])
    row_bytes = 128 + 4 + 2 * (8 + 4)
    assert records["dispatch"]["logical_bytes_per_rank"] == rows.sum() * row_bytes / 2
    assert records["Alltoallv of dispatch"]["wire_bytes_per_rank"] == (rows[0, 1] + rows[1, 0]) * row_bytes / 2
    assert records["Alltoallv of combine"]["logical_bytes_per_rank"] == rows.sum() * 128 * 2 / 2
    assert records["dispatch"]["mpi4py"] is not None
    assert records["dispatch"]["ranks_per_node"] == 2


@pytest.mark.slow
def test_links_of_two_nodes(tmp_path):
    """Each rank's counters are compared with the routing before anything is timed, else the status is 1."""
    path = tmp_path / "bench.jsonl"
    nodes = ["--ranks=4", "--ranks-per-node=2", "--nic-gbs=50", "--nvlink-gbs=370"]
    command = [sys.executable, "-m", "epcomm", "bench", *nodes, *SMALL, f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "counted by the backend, and as sums that came back" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80

    records = {record["operation"]: record for record in map(json.loads, path.read_text().splitlines())}
    choices = [uniform_routing(16, 8, 2, seed=20, first_token=16 * rank) // 4 for rank in range(4)]
    crossing = [int((chosen != rank // 2).any(axis=1).sum()) for rank, chosen in enumerate(choices)]
    for name in ("dispatch", "dispatch, cached", "combine", "combine, in place"):
        assert records[name]["network_row_bytes_per_rank"] == sum(crossing) / 4 * 128 * 2
        floor_us = max(
            records[name]["network_bytes_of_busiest"] / 50e3, records[name]["nvlink_bytes_of_busiest"] / 370e3
        )
        assert records[name]["link_floor_us"] == pytest.approx(floor_us)
        assert records[name]["ratio_to_link_floor"] == pytest.approx(records[name]["p50_us"] / floor_us)
    direct = records["Alltoallv of combine"]["network_row_bytes_per_rank"]
    assert direct >= records["combine"]["network_row_bytes_per_rank"]
    assert "network_us" not in records["get_dispatch_layout"]


WRONG_COUNTS = """\
import sys
from epcomm import Buffer
from epcomm.cli import main
stats, looks = Buffer.stats.fget, []
def wrong(buffer):
    looks.append(None)
    return {**stats(buffer), "rows_from_other_nodes": stats(buffer)["rows_from_other_nodes"] + (len(looks) == 2)}
Buffer.stats = property(wrong)
sys.exit(main(["bench", "--ranks-per-node=1", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_wrong_counts_are_not_measured():
    returncode, output = run_ranks(2, [sys.executable, "-c", WRONG_COUNTS, *SMALL], timeout_s=60, capture=True)
    assert returncode == 1
    wrong = "1 sums brought back from other nodes by stats, 0 by the routing; nothing was measured"
    assert output.splitlines() == [f"epcomm bench: dispatch on rank {rank}: {wrong}" for rank in range(2)]


@pytest.mark.slow
def test_wrong_results_are_not_measured():
    command = [sys.executable, "-c", NOTHING_RIGHT, *SMALL]
    returncode, output = run_ranks(2, command, timeout_s=60, capture=True)
    assert returncode == 1
    wrong = "differs from epcomm.reference; nothing was measured"
    assert output.splitlines() == [
        f"epcomm bench: combine on rank 1 {wrong}",
        f"epcomm bench: combine, in place on rank 1 {wrong}",
    ]
