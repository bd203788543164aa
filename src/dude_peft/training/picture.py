"""The loss curve as a picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence

from dude_peft.errors import ConfigError


def check_picture() -> None:
    """Raises ConfigError where matplotlib is missing; asked before the run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the loss curve needs matplotlib: pip install 'dude-peft[train]'")


def loss_curve(
    steps: Sequence[int], losses: Sequence[float], held_out: Sequence[tuple[int, float]], title: str
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
    axes.set_ylabel("cross-entropy of the answer (nats a token)")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
