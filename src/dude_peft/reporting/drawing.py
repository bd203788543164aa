"""Figures as SVG by matplotlib, in the colours of the page round them, light or dark."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from typing import Any

from dude_peft.reporting.clean import line
from dude_peft.reporting.document import Figure

COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7f00", "#0f8fa8", "#aa3377", "#777777", "#882255")
"""Told apart by most eyes (Tol 2021), and seen on light and on dark."""
MARKERS = "os^Dv<>P"
_INK = "#010203"
_STYLE = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"


def can_draw() -> bool:
    """Whether matplotlib is installed; a page has the numbers alone without it."""
    return importlib.util.find_spec("matplotlib") is not None


def svg(figure: Figure) -> str:
    """The figure; the same figure always gives the same text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dude",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that its fonts have not: the reader's browser has them
        drawing = Drawing(figsize=(figure.width, figure.height), layout="constrained")
        FigureCanvasSVG(drawing)
        figure.draw(drawing)
        stream = io.StringIO()
        drawing.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = stream.getvalue().replace(_INK, "currentColor")
    place = text.index(">", text.index("<svg")) + 1
    return text[text.index("<svg") : place] + _STYLE + text[place:]


def name_ticks(axis: Any, names: Sequence[object]) -> None:
    """Foreign names along an axis."""
    axis.set_ticks(range(len(names)))
    axis.set_ticklabels([line(name)[:40] for name in names], parse_math=False)


def legend(axes: Any, names: Sequence[object], handles: Sequence[Any]) -> None:
    """A legend of foreign names beside the axes."""
    labels = [line(name)[:40] or "-" for name in names]
    # matplotlib leaves out what begins with an underscore.
    shown = axes.legend(
        handles, [f" {label}" for label in labels], frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    for text in shown.get_texts():
        text.set_parse_math(False)
