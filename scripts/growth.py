"""Draws docs/images/growth.svg from records: how time and memory of a step grow. python scripts/growth.py

Without arguments from the newest records in benchmarks/results; the picture names them, and a test compares the two.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "growth.svg"
# Kind of record, key of our figure, of LoRA's, and what the axis says.
_ROWS = (
    ("step-growth-float32", "median_seconds", "lora_seconds", "seconds a step"),
    ("memory-growth-float32", "peak_mib", "lora_peak_mib", "activations, MiB"),
)
_AXES = {"rank": "rank", "tokens": "tokens", "width": "width", "depth": "layers"}


def newest(kind: str) -> Path:
    """The newest record of a kind."""
    return max((ROOT / "benchmarks" / "results").glob(f"*-{kind}.json"))


def seal() -> str:
    """A hash over all that is drawn."""
    return hashlib.sha256(b"".join(newest(kind).read_bytes() for kind, *_ in _ROWS)).hexdigest()


def main() -> None:
    """Writes the picture."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasSVG(figure)
        for line, (kind, ours, theirs, label) in zip(figure.subplots(2, 4), _ROWS, strict=True):
            results = json.loads(newest(kind).read_text(encoding="utf-8"))["results"]
            for axes, (axis, name) in zip(line, _AXES.items(), strict=True):
                _draw(axes, results[axis], ours, theirs)
                axes.set_xlabel(name)
            line[0].set_ylabel(label)
        figure.savefig(PICTURE, format="svg", metadata={"Date": None, "Description": seal()})
    # Digits behind the second decimal of a point on the page are a third of the file.
    text = re.sub(r"(\d+\.\d{2})\d+", r"\1", PICTURE.read_text(encoding="utf-8"))
    PICTURE.write_text("\n".join(each.rstrip() for each in text.splitlines()) + "\n", encoding="utf-8")
    print(f"written: {PICTURE}")


def _draw(axes: Any, found: dict[str, Any], ours: str, theirs: str) -> None:
    values = [int(value) for value in found["rows"]]
    for name, key, color, marker in (("DuDe", ours, "#4477aa", "o"), ("PEFT LoRA", theirs, "#cc6677", "s")):
        label = f"{name}: power {found['exponents'][name]:.2f}"
        axes.plot(values, [row[key] for row in found["rows"].values()], color=color, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.1, high * 1.6)  # room for the legend
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
