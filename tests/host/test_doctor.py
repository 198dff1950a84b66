"""The two-rank smoke test of `epcomm doctor`, for real."""

from __future__ import annotations

import subprocess

import pytest

from epcomm.cli.doctor import child, findings, mpi, runner


def test_two_ranks_pass_the_smoke_test():
    (probe,) = [probe for probe in runner.PROBES if probe.name == "smoke test"]
    found = runner.run_probe(probe)
    assert [finding.status for finding in found] == ["ok"], found
    assert "bitwise right" in found[0].text
    assert findings.host_works(found)


@pytest.mark.slow
def test_a_rank_alone_in_its_world_does_not_pass():
    done = subprocess.run(
        child.command("epcomm.cli.doctor.smoke"), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == f"{mpi.SMOKE_LINE}RuntimeError: the launcher made a world of 1 ranks instead of 2\n"
