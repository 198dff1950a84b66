"""`epcomm demo` as a program: its own ranks, ranks of a job it finds itself in, ranks that fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from epcomm.bootstrap import run_ranks

SMALL = ["--hidden=64", "--experts=8", "--topk=2"]

RANK_1_FAILS = """\
import sys
from epcomm import Buffer
from epcomm.cli import main
combine = Buffer.combine
def broken(buffer, *args):
    if buffer.rank == 1:
        raise RuntimeError("rank 1 has had enough")
    return combine(buffer, *args)
Buffer.combine = broken
sys.exit(main(["demo"]))
"""


def test_it_starts_its_ranks_and_checks():
    command = [sys.executable, "-m", "epcomm", "demo", "--ranks=2", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "its experts spread over 2 ranks" in done.stdout
    for check in ("dispatch", "combine", "layer"):
        assert f"  ok    {check}" in done.stdout
    assert done.stdout.endswith("\nall checks hold\n")


@pytest.mark.slow
def test_a_wrong_number_of_ranks_in_a_job_is_said_once():
    command = [sys.executable, "-m", "epcomm", "demo", "--ranks=3", *SMALL]
    returncode, output = run_ranks(2, command, timeout_s=60, capture=True)
    assert returncode == 2
    assert output == "epcomm demo: --ranks: got 3; wanted 2, the ranks of this job, or nothing\n"


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job():
    # Under plain Python, where sys.exit of one rank would leave the other waiting.
    returncode, output = run_ranks(2, [sys.executable, "-c", RANK_1_FAILS], timeout_s=60, capture=True)
    assert returncode not in (0, 124)
    assert "RuntimeError: rank 1 has had enough" in output
