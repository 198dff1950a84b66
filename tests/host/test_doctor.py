"""What `epcomm doctor` starts or takes part in, for real: the two-rank smoke test, and the nodes of a job."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from epcomm import cli
from epcomm.bootstrap import topology
from epcomm.cli.doctor import child, findings, mpi, nodes, runner
from epcomm.cli.doctor.findings import Finding


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


# --job


def finding_of(rank: int) -> list[Finding]:
    return [Finding("nics", "ok", "1 x InfiniBand" if rank < 4 else "2 x InfiniBand", "look")]


@pytest.mark.ranks(6)
def test_nodes_of_a_job_and_hosts_that_differ(comm, monkeypatch):
    """Three hosts of two ranks, the last one with another network; only the first rank of a host looks."""
    monkeypatch.setattr(topology, "host_identity", lambda: f"host{comm.rank // 2}/boot")
    looked = []

    def look():
        looked.append(comm.rank)
        return finding_of(comm.rank)

    report = nodes.gather(comm, look)
    assert looked == ([comm.rank] if comm.rank % 2 == 0 else [])
    assert (report.topology.num_nodes, report.topology.ranks_per_node) == (3, 2)
    assert list(report.networks) == [f"host{host}/boot" for host in range(3)]
    assert report.alike == [
        (["host0/boot", "host1/boot"], tuple(finding_of(0))),
        (["host2/boot"], tuple(finding_of(4))),
    ]
    lines = nodes.to_text(report).splitlines()
    assert lines[0] == "6 ranks on 3 hosts: 3 nodes of 2"
    assert [line.split()[-1] for line in lines[3:6]] == ["host0", "host1", "host2"]
    assert lines[7] == "host0, host1:"
    assert lines[-1].startswith("The hosts differ")


@pytest.mark.ranks(2)
def test_checks_of_a_process_are_none_of_its_host(comm, monkeypatch):
    """What the launcher told a probe of one rank says nothing of the job."""
    nics = finding_of(0)
    report = nodes.gather(comm, lambda: [Finding("nodes", "ok", f"this one is number {comm.rank}"), *nics])
    assert list(report.networks.values()) == [tuple(nics)]


@pytest.mark.ranks(6)
def test_virtual_nodes_of_a_job_are_called_so(comm, monkeypatch):
    """One of them spans two hosts."""
    monkeypatch.setattr(topology, "host_identity", lambda: f"host{comm.rank // 3}/boot")
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "2")
    report = nodes.gather(comm, lambda: finding_of(0))
    lines = nodes.to_text(report).splitlines()
    assert lines[0] == "6 ranks on 2 hosts: 3 nodes of 2, virtual ones (EPCOMM_RANKS_PER_NODE)"
    assert lines[4].endswith("host0, host1")
    assert "differ" not in lines[-1]


def test_job_from_the_command_line(run_ranks):
    command = [sys.executable, "-m", "epcomm", "doctor", "--job", "--json"]
    returncode, output = run_ranks(4, command, env={"EPCOMM_RANKS_PER_NODE": "2"})
    assert returncode == 0, output
    report = json.loads(output)  # of one rank
    assert (report["ranks"], report["nodes"], report["ranks_per_node"]) == (4, 2, 2)
    assert report["local_ranks"] == [0, 1, 2, 3]
    (network,) = report["networks"]
    checks = [finding["check"] for finding in network["findings"]]
    assert checks == ["nvshmem", "nics", "ethernet", "nvshmem transports", "gpudirect rdma", "ibgda"]


def test_job_whose_ranks_form_no_nodes(run_ranks):
    command = [sys.executable, "-m", "epcomm", "doctor", "--job"]
    returncode, output = run_ranks(3, command, env={"EPCOMM_RANKS_PER_NODE": "2"})
    assert returncode == 1
    assert output.count("epcomm doctor: ranks_per_node: got 2; wanted a divisor of the number of ranks, 3") == 1


# Its words go to a file: a launcher that aborts a job may lose what was printed just before.
ONE_RANK_FAILS = """
import os, sys
from epcomm import cli, env
if env.launcher_local_rank() == 1:
    os.environ["EPCOMM_RANKS_PER_NODE"] = "many"
    sys.stderr = open(sys.argv[1], "w")
sys.exit(cli.main(["doctor", "--job"]))
"""


def test_a_rank_that_fails_by_itself_ends_the_job(run_ranks, tmp_path):
    """The others wait for it in an exchange."""
    words = tmp_path / "words"
    returncode, output = run_ranks(3, [sys.executable, "-c", ONE_RANK_FAILS, str(words)])
    assert returncode == 1, output
    assert words.read_text().startswith("epcomm: rank 1: EPCOMM_RANKS_PER_NODE: got 'many'")


def test_job_of_one_process(capsys):
    assert cli.main(["doctor", "--job"]) == 0
    assert capsys.readouterr().out.startswith("1 rank on 1 host: 1 node of 1\n")
