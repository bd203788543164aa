"""The pictures of a run: its loss over the steps, and the ranks that a budget gave to its layers."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence

from dude_peft.config.schema import KtoSection, RunConfig
from dude_peft.errors import ConfigError
from dude_peft.installing import install
from dude_peft.show import shown

_MOST_WRITTEN = 150
"""Blocks of which each rank is written as a number."""


def check_picture() -> None:
    """Raises ConfigError where matplotlib is missing; asked before the run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"the loss curve needs matplotlib: {install('matplotlib')}")


def labels(config: RunConfig) -> tuple[str, ...]:
    """The title of a run's loss curve, and what is measured, where that is no loss of a token."""
    from dude_peft.methods import METHODS

    own = METHODS.get(config.adapter.method)
    ranks = (config.adapter.r, *config.adapter.rank_pattern.values())
    what = config.adapter.method if own is None else f"{own.name}, {own.size(*ranks)}"
    title = f"{what}, on {shown(config.model.name_or_path)}"
    if config.train.rewarded is not None:
        return title, "reward"
    if config.train.preference is not None:
        judged = "an answer" if isinstance(config.train.preference, KtoSection) else "a pair"
        return title, f"loss of {judged} ({config.train.objective})"
    return (title,)


def loss_curve(
    steps: Sequence[int],
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    title: str,
    unit: str = "cross-entropy of the answer (nats a token)",
) -> bytes:
    """A PNG of the training loss over steps, with the held-out loss before and after as points."""
    # The object interface, not pyplot: no global state, no window system, whatever the backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        steps,
        losses,
        color="#4477aa",
        linewidth=1.6,
        marker="o",
        markersize=3,
        label="training (mean since last point)",
    )
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#cc6677", linestyle="--", marker="s", markersize=6, label="held out"
        )
        for step, loss in held_out:
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def rank_map(blocks: Sequence[str], parts: Sequence[str], ranks: Sequence[Sequence[int | None]], title: str) -> bytes:
    """A PNG of the rank of every layer: blocks downwards, modules across, each rank written where there is room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(2.0 + 0.24 * len(blocks), 40.0)
    figure = Figure(figsize=(min(2.5 + 0.9 * len(parts), 40.0), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = axes.imshow(
        [[float("nan") if r is None else r for r in row] for row in ranks], aspect="auto", cmap="viridis", vmin=0
    )
    half = max((r for row in ranks for r in row if r is not None), default=0) / 2
    for y, row in enumerate(ranks):
        for x, r in enumerate(row):
            if r is not None and len(ranks) <= _MOST_WRITTEN:
                axes.text(x, y, str(r), ha="center", va="center", fontsize=7, color="white" if r <= half else "black")
    axes.set_xticks(range(len(parts)), labels=parts, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(len(blocks)), labels=blocks, fontsize=7, parse_math=False)
    axes.set_title(title, fontsize=9, parse_math=False)
    figure.colorbar(shown, ax=axes, label="rank; 0 is not adapted")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
