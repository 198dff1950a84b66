"""The plan's tables, and the same as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

from epcomm.cli.plan.times import Links, Plan, Prediction
from epcomm.kernels.layout import MAX_RANKS

__all__ = ["to_json_lines", "to_text"]

_MIB = 1 << 20

_ROWS = (
    "a token: nodes and ranks that it chose, of all. crossing: rows a rank sends to",
    "other nodes, once for each token and node; direct: if once for each rank instead.",
    "NVLink: rows it writes to other GPUs of its node, forwarded ones included; own: to",
    "itself. received: by its experts. Expectations, for experts with random scores.",
)
_TIMES = (
    "MB (1e6 bytes): what a rank sends over its NIC and NVLink, places, questions, words",
    "and counts included. Mops: 1e6 puts and signals of its NIC. network, NIC ops, rings,",
    "NVLink: ms of each alone; they overlap, so total is the largest plus latency.",
    "x 1: total / that on 1 node. Predicted from the links alone, nothing was measured:",
    "kernels, late ranks, uneven routing and other traffic come on top.",
)
_BUFFERS = (
    "MiB of a rank. nvl need: rows that a dispatch brings in expectation; a combine buffer",
    "takes as much again, in bf16. nvl hint, rdma hint: of Config, for num_nvl_bytes and",
    "num_rdma_bytes. rdma least: below it calls raise CapacityError; rdma most: more is of",
    "no use. groups: messages under way to one node, dispatch and combine, with the hint.",
)


def to_text(plans: Sequence[Plan], one_node: Plan, links: Links) -> str:
    """All tables, of 90 columns and a few more."""
    lines = [*_header(plans[0], links), ""]
    lines += [*_routing_table([one_node, *_several(plans)]), "", *_indented(_ROWS), ""]
    for of, what in ((_dispatch, "dispatch"), (_combine, "combine")):
        lines += [*_time_table([one_node, *_several(plans)], one_node, of, what), ""]
    lines += [*_indented(_TIMES), "", *_buffer_table([one_node, *_several(plans)]), "", *_indented(_BUFFERS)]
    lines += ["", *_indented(list(_notes(plans)))]
    return "\n".join(lines).rstrip()


def to_json_lines(plans: Sequence[Plan], one_node: Plan, links: Links) -> list[str]:
    """One JSON object for each number of nodes and operation: result, sizes and assumptions. Times in microseconds."""
    lines = []
    for plan in [one_node, *_several(plans)]:
        for found, alone in ((plan.dispatch, one_node.dispatch), (plan.combine, one_node.combine)):
            record = {
                "operation": found.operation,
                "nodes": plan.job.num_nodes,
                "gpus_per_node": plan.job.gpus,
                "ranks": plan.job.num_ranks,
                "experts": plan.job.experts,
                "experts_wanted": plan.job.wanted_experts,
                "tokens_per_rank": plan.job.tokens,
                "hidden": plan.job.hidden,
                "topk": plan.job.topk,
                "node_limit": plan.job.node_limit,
                "dtype": plan.job.dtype if found.operation == "dispatch" else "bf16",
                "predicted_us": found.total_s * 1e6,
                "latency_us": found.latency_s * 1e6,
                "bounds_us": {name: seconds * 1e6 for name, seconds in found.bounds_s.items()},
                "bottleneck": found.bottleneck,
                "ratio_to_one_node": _ratio(found, alone),
                "network_row_bytes_per_rank": found.traffic.row_bytes,
                "network_other_bytes_per_rank": found.traffic.other_bytes,
                "nic_operations_per_rank": found.traffic.nic_operations,
                "nvlink_bytes_per_rank": found.traffic.nvlink_bytes,
                "rows_per_rank": plan.job.rows._asdict(),
                "buffer_bytes": plan.buffers._asdict(),
                "assumed": dataclasses.asdict(links),
            }
            lines.append(json.dumps(record))
    return lines


def _several(plans: Sequence[Plan]) -> list[Plan]:
    """Without a single node, which is in every table anyway."""
    return [plan for plan in plans if plan.job.num_nodes > 1]


def _dispatch(plan: Plan) -> Prediction:
    return plan.dispatch


def _combine(plan: Plan) -> Prediction:
    return plan.combine


def _ratio(found: Prediction, alone: Prediction) -> float | None:
    return found.total_s / alone.total_s if alone.total_s > 0 else None


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _header(plan: Plan, links: Links) -> Iterator[str]:
    job = plan.job
    scales = " with float32 scales of 128 channels" if job.dtype == "fp8" else ""
    limit = "" if job.node_limit is None else f", a token on {job.node_limit} nodes at most"
    yield f"epcomm plan, throughput: nodes of {job.gpus} GPUs, a rank each"
    yield f"  {job.tokens} tokens a rank, hidden {job.hidden}, top-{job.topk} of {job.wanted_experts} experts or more"
    yield f"  dispatch in {job.dtype}{scales}, combine in bf16; uniform routing{limit}"
    yield f"  a GPU, each way: NIC {links.nic_gbs:g} GB/s, NVLink {links.nvlink_gbs:g} GB/s"
    yield (
        f"  assumed: NIC {links.nic_mops:g} million operations a second, "
        f"{links.nic_us:g} us to a node, {links.nvlink_us:g} us to a GPU"
    )


def _routing_table(plans: Sequence[Plan]) -> Iterator[str]:
    yield f"{'':22s}{'a token':>14s}{'thousand rows a rank':>40s}"
    names = ("nodes", "ranks", "experts", "nodes", "ranks", "crossing", "direct", "NVLink", "own", "received")
    yield "  " + "".join(f"{name:>{width}s}" for name, width in zip(names, _ROUTING_WIDTHS, strict=True))
    for plan in plans:
        job, rows = plan.job, plan.job.rows
        grown = "*" if job.experts != job.wanted_experts else " "
        counts = (rows.crossing, rows.for_each_rank, rows.over_nvlink, rows.own, rows.received)
        yield (
            f"  {job.num_nodes:5d}{job.num_ranks:6d}{job.experts:8d}{grown}"
            f"{rows.node_hit * job.num_nodes:6.2f}{rows.rank_hit * job.num_ranks:7.2f}"
            + "".join(f"{count / 1e3:{width}.2f}" for count, width in zip(counts, _ROUTING_WIDTHS[5:], strict=True))
        )


_ROUTING_WIDTHS = (5, 6, 8, 7, 7, 10, 9, 9, 9, 10)


def _time_table(plans: Sequence[Plan], one_node: Plan, of: Callable[[Plan], Prediction], what: str) -> Iterator[str]:
    yield f"  {what:9s}{'MB a rank':>15s}{'':7s}{'ms':>38s}"
    yield (
        f"  {'nodes':>5s}{'network':>10s}{'NVLink':>9s}{'Mops':>7s}"
        f"{'network':>9s}{'NIC ops':>9s}{'rings':>8s}{'NVLink':>8s}{'total':>8s}{'x 1':>6s}  bottleneck"
    )
    for plan in plans:
        found = of(plan)
        traffic, ratio = found.traffic, _ratio(found, of(one_node))
        network, operations, rings, nvlink = (1e3 * seconds for seconds in found.bounds_s.values())
        yield (
            f"  {plan.job.num_nodes:5d}{traffic.network_bytes / 1e6:10.1f}{traffic.nvlink_bytes / 1e6:9.1f}"
            f"{traffic.nic_operations / 1e6:7.3f}{network:9.3f}{operations:9.3f}{rings:8.3f}{nvlink:8.3f}"
            f"{found.total_s * 1e3:8.3f}{'-' if ratio is None else format(ratio, '.2f'):>6s}  {found.bottleneck}"
        )


def _buffer_table(plans: Sequence[Plan]) -> Iterator[str]:
    names = ("nvl need", "nvl hint", "rdma least", "rdma hint", "rdma most")
    yield f"  {'nodes':>5s}" + "".join(f"{name:>12s}" for name in names) + f"{'groups':>14s}"
    for plan in plans:
        found = plan.buffers
        sizes = (found.nvl_expected, found.nvl_hint, found.rdma_least, found.rdma_hint, found.rdma_most)
        groups = f"{found.dispatch_groups}, {found.combine_groups}" if plan.job.num_nodes > 1 else "-"
        cells = "".join(f"{size / _MIB:12.1f}" for size in sizes)
        yield f"  {plan.job.num_nodes:5d}{cells}{groups:>14s}"


def _notes(plans: Sequence[Plan]) -> Iterator[str]:
    """What a reader must know of these sizes."""
    if any(plan.job.experts != plan.job.wanted_experts for plan in plans):
        yield "* more experts than asked for: every rank has the same number of them."
    short = [str(plan.job.num_nodes) for plan in plans if plan.buffers.rdma_hint < plan.buffers.rdma_least]
    if short:
        yield f"The rdma hint is too small for {', '.join(short)} nodes: take rdma most, as these times do."
    short = [str(plan.job.num_nodes) for plan in plans if plan.buffers.nvl_hint < plan.buffers.nvl_expected]
    if short:
        yield f"The nvl hint is too small for {', '.join(short)} nodes: take twice nvl need."
    if any(plan.job.num_ranks > MAX_RANKS for plan in plans):
        yield f"The CUDA backend has at most {MAX_RANKS} ranks so far; beyond, its kernels would have to change."
    if _several(plans):
        yield "The CUDA backend has not met a network yet; docs/cluster.md says what has run."
