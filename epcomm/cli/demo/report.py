"""The demo's report: plain text of 80 columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from epcomm.cli.demo.layer import PHASES
from epcomm.cli.demo.program import NUM_TIMED, Outcome

__all__ = ["ASCII_SHADES", "BLOCKS", "heat_map", "imbalance", "report"]

BLOCKS = "·▁▂▃▄▅▆▇█"  # none, then eight shades
ASCII_SHADES = " .:-=+*#@"  # for terminals that cannot show those

_LINE_LENGTH = 48  # characters of a heat map
_MAX_CELL_WIDTH = 3
_BAR_LENGTH = 40


def heat_map(counts: NDArray[np.int64], shades: str = BLOCKS) -> list[str]:
    """One text a row, one character an element.

    Args:
        counts: ``[rows, columns]``, 0 or more.
        shades: first the one for 0, then from few to most.
    """
    steps = len(shades) - 1
    # 0 has a shade of its own; the others share out the range up to the largest, which alone reaches the last one.
    levels = -(-counts * steps // max(int(counts.max(initial=0)), 1))
    return ["".join(shades[level] for level in row) for row in levels.tolist()]


def imbalance(load: NDArray[np.int64]) -> float:
    """Largest load over mean load; 1 is perfect balance, also of no load at all."""
    return float(load.max() / load.mean()) if load.any() else 1.0


def report(outcome: Outcome, encoding: str = "utf-8") -> str:
    """All of it.

    Args:
        outcome: what to tell.
        encoding: of the terminal; one without block characters gets ASCII.
    """
    try:
        BLOCKS.encode(encoding)
        shades = BLOCKS
    except (UnicodeEncodeError, LookupError):
        shades = ASCII_SHADES
    sections = (_header(outcome), _checks(outcome), _load(outcome, shades), _traffic(outcome), _times(outcome, shades))
    text = "\n\n".join("\n".join(section) for section in sections)
    return text if shades is BLOCKS else text.encode(encoding, "replace").decode(encoding)


def _header(outcome: Outcome) -> Iterator[str]:
    config, topology, task = outcome.task.config, outcome.topology, outcome.task
    num_groups, num_kept = config.groups
    ranks, nodes = _number(topology.size, "rank"), _number(topology.num_nodes, "node")
    tokens = len(task.text) // topology.size
    share = f"{tokens} a rank" if len(task.text) % topology.size == 0 else f"{tokens} or {tokens + 1} a rank"
    yield f"epcomm demo: one mixture-of-experts layer, its experts spread over {ranks}"
    yield ""
    yield f"  backend  {outcome.backend} ({outcome.machine}); {ranks} on {nodes}"
    yield f"  tokens   {len(task.text)}, {share}: the bytes of {_shortened(task.text_name)}"
    yield (
        f"  layer    {config.num_experts} experts, {config.num_experts // topology.size} a rank; "
        f"top-{config.num_topk} in {num_kept} of {_number(num_groups, 'group')}; hidden {config.hidden}, bf16"
    )


def _checks(outcome: Outcome) -> Iterator[str]:
    error, num_tokens = outcome.error, len(outcome.task.text)
    yield "check"
    yield from _transport(
        f"dispatch  {outcome.rows.sum()} received rows have the bits of their tokens", outcome.dispatch_problems
    )
    yield from _transport(f"combine   {num_tokens} sums of those rows have the right bits", outcome.combine_problems)
    yield (
        f"  {_verdict(error.holds)}  layer     largest error {error.largest:.2g} (tolerance {error.tolerance:.2g}) "
        "against one dense process"
    )
    yield (
        f"                  no element past {_percent(error.worst_share)} of its tolerance, "
        f"{_percent(error.equal_share)} bitwise equal"
    )


def _transport(claim: str, problems: Sequence[str]) -> Iterator[str]:
    yield f"  {_verdict(not any(problems))}  {claim}"
    for rank, problem in enumerate(problems):
        if problem:
            yield f"        rank {rank}: {problem}"


def _load(outcome: Outcome, shades: str) -> Iterator[str]:
    load, rows = outcome.expert_load, outcome.rows.sum(axis=0)
    yield f"load: tokens of each expert (a cell), by rank (a row); {shades[-1]} = {load.max()}"
    cell_width = min(max(_LINE_LENGTH // load.shape[1], 1), _MAX_CELL_WIDTH)
    for rank, cells in enumerate(heat_map(load, shades)):
        wide = "".join((shade * max(cell_width - 1, 1)).ljust(cell_width) for shade in cells)
        lines = [wide[first : first + _LINE_LENGTH] for first in range(0, len(wide), _LINE_LENGTH)]
        yield f"  rank {rank:<3d} {lines[0]}  {rows[rank]:6d} rows"
        yield from (f"           {line}" for line in lines[1:])
    yield f"  largest / mean: {imbalance(load):.2f} over experts, {imbalance(rows):.2f} over ranks"


def _traffic(outcome: Outcome) -> Iterator[str]:
    num_rows, num_own = int(outcome.rows.sum()), int(outcome.rows.trace())
    yield "moved (MB of all ranks)"
    yield "             logical   between ranks"
    for name, row_bytes, note in (
        ("dispatch", outcome.dispatch_row_bytes, "rows, expert indices, weights"),
        ("combine", outcome.combine_row_bytes, "rows"),
    ):
        logical, wire = num_rows * row_bytes / 1e6, (num_rows - num_own) * row_bytes / 1e6
        yield f"  {name:9s}{logical:9.3f}{wire:16.3f}   {note}"
    yield "  logical: the rows that stay on their rank included"


def _times(outcome: Outcome, shades: str) -> Iterator[str]:
    slowest = max(outcome.times_s.values())
    shared = outcome.backend == "host" and outcome.topology.size > (os.cpu_count() or 1)
    yield f"time (ms of the slowest rank, median of {NUM_TIMED} passes after a first one)"
    for phase in PHASES:
        bar = shades[-1] * round(_BAR_LENGTH * outcome.times_s[phase] / slowest)
        yield f"  {phase:9s}{outcome.times_s[phase] * 1e3:9.2f}  {bar}".rstrip()
    if outcome.backend == "host":
        shares = ", whose cores the ranks share" if shared else ""
        yield f"  times of the CPU{shares}; they say nothing about a GPU"


def _verdict(holds: bool) -> str:
    return "ok  " if holds else "FAIL"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:29]}..."
