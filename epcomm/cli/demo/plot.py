"""The demo's picture: who sent how much to whom, and which expert got how many tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epcomm.cli.demo.report import imbalance

if TYPE_CHECKING:
    from epcomm.cli.demo.program import Outcome

__all__ = ["save_plot"]

_INK, _FAINT = "#222222", "#888888"
_RANK_COLOURS = ("#3b6fb6", "#8fb3dd")  # neighbouring ranks differ
_MAX_WRITTEN_CELLS = 12  # a matrix of more ranks is too small for numbers


def save_plot(outcome: Outcome, path: str) -> None:
    """Write the picture as a PNG.

    Args:
        outcome: what to draw.
        path: the file, overwritten.
    """
    # The objects themselves instead of pyplot, which would choose a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(12, 5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    matrix, bars = figure.subplots(1, 2, width_ratios=(1, 1.7))
    _draw_traffic(figure, matrix, outcome)
    _draw_load(bars, outcome)
    config, task = outcome.task.config, outcome.task
    figure.suptitle(
        f"{len(task.text)} tokens, top-{config.num_topk} of {config.num_experts} experts on {outcome.topology.size} "
        f"ranks, hidden {config.hidden} bfloat16, {outcome.backend} backend",
        color=_INK,
        fontsize=12,
    )
    figure.savefig(path, format="png", dpi=150)


def _draw_traffic(figure: Any, axes: Any, outcome: Outcome) -> None:
    megabytes = outcome.rows * outcome.dispatch_row_bytes / 1e6
    num_ranks = outcome.topology.size
    image = axes.imshow(megabytes, cmap="Blues", vmin=0)
    if num_ranks <= _MAX_WRITTEN_CELLS:
        axes.set_xticks(range(num_ranks))
        axes.set_yticks(range(num_ranks))
        for source in range(num_ranks):
            for target in range(num_ranks):
                value = megabytes[source, target]
                colour = "white" if value > 0.6 * megabytes.max() else _INK
                size = 10 if num_ranks <= 8 else 7
                axes.text(target, source, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)
    borders = [rank - 0.5 for rank in range(1, num_ranks)]
    axes.set_xticks(borders, minor=True)
    axes.set_yticks(borders, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    axes.set_title("MB of dispatch, expert indices and weights included", color=_INK, fontsize=11)
    axes.set(xlabel="to rank", ylabel="from rank")
    figure.colorbar(image, ax=axes, shrink=0.8).outline.set_visible(False)


def _draw_load(axes: Any, outcome: Outcome) -> None:
    load = outcome.expert_load
    num_ranks, num_local = load.shape
    for rank in range(num_ranks):
        first = rank * num_local
        experts = range(first, first + num_local)
        axes.bar(experts, load[rank], width=0.85, color=_RANK_COLOURS[rank % 2])
        if num_ranks <= _MAX_WRITTEN_CELLS:
            middle = first + (num_local - 1) / 2
            axes.text(middle, 1.01 * load.max(), f"rank {rank}", ha="center", va="bottom", color=_INK, fontsize=9)
    mean = load.mean()
    axes.axhline(mean, color=_FAINT, linewidth=1, linestyle="--")
    axes.text(load.size - 0.4, mean, f" mean {mean:.0f}", va="center", color=_FAINT, fontsize=9)
    axes.set_xlim(-0.6, load.size - 0.4)
    axes.set_ylim(0, 1.1 * max(int(load.max()), 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"tokens of each expert: largest / mean = {imbalance(load):.2f}", color=_INK, fontsize=11)
    axes.set(xlabel="expert", ylabel="tokens")
