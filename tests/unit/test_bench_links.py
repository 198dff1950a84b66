"""What crosses which links: the bench's exact counts against independent ones and against the plan's expectations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from helpers.node_rows import count_rows

from epcomm.cli.bench import links_report
from epcomm.cli.bench.case import Case, make_routing, marks_of
from epcomm.cli.bench.links import CaseLinks, LinkTraffic, RoutedRows, count_differences, direct, sizes_of
from epcomm.cli.bench.links_report import LinkRow
from epcomm.cli.plan.messages import Messages, Traffic
from epcomm.cli.plan.traffic import Job, combine_traffic, dispatch_traffic


def make_case(nodes: int, gpus: int, **changes: object) -> Case:
    parameters = {
        "mode": "throughput",
        "backend": "host",
        "ranks": nodes * gpus,
        "ranks_per_node": gpus,
        "tokens": 1000,
        "hidden": 1024,
        "topk": 4,
        "experts": 8 * nodes * gpus,
        "dtype": "bf16",
        "routing": "uniform",
        "repeats": 2,
        "json": None,
    }
    return Case(**{**parameters, **changes})


def job_of(case: Case) -> Job:
    """The same for the plan."""
    per_node = case.ranks_per_node
    return Job(case.num_nodes, per_node, case.tokens, case.hidden, case.topk, case.experts, case.dtype)


def links_of(case: Case) -> CaseLinks:
    choices = np.stack([make_routing(case, rank)[0] for rank in range(case.ranks)])
    return CaseLinks(case, RoutedRows(marks_of(case, choices), case.ranks_per_node))


SHAPES = [(2, 4), (4, 2), (3, 3), (8, 1), (1, 4)]


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_rows_are_those_that_are_counted_one_by_one(nodes, gpus, routing):
    case = make_case(nodes, gpus, tokens=37, routing=routing)
    choices = np.stack([make_routing(case, rank)[0] for rank in range(case.ranks)])
    routed = RoutedRows(marks_of(case, choices), gpus)
    for rank in range(case.ranks):
        counted = {name: each.sum() for name, each in count_rows(choices, rank, nodes, gpus, case.experts).items()}
        sent, received = routed.sent(rank), routed.received(rank)
        assert sent.crossing == counted["crossing"]
        assert sent.over_nvlink == counted["near"] + counted["forwarded"]
        # What it gets over NVLink is all that its experts get, but for what it hands to itself.
        assert received.over_nvlink == counted["received"] - counted["own"]
    for what in ("crossing", "over_nvlink"):
        total = [sum(getattr(way(rank), what) for rank in range(case.ranks)) for way in (routed.sent, routed.received)]
        assert total[0] == total[1]


def test_messages_are_cut_at_units():
    """Two ranks, a node each; of rank 0 the tokens 0, 5 and 6 of 7 cross."""
    marks = np.zeros((2, 7, 2), bool)
    marks[0, [0, 5, 6], 1] = marks[0, [1, 2], 0] = True
    sent = RoutedRows(marks, 1).sent(0)
    assert [sent.messages(unit) for unit in (1, 3, 4, 8)] == [(7, 3), (3, 3), (2, 2), (1, 1)]
    received = RoutedRows(marks, 1).received(1)
    assert (received.crossing, received.messages(3)) == (3, (3, 3))
    assert RoutedRows(marks, 1).received(0).messages(3) == (3, 0)  # empty ones, which have words


# -- traffic against the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 37])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_where_nothing_is_left_to_chance_the_plan_is_exact(nodes, gpus, dtype, tokens):
    """Every token chooses every expert."""
    case = make_case(nodes, gpus, tokens=tokens, dtype=dtype, experts=nodes * gpus, topk=nodes * gpus)
    found, job = links_of(case), job_of(case)
    assert sizes_of(case, gpus) == job.sizes
    for traffic, expected in ((found.dispatch(), dispatch_traffic(job)), (found.combine(), combine_traffic(job))):
        assert {dataclasses.astuple(one) for one in traffic.sent} == {dataclasses.astuple(expected)}
        assert traffic.received == traffic.sent
        assert traffic.most_network_bytes == expected.network_bytes


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_the_plan_expects_what_the_bench_counts(nodes, gpus, dtype):
    """Mean of the ranks, within four standard errors."""
    case = make_case(nodes, gpus, dtype=dtype)
    found, job = links_of(case), job_of(case)
    # Tokens choose independently, and a choice of one place makes those of others less likely.
    num_tokens, num_ranks = case.ranks * case.tokens, case.ranks
    crossing = 4 * error(job.rows.node_hit, num_tokens * (nodes - 1))
    near = 4 * error(job.rows.rank_hit, num_tokens * (num_ranks - nodes))
    for traffic, expected in ((found.dispatch(), dispatch_traffic(job)), (found.combine(), combine_traffic(job))):
        mean = traffic.mean
        assert mean.row_bytes == pytest.approx(expected.row_bytes, rel=crossing)
        assert mean.other_bytes == pytest.approx(expected.other_bytes, rel=crossing)
        assert mean.nic_operations == pytest.approx(expected.nic_operations, rel=crossing)
        assert mean.nvlink_bytes == pytest.approx(expected.nvlink_bytes, rel=near)
    assert np.mean(found.crossing.by_rank) == pytest.approx(job.rows.crossing, rel=crossing)
    assert found.crossing.for_each_rank == pytest.approx(job.rows.for_each_rank, rel=max(crossing, near))


def error(chance: float, num_chances: int) -> float:
    """Relative standard error of the number of hits."""
    return math.sqrt((1 - chance) / (chance * num_chances)) if num_chances else 0.0


def test_a_handle_saves_what_is_beside_rows():
    for dtype in ("bf16", "fp8"):
        case = make_case(2, 2, dtype=dtype)
        found = links_of(case)
        whole, cached = found.dispatch().mean, found.dispatch(has_handle=True).mean
        assert whole.row_bytes == cached.row_bytes
        rows = whole.row_bytes / (Messages(sizes_of(case, 2)).rows.row_bytes - 128)
        # Indices and weights, to 8 bytes each; of bf16 also places and source, and two words for 8 tokens; counts.
        counts = 2 * (8 * (32 + 16 + 2 + 8) + 8)
        beside = rows * 4 * 12 if dtype == "fp8" else rows * (4 * 12 + 8 + 8) + 2 * 8 * 125
        assert whole.other_bytes - cached.other_bytes == pytest.approx(counts + beside)
        over_nvlink = np.mean([found.routed.sent(rank).over_nvlink for rank in range(4)])
        assert whole.nvlink_bytes - cached.nvlink_bytes == over_nvlink * (4 * 12 + 4)


def test_combine_goes_the_other_way():
    case = make_case(2, 2, tokens=64, routing="zipf")
    combine, routed = links_of(case).combine(), links_of(case).routed
    row_bytes = 2 * case.hidden
    for rank in range(4):
        sent, received = routed.sent(rank), routed.received(rank)
        assert combine.sent[rank].row_bytes == received.crossing * row_bytes  # answers
        assert combine.received[rank].row_bytes == sent.crossing * row_bytes
        assert combine.sent[rank].nvlink_bytes == received.over_nvlink * row_bytes
    assert combine.most_nvlink_bytes > combine.mean.nvlink_bytes


def test_rows_that_go_straight_to_their_ranks():
    rows = np.array([[9, 1, 2, 3], [4, 9, 5, 6], [7, 8, 9, 10], [11, 12, 13, 9]])
    found = direct(rows, 2, 100, 10)
    assert [(one.row_bytes, one.other_bytes, one.nvlink_bytes) for one in found.sent] == [
        (500, 50, 110),
        (1100, 110, 440),
        (1500, 150, 1100),
        (2300, 230, 1430),
    ]
    assert [one.network_bytes for one in found.received] == [18 * 110, 20 * 110, 7 * 110, 9 * 110]
    assert found.most_network_bytes == 23 * 110
    assert (found + found).mean.row_bytes == 2 * 5400 / 4


# -- counters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dispatch", "dispatch, cached"])
def test_counted_rows_of_a_dispatch(name):
    assert list(count_differences(name, (5, 7), (12, 7), 7)) == []
    assert list(count_differences(name, (5, 7), (12, 8), 6)) == [
        "7 rows sent to other nodes by stats, 6 by the routing",
        "1 sums brought back from other nodes by stats, 0 by the routing",
    ]


def test_counted_sums_of_a_combine():
    assert list(count_differences("combine, in place", (5, 7), (5, 9), 2)) == []
    assert len(list(count_differences("combine", (5, 7), (7, 7), 2))) == 2


# -- report -------------------------------------------------------------------------------------------------------


def one_rank(network: float, nvlink: float) -> LinkTraffic:
    traffic = (Traffic(network, 0, 0, nvlink),)
    return LinkTraffic(traffic, traffic)


def test_the_larger_floor_counts():
    case = make_case(2, 4, nic_gbs=50.0, nvlink_gbs=370.0)
    found = links_report.fields(case, 3e-3, one_rank(50e6, 74e6))
    assert (found["network_us"], found["nvlink_us"], found["link_floor_us"]) == pytest.approx((1000, 200, 1000))
    assert found["ratio_to_link_floor"] == pytest.approx(3)
    found = links_report.fields(case, 3e-3, one_rank(5e6, 74e6))
    assert (found["link_floor_us"], found["ratio_to_link_floor"]) == pytest.approx((200, 15))


def test_floors_are_those_of_the_busiest_rank():
    case = make_case(2, 4, nic_gbs=50.0)
    idle, busy = Traffic(0, 0, 0, 0), Traffic(40e6, 10e6, 0, 0)
    found = links_report.fields(case, 3e-3, LinkTraffic((idle, idle), (busy, idle)))
    assert (found["network_us"], found["nvlink_us"]) == (pytest.approx(1000), None)


def test_one_node_has_nothing_to_add_without_a_rate():
    case = make_case(1, 8)
    assert not links_report.is_told(case)
    assert links_report.fields(case, 1.0, one_rank(0, 1)) == {}
    assert not links_report.is_told(dataclasses.replace(case, nic_gbs=50.0))  # it has no network
    case = dataclasses.replace(case, nic_gbs=50.0, nvlink_gbs=370.0)
    found = links_report.fields(case, 1e-3, one_rank(0, 37e6))
    assert (found["network_us"], found["link_floor_us"]) == (None, pytest.approx(100))


@pytest.mark.parametrize("mode", ["throughput", "low-latency"])
@pytest.mark.parametrize("rates", [{}, {"nic_gbs": 50.0}, {"nvlink_gbs": 370.0}, {"nic_gbs": 0.1, "nvlink_gbs": 0.1}])
@pytest.mark.parametrize("nodes", [1, 4])
def test_the_table_fits_a_terminal(nodes, rates, mode):
    case = make_case(nodes, 8, mode=mode, **rates)
    rows = [LinkRow("dispatch, cached, outside", time_s, one_rank(960e6, 999e6)) for time_s in (1e-3, 1.0)]
    rows.append(LinkRow("nothing", 1.0, one_rank(0, 0)))
    crossing = links_of(make_case(4, 2)).crossing
    lines = [*links_report.table(case, rows, "between ranks, 32 SMs"), *links_report.notes(case, "p50")]
    lines += links_report.rows_to_nodes(case, crossing)
    assert max(map(len, lines)) <= 80


def test_the_table():
    case = make_case(2, 4, nic_gbs=50.0, nvlink_gbs=370.0)
    head, names, row = links_report.table(case, [LinkRow("dispatch", 3e-3, one_rank(50e6, 74e6))], "between ranks")
    assert head.endswith("us at 50, 370 GB/s")
    assert names.split() == ["rows", "all", "MB", "network", "node", "floor", "x"]
    assert row.split() == ["dispatch", "50.00", "50.00", "74.00", "1000.0", "200.0", "1000.0", "3.00"]


def test_rows_are_told_beside_what_the_plan_expects():
    case = make_case(4, 2)
    crossing, job = links_of(case).crossing, job_of(case)
    text = "\n".join(links_report.rows_to_nodes(case, crossing))
    assert f"{np.mean(crossing.by_rank):.1f} ({min(crossing.by_rank)}, {max(crossing.by_rank)})" in text
    assert f"{job.rows.crossing:.1f}" in text
    assert "plan" not in "\n".join(links_report.rows_to_nodes(dataclasses.replace(case, routing="zipf"), crossing))
