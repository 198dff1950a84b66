"""The plan: expectations against routing that is counted row by row, traffic against the messages, the report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import tomllib
from pathlib import Path

import pytest
from helpers.node_rows import count_rows

from epcomm import cli, env
from epcomm.cli import plan as command
from epcomm.cli.plan.buffers import buffers_of
from epcomm.cli.plan.messages import Messages
from epcomm.cli.plan.routing import expected_rows, hit_probability
from epcomm.cli.plan.times import Links, predict
from epcomm.cli.plan.traffic import Job, combine_traffic, dispatch_traffic
from epcomm.errors import CapacityError, InputError
from epcomm.kernels.rings import Rings
from epcomm.testing import grouped_routing, uniform_routing

LINKS = Links(nic_gbs=50, nvlink_gbs=370, nic_mops=100, nic_us=5, nvlink_us=2)


def make_job(num_nodes=4, gpus=8, tokens=4096, hidden=7168, topk=8, wanted_experts=256, dtype="bf16") -> Job:
    return Job(num_nodes, gpus, tokens, hidden, topk, wanted_experts, dtype)


# -- routing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "num_owned", "num_topk"), [(8, 2, 3), (6, 3, 1), (6, 1, 6), (7, 0, 2)])
def test_hit_probability_counts_all_sets(num_experts, num_owned, num_topk):
    sets = list(itertools.combinations(range(num_experts), num_topk))
    hits = sum(min(chosen) < num_owned for chosen in sets)
    assert hit_probability(num_experts, num_owned, num_topk) == pytest.approx(hits / len(sets), abs=1e-15)


def test_hit_probability_of_many_experts_has_its_digits():
    assert hit_probability(1 << 20, 1, 3) == pytest.approx(3 / (1 << 20), rel=1e-14)
    assert hit_probability(256, 256, 1) == 1.0


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, 1, 5), (4, -1, 1)])
def test_hit_probability_of_experts_that_there_are_not(numbers):
    with pytest.raises(InputError, match="wanted 0 to 4"):
        hit_probability(*numbers)


SHAPES = {
    "2x4": (2, 4, 32, 4),
    "4x2": (4, 2, 64, 6),
    "3x3": (3, 3, 18, 5),
    "8x1": (8, 1, 32, 3),
    "1x8": (1, 8, 64, 8),
    "one_choice": (4, 2, 16, 1),
    "all_experts": (2, 3, 12, 12),
    "one_expert_a_rank": (8, 2, 16, 8),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_expectations_are_those_of_routing_that_is_counted(shape):
    num_nodes, gpus, num_experts, num_topk = shape
    num_tokens, num_ranks = 400, num_nodes * gpus
    topk_idx = uniform_routing(num_ranks * num_tokens, num_experts, num_topk, seed=7)
    topk_idx = topk_idx.reshape(num_ranks, num_tokens, num_topk)
    expected = expected_rows(num_nodes, gpus, num_tokens, num_experts, num_topk)._asdict()
    for rank in (0, num_ranks - 1):
        for name, counts in count_rows(topk_idx, rank, num_nodes, gpus, num_experts).items():
            # The standard error of a sum of independent tokens, and four of them.
            error = math.sqrt(counts.size) * counts.std() if counts.size else 0.0
            assert abs(counts.sum() - expected[name]) <= 4 * error + 1e-6, (name, rank)


LIMITS = {
    "4_of_8x2": (8, 2, 64, 8, 4),
    "2_of_4x4": (4, 4, 32, 6, 2),
    "2_of_3x3": (3, 3, 18, 5, 2),
    "1_of_4x2": (4, 2, 32, 6, 1),
    "2_of_8x1": (8, 1, 32, 3, 2),
    "no_choice_within_the_nodes": (4, 2, 16, 8, 2),
}


@pytest.mark.parametrize("shape", LIMITS.values(), ids=LIMITS)
def test_expectations_with_a_node_limit_are_those_of_grouped_routing(shape):
    num_nodes, gpus, num_experts, num_topk, limit = shape
    num_tokens, num_ranks = 600, num_nodes * gpus
    topk_idx = grouped_routing(
        num_ranks * num_tokens, num_experts, num_topk, seed=5, num_groups=num_nodes, num_topk_groups=limit
    ).reshape(num_ranks, num_tokens, num_topk)
    expected = expected_rows(num_nodes, gpus, num_tokens, num_experts, num_topk, limit)._asdict()
    for rank in (0, num_ranks - 1):
        for name, counts in count_rows(topk_idx, rank, num_nodes, gpus, num_experts).items():
            error = math.sqrt(counts.size) * counts.std() if counts.size else 0.0
            assert abs(counts.sum() - expected[name]) <= 4 * error + 1e-6, (name, rank)
    # Without the limit more nodes would be chosen, beyond those tolerances.
    unlimited = expected_rows(num_nodes, gpus, num_tokens, num_experts, num_topk)
    assert unlimited.crossing > expected["crossing"] + 4 * math.sqrt(num_tokens * num_nodes)


@pytest.mark.parametrize("limit", [4, 5, None])
def test_a_limit_of_all_nodes_is_none(limit):
    assert expected_rows(4, 8, 4096, 256, 8, limit) == expected_rows(4, 8, 4096, 256, 8)


def test_a_limit_that_is_never_reached_changes_nothing():
    """Four choices lie on four nodes at most; but here the draws are followed one by one."""
    rows, limited = expected_rows(16, 8, 4096, 256, 4), expected_rows(16, 8, 4096, 256, 4, 15)
    assert limited.node_hit == pytest.approx(rows.node_hit, rel=1e-12)
    assert limited.rank_hit == pytest.approx(rows.rank_hit, rel=1e-12)


@pytest.mark.parametrize("limit", [0, -1, 1])
def test_nodes_that_have_too_few_experts(limit):
    with pytest.raises(InputError, match="enough nodes of 4 experts for the 6 of a token"):
        expected_rows(4, 2, 10, 16, 6, limit)


def test_a_node_limit_saves_network_and_nothing_else():
    free, limited = make_job(32), dataclasses.replace(make_job(32), node_limit=4)
    assert limited.rows.crossing == pytest.approx(4096 * 4 * 31 / 32, rel=1e-4)  # of 7.3 nodes
    assert dispatch_traffic(limited).row_bytes < 0.56 * dispatch_traffic(free).row_bytes
    assert limited.rows.received == pytest.approx(free.rows.received, rel=1e-12)  # a rank has a choice's one expert


def test_expectations_would_not_fit_another_formula():
    """The tolerance above tells sets of different experts from experts that are drawn one by one."""
    with_repetition = 1 - (1 - 1 / 4) ** 6
    num_tokens = 400
    error = math.sqrt(num_tokens * with_repetition * (1 - with_repetition))
    assert abs(hit_probability(8, 2, 6) - with_repetition) * num_tokens > 4 * error


def test_one_node_sends_nothing_over_the_network():
    rows = expected_rows(1, 8, 4096, 256, 8)
    assert (rows.crossing, rows.forwarded, rows.for_each_rank, rows.node_hit) == (0, 0, 0, 1)
    assert rows.received == pytest.approx(rows.near + rows.own)


def test_one_gpu_a_node_has_no_nvlink():
    rows = expected_rows(8, 1, 4096, 256, 8)
    assert (rows.over_nvlink, rows.node_hit) == (0, rows.rank_hit)
    assert rows.crossing == rows.for_each_rank  # nothing to save


def test_one_choice_goes_to_one_place():
    rows = expected_rows(4, 8, 1024, 64, 1)
    assert rows.crossing == rows.for_each_rank == pytest.approx(1024 * 3 / 4)
    assert rows.received == pytest.approx(1024)


def test_all_experts_are_everywhere():
    rows = expected_rows(4, 2, 10, 16, 16)
    assert (rows.crossing, rows.near, rows.forwarded, rows.own, rows.received) == (30, 10, 30, 40, 80)


def test_rows_of_experts_that_cannot_be_shared_out():
    with pytest.raises(InputError, match="wanted a multiple of the 6 ranks"):
        expected_rows(2, 3, 10, 16, 4)


@pytest.mark.parametrize("num_nodes", [1, 2, 32])
def test_what_is_received_was_sent(num_nodes):
    rows = expected_rows(num_nodes, 8, 4096, 256, 8)
    assert rows.received == pytest.approx(rows.over_nvlink + rows.own)


# -- traffic ------------------------------------------------------------------------------------------------------


def test_experts_are_rounded_up_to_the_ranks():
    assert [make_job(num_nodes).experts for num_nodes in (1, 3, 32, 64)] == [256, 264, 256, 512]


def test_bytes_of_all_experts_on_two_nodes():
    """Every row goes everywhere, so everything can be counted by hand."""
    job = make_job(2, 2, tokens=16, hidden=1024, topk=8, wanted_experts=8)
    dispatch, combine = dispatch_traffic(job), combine_traffic(job)
    beside = 8 * (8 + 4) + 4
    assert dispatch.row_bytes == combine.row_bytes == 16 * 2048
    assert dispatch.nvlink_bytes == 2 * 16 * (2048 + beside)
    assert combine.nvlink_bytes == 2 * 16 * 2048
    # Eight messages of 2 rows: where each goes, 128 bytes. Two of 8 of what is beside: 2 places, 8 indices and weights,
    # the source. A word for each of them there, and one back. To both ranks counts, with a word, and four
    # words as the call begins.
    counts = 2 * (8 * (32 + 16 + 2 + 2) + 8)
    assert dispatch.other_bytes == 16 * (128 + 8 + 64 + 32 + 8) + 2 * 8 * 10 + counts + 2 * 4 * 8
    assert dispatch.nic_operations == 3 * (8 + 2) + 2 * 2 + 2 * 4
    # A question and an answer, of one message each: 2 places a token, in 16 bytes.
    assert combine.other_bytes == 16 * 16 + 2 * 8 + 2 * 4 * 8
    assert combine.nic_operations == 2 + 2 + 2 * 4


def test_one_node_has_nvlink_bytes_alone():
    job = make_job(1)
    for traffic in (dispatch_traffic(job), combine_traffic(job)):
        assert (traffic.network_bytes, traffic.nic_operations) == (0, 0)
        assert traffic.nvlink_bytes > 0


def test_fp8_halves_the_rows_of_dispatch_and_brings_scales():
    bf16, fp8 = make_job(), make_job(dtype="fp8")
    assert dispatch_traffic(fp8).row_bytes == dispatch_traffic(bf16).row_bytes / 2
    assert fp8.sizes.beside_bytes - bf16.sizes.beside_bytes == 4 * 56
    assert combine_traffic(fp8) == combine_traffic(bf16)


def test_messages_that_are_empty_have_words_too():
    """Sparse routing: fewer rows than words."""
    job = make_job(256, tokens=64)
    traffic, num_units = dispatch_traffic(job), 64 // Messages(job.sizes).rows.unit_tokens
    assert job.rows.crossing < 2 * num_units * 255 < traffic.nic_operations


def test_filled_messages_are_those_that_are_counted():
    """Operations of dispatch, against routing that is cut into messages."""
    job = make_job(4, 2, tokens=1001, hidden=4096, topk=2, wanted_experts=64)
    nodes = uniform_routing(job.tokens, job.experts, job.topk, seed=3) // (job.experts // job.num_nodes)
    num_sent, words = 0, 0
    for message in Messages(job.sizes).of_dispatch:
        for first in range(0, job.tokens, message.unit_tokens):
            num_sent += len(set(nodes[first : first + message.unit_tokens].ravel().tolist()) - {0})
            words += 2 * 3
    expected = dispatch_traffic(job).nic_operations - words - (2 + 4) * 6
    assert num_sent == pytest.approx(expected, rel=0.05)


# -- buffers and times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [make_job(), make_job(2, 1, 7, 128, 2, 8, "fp8"), make_job(32), make_job(64, hidden=8)])
def test_the_least_network_memory_is_the_least(job):
    sent, least = Messages(job.sizes), buffers_of(job).rdma_least
    both = (sent.of_dispatch, (sent.asked, sent.answered))

    def cut_all(num_bytes: int) -> None:
        for messages in both:
            Rings(0, num_bytes, 0, job.gpus, job.num_nodes, is_staged=True).cut(messages, (256, 128))

    cut_all(least)
    with pytest.raises(CapacityError):
        cut_all(least - 1)


def test_more_than_most_gives_no_more_groups():
    job = make_job()
    sent, most = Messages(job.sizes), buffers_of(job).rdma_most
    rings = Rings(0, most, 0, job.gpus, job.num_nodes, is_staged=True)
    assert [ring.num_groups for ring in rings.cut(sent.of_dispatch, (256, 128))] == [256, 128]
    assert [ring.num_groups for ring in rings.cut((sent.asked, sent.answered), (512, 512))] == [512, 512]


def test_the_network_decides_where_it_is_slow():
    plan = predict(make_job(2), LINKS)
    assert (plan.dispatch.bottleneck, plan.combine.bottleneck) == ("network", "network")
    assert plan.dispatch.total_s == pytest.approx(plan.dispatch.traffic.network_bytes / 50e9 + 22e-6)
    fast = predict(make_job(2), Links(nic_gbs=400, nvlink_gbs=370, nic_mops=100, nic_us=5, nvlink_us=2))
    assert fast.dispatch.bottleneck == "NVLink"


def test_a_ring_that_is_too_small_for_the_way_decides():
    """Far away: as many round trips as a group is used times."""
    plan = predict(make_job(2), Links(nic_gbs=50, nvlink_gbs=370, nic_mops=100, nic_us=5000, nvlink_us=2))
    assert plan.dispatch.bottleneck == "rings"
    assert plan.dispatch.bounds_s["rings"] == pytest.approx(4096 / 2 / 256 * 10002e-6)


def test_sizes_without_a_hint_get_all_groups():
    """The hint is 0 for up to 8 ranks."""
    assert (buffers_of(make_job(4, 2)).rdma_hint, buffers_of(make_job(4, 2)).dispatch_groups) == (0, 256)


def test_few_tokens_are_latency():
    plan = predict(make_job(2, tokens=1), LINKS)
    assert plan.dispatch.bottleneck == "latency"
    assert plan.dispatch.total_s < 2 * plan.dispatch.latency_s


def test_one_rank_takes_no_time():
    plan = predict(make_job(1, 1), LINKS)
    assert (plan.dispatch.total_s, plan.combine.total_s) == (0, 0)


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--nodes", "2,0"], "--nodes: got 2,0; wanted numbers from 1 to 4096"),
        (["--nodes", "two"], "--nodes: got two; wanted numbers from 1 to 4096"),
        (["--gpus", "0"], "--gpus: got 0; wanted 1 to 31"),
        (["--topk", "33"], "--topk: got 33; wanted 1 to 32"),
        (["--topk", "8", "--experts", "4"], "--topk: got 8; wanted 1 to 4"),
        (["--node-limit", "0"], "--node-limit: got 0; wanted 1 or more: 2 nodes have 128 experts each, a token has 8"),
        (
            ["--nodes", "4,64", "--node-limit", "1", "--experts", "64", "--topk", "16"],
            "--node-limit: got 1; wanted 2 or more: 64 nodes have 8 experts each, a token has 16",
        ),
        (["--tokens", "0"], "--tokens: got 0; wanted at least 1"),
        (["--experts", "0"], "--experts: got 0; wanted at least 1"),
        (["--hidden", "12"], "--hidden: got 12; wanted a multiple of 8 for bf16"),
        (["--hidden", "64", "--dtype", "fp8"], "--hidden: got 64; wanted a multiple of 128 for fp8"),
        (["--nic-gbs", "0"], "--nic-gbs: got 0.0; wanted more than 0"),
        (["--nvlink-us", "-1"], "--nvlink-us: got -1.0; wanted 0 or more"),
        (["--json", "no-such-folder/x"], "--json: got no-such-folder/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line_and_status_2(options, named, capsys):
    assert cli.main(["plan", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"epcomm plan: {named}")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_default_report(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 96
    records = [json.loads(line) for line in file.read_text().splitlines()]
    nodes = (1, *command.DEFAULT_NODES)
    assert [(r["nodes"], r["operation"]) for r in records] == [(n, o) for n in nodes for o in ("dispatch", "combine")]
    assert [r["experts"] for r in records[::2]][-4:] == [256, 512, 1024, 2048]
    assert "* more experts than asked for" in text
    assert "at most 32 ranks so far" in text
    two = records[2]
    assert two["predicted_us"] == pytest.approx(max(two["bounds_us"].values()) + two["latency_us"])
    assert two["ratio_to_one_node"] == pytest.approx(two["predicted_us"] / records[0]["predicted_us"])
    assert f"{two['predicted_us'] / 1e3:.3f}" in text


@pytest.mark.parametrize(
    "options", [["--nodes=1"], ["--nodes=1", "--gpus=1"], ["--nodes=3", "--gpus=1"], ["--nodes=2"]]
)
def test_other_reports(options, capsys):
    assert cli.main(["plan", *options]) == 0
    text = capsys.readouterr().out
    assert ("has not met a network yet" in text) == ("--nodes=1" not in options)
    # The hints count 8 ranks a node.
    assert ("rdma hint is too small for 3 nodes" in text) == ("--nodes=3" in options)


def test_the_report_tells_the_limit(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "--nodes=8", "--node-limit=4", f"--json={file}"]) == 0
    assert "uniform routing, a token on 4 nodes at most\n" in capsys.readouterr().out
    alone, _, several, _ = [json.loads(line) for line in file.read_text().splitlines()]
    assert (alone["node_limit"], several["node_limit"]) == (4, 4)
    rows = expected_rows(8, 8, 4096, 256, 8, 4)
    assert several["rows_per_rank"]["crossing"] == rows.crossing


def test_one_node_is_in_the_tables_once(capsys):
    assert cli.main(["plan", "--nodes=1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:3] == ["1", "8", "256"] for line in lines) == 1


# -- docs/cluster.md ----------------------------------------------------------------------------------------------

CLUSTER = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"


def test_the_table_of_the_documentation_is_the_report(capsys):
    (block,) = re.findall(r"```text\n(.*?)```", CLUSTER.read_text(), re.DOTALL)
    assert cli.main(["plan"]) == 0
    assert block in capsys.readouterr().out


def test_the_commands_of_the_documentation_are_taken(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^epcomm (plan.*?)(?: *#.*)?$", CLUSTER.read_text(), re.MULTILINE)
    assert len(commands) == 4
    for line in commands:
        assert cli.main(line.split()) == 0
    assert (tmp_path / "plan.json").exists()


def test_what_the_documentation_names_is_there():
    text = CLUSTER.read_text()
    assert set(re.findall(r"EPCOMM_[A-Z_]+", text)) <= set(env.VARIABLES)
    project = tomllib.loads((CLUSTER.parents[1] / "pyproject.toml").read_text())
    extras = {extra for listed in re.findall(r"'\.\[(.*?)\]'", text) for extra in listed.split(",")}
    assert extras == {"mpi", "cuda12", "cuda13", "nvshmem12", "nvshmem13"}
    assert extras <= set(project["project"]["optional-dependencies"])
