"""High-throughput dispatch and combine over virtual nodes: two hops, bitwise equal to the two-level oracle."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from helpers import checks, internode
from helpers.cases import CASES, PLACING_CASES, Case
from helpers.internode import rows_to_nodes

from epcomm import Buffer, reference
from epcomm.backends.host.exchange import Exchange
from epcomm.backends.host.header import Operation
from epcomm.bootstrap import topology
from epcomm.cli.plan.routing import expected_rows
from epcomm.errors import CapacityError, RankMismatch, ShapeError
from epcomm.testing import uniform_routing

BY_NAME = {case.name: case for case in CASES}
UNIFORM = BY_NAME["uniform"]


@pytest.fixture(scope="module")
def buffer_of():
    """One Buffer for each size of nodes, for all cases of a job: each finds what those before it have left behind."""
    buffers: dict[int, Buffer] = {}

    def get(ranks_per_node: int) -> Buffer:
        if ranks_per_node not in buffers:
            buffers[ranks_per_node] = Buffer(ranks_per_node=ranks_per_node)
        return buffers[ranks_per_node]

    yield get
    for buffer in buffers.values():
        buffer.destroy()


all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
placing_cases = pytest.mark.parametrize("case", PLACING_CASES, ids=lambda case: case.name)


@pytest.mark.ranks(4)
@all_cases
def test_case(buffer_of, case):
    buffer = buffer_of(2)
    assert (buffer.topology.num_nodes, buffer.topology.ranks_per_node) == (2, 2)
    checks.round_trip(buffer, case.inputs(4))


@pytest.mark.slow
@pytest.mark.ranks(4)
@placing_cases
def test_case_with_one_rank_a_node(buffer_of, case):
    checks.round_trip(buffer_of(1), case.inputs(4))


@pytest.mark.slow
@pytest.mark.ranks(8)
@placing_cases
def test_case_on_eight_ranks(buffer_of, case):
    """4x2 and, on one level, 1x8; or 2x4 and 8x1."""
    for ranks_per_node in ((2, 8), (4, 1))[PLACING_CASES.index(case) % 2]:
        checks.round_trip(buffer_of(ranks_per_node), case.inputs(8))


@pytest.mark.slow
@pytest.mark.ranks((2, 6, 8))
@all_cases
def test_case_on_other_nodes(buffer_of, num_ranks, case):
    """2x1; 3x2, 2x3; 4x2, 2x4, 8x1."""
    for ranks_per_node in {2: (1,), 6: (2, 3), 8: (2, 4, 1)}[num_ranks]:
        checks.round_trip(buffer_of(ranks_per_node), case.inputs(num_ranks))


@pytest.mark.ranks(4)
def test_nodes_from_the_environment(comm, monkeypatch):
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "2")
    with Buffer(comm) as buffer:
        assert (buffer.topology.num_nodes, buffer.topology.node) == (2, comm.rank // 2)
        checks.round_trip(buffer, UNIFORM.inputs(comm.size))


@pytest.mark.ranks(4)
def test_explicit_names_of_the_operations(buffer_of, num_ranks):
    internode.explicit_names_of_the_operations(buffer_of(2), UNIFORM.inputs(num_ranks))


@pytest.mark.ranks(4)
def test_two_levels_round_twice(comm):
    internode.two_levels_round_twice(comm, lambda comm, n: Buffer(comm, ranks_per_node=n), UNIFORM.inputs(comm.size))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("worst", ["exact", "room", "overflow"])
def test_worst_case_combine_after_cached(buffer_of, comm, worst):
    inputs = Case("worst", worst=worst, num_topk=6, tokens=(30, 2, 17)).inputs(comm.size)
    internode.worst_case_combine_after_cached(buffer_of(2), inputs)
    if inputs.is_overflowing(comm.rank):
        with pytest.raises(CapacityError, match="num_worst_tokens"):
            buffer_of(2).check()
    assert (worst == "overflow") == any(inputs.is_overflowing(rank) for rank in range(comm.size))


@pytest.mark.slow
@pytest.mark.ranks((4, 6))
def test_calls_of_changing_shape(buffer_of, num_ranks):
    internode.calls_of_changing_shape([buffer_of(2)], 30)


class SentRows:
    """Rows of the first field of every call that this rank selects for each rank, by operation."""

    def __init__(self, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_operation: dict[Operation, Any] = defaultdict(lambda: np.zeros(num_ranks, np.int64))
        post = Exchange.post

        def counting_post(exchange: Exchange, operation: Operation, ring: Any, agreed: Any, fields: Any, **rest: Any):
            self.by_operation[operation] += fields[0].selection.counts
            return post(exchange, operation, ring, agreed, fields, **rest)

        monkeypatch.setattr(Exchange, "post", counting_post)


@pytest.mark.ranks((4, 8), slow=(8,))
@pytest.mark.parametrize("case", [UNIFORM, BY_NAME["topk_32"], BY_NAME["zipf_skew"]], ids=lambda case: case.name)
def test_every_row_crosses_once_for_each_node(comm, num_ranks, case, monkeypatch):
    per_node, inputs = 2, case.inputs(num_ranks)
    node, rail = comm.rank // per_node, np.arange(num_ranks) % per_node == comm.rank % per_node
    is_far = np.arange(num_ranks) // per_node != node
    sent = SentRows(num_ranks, monkeypatch)
    with Buffer(comm, ranks_per_node=per_node) as buffer:
        _, result = checks.dispatch(buffer, inputs)
        checks.combine(buffer, inputs, result)
    to_nodes = rows_to_nodes(inputs, comm.rank, per_node)
    out = sent.by_operation[Operation.DISPATCH]
    assert out[rail].tolist() == to_nodes.tolist()
    assert not out[~rail].any()
    assert not sent.by_operation[Operation.FORWARD_DISPATCH][is_far].any()
    # And back: sums within the node, then one row for each token and node.
    assert not sent.by_operation[Operation.COMBINE][is_far].any()
    back = sent.by_operation[Operation.FORWARD_COMBINE]
    sources = np.flatnonzero(rail)
    assert back[rail].tolist() == [rows_to_nodes(inputs, source, per_node)[node] for source in sources]
    assert not back[~rail].any()
    # The case would show it if rows crossed once for each rank.
    direct = reference.get_dispatch_layout(inputs.topk_idx[comm.rank], inputs.num_experts, num_ranks)
    saved = direct.num_tokens_per_rank[is_far].sum() - np.delete(to_nodes, node).sum()
    assert sum(comm.allgather(int(saved))) > 0


@pytest.mark.ranks((4, 8), slow=(8,))
@pytest.mark.parametrize("case", [UNIFORM, BY_NAME["topk_32"], BY_NAME["zipf_skew"]], ids=lambda case: case.name)
def test_rows_that_cross_are_counted(buffer_of, num_ranks, case):
    internode.every_row_crosses_once_for_each_node(buffer_of(2), case.inputs(num_ranks))


@pytest.mark.ranks(4)
def test_rows_of_cached_and_bounded_dispatches_cross_too(buffer_of, comm):
    """A row without room at its destination has crossed before it is dropped; its sum does not come back."""
    buffer, inputs = buffer_of(2), Case("worst", worst="overflow", num_topk=6, tokens=(30, 2, 17)).inputs(comm.size)
    to_others = int(np.delete(rows_to_nodes(inputs, comm.rank, 2), buffer.topology.node).sum())
    before = buffer.stats
    _, result = checks.dispatch(buffer, inputs)
    buffer.dispatch(inputs.x[comm.rank], handle=result.handle)
    checks.combine(buffer, inputs, result)
    sent, returned = (buffer.stats[name] - before[name] for name in ("rows_to_other_nodes", "rows_from_other_nodes"))
    assert sent == 2 * to_others
    assert returned <= to_others
    assert sum(comm.allgather(to_others - returned)) > 0
    checks.check_overflow(buffer, inputs)


@pytest.mark.ranks(4)
def test_one_node_has_no_other_nodes(buffer_of, num_ranks):
    buffer = buffer_of(4)
    checks.round_trip(buffer, UNIFORM.inputs(num_ranks))
    assert (buffer.stats["rows_to_other_nodes"], buffer.stats["rows_from_other_nodes"]) == (0, 0)


@pytest.mark.ranks((4, 6), slow=(6,))
def test_rows_are_as_many_as_the_plan_expects(buffer_of, comm):
    """`epcomm plan` against what crosses and what arrives, within four standard errors of uniform routing."""
    num_ranks, num_tokens, hidden, experts, topk = comm.size, 3000, 16, 8 * comm.size, 3
    buffer, num_nodes = buffer_of(2), comm.size // 2
    rows = expected_rows(num_nodes, 2, num_tokens, experts, topk)
    topk_idx = uniform_routing(num_tokens, experts, topk, seed=1, first_token=comm.rank * num_tokens)
    layout = buffer.get_dispatch_layout(topk_idx, experts)
    before = buffer.stats
    result = buffer.dispatch(np.zeros((num_tokens, hidden), np.float32), topk_idx=topk_idx, **layout.arguments())
    buffer.combine(result.recv_x, result.handle)
    crossed = [buffer.stats[name] - before[name] for name in ("rows_to_other_nodes", "rows_from_other_nodes")]
    assert crossed[0] == crossed[1]
    # Tokens choose independently, and of one token, a choice of one node makes that of another less likely.
    for counted, expected, chance, num_chances in (
        (crossed[0], rows.crossing, rows.node_hit, (num_nodes - 1) * num_tokens),
        (len(result.recv_x), rows.received, rows.rank_hit, num_ranks * num_tokens),
    ):
        assert abs(counted - expected) <= 4 * math.sqrt(num_chances * chance * (1 - chance))
    # It would show if rows crossed once for each rank.
    assert rows.for_each_rank - rows.crossing > 8 * math.sqrt(rows.crossing)


@pytest.mark.ranks(4)
def test_bytes_between_hosts_are_the_deduplicated_minimum(comm, monkeypatch):
    """Nodes on hosts of their own: a wider row adds its width, once for each token and other node, to the messages."""
    monkeypatch.setattr(topology, "host_identity", lambda: f"host {comm.rank // 2}")
    sent = []
    for hidden in (64, 192):
        inputs = Case("wide", hidden=hidden, num_topk=6).inputs(comm.size)
        with Buffer(comm) as buffer:
            _, result = checks.dispatch(buffer, inputs)
            after_dispatch = buffer.stats["bytes_sent_by_message"]
            checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result))
            sent.append((after_dispatch, buffer.stats["bytes_sent_by_message"] - after_dispatch))
    row_bytes = (192 - 64) * 2
    node = comm.rank // 2
    source_on_rail = (comm.rank + 2) % 4
    assert sent[1][0] - sent[0][0] == row_bytes * rows_to_nodes(inputs, comm.rank, 2)[1 - node]
    assert sent[1][1] - sent[0][1] == row_bytes * rows_to_nodes(inputs, source_on_rail, 2)[node]


@pytest.mark.ranks(4)
def test_nodes_that_do_not_fit_raise_on_all_ranks(comm, monkeypatch):
    with pytest.raises(ShapeError, match="ranks_per_node"):
        Buffer(comm, ranks_per_node=3)
    with pytest.raises(RankMismatch, match="ranks_per_node"):
        Buffer(comm, ranks_per_node=1 + comm.rank // 2)
    with pytest.raises(RankMismatch, match=r"num_qps_per_rank = 24 \(rank 0\)"):
        Buffer(comm, num_qps_per_rank=24 + comm.rank)
    monkeypatch.setattr(topology, "host_identity", lambda: f"host {comm.rank // 3}")
    with pytest.raises(ShapeError, match="ranks per host"):
        Buffer(comm)
