"""Draws README's picture from the report of a real run: python scripts/picture.py runs/quickstart/report.json

It is the terminal's own table, as an SVG that needs no font from elsewhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from dude_peft.folder.record import RunReport
from dude_peft.training.progress import Display

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "quickstart.svg"
WIDTH = 96


def main() -> None:
    """Writes the picture."""
    report = RunReport.read(Path(sys.argv[1]))
    assert report.before is not None
    assert report.after is not None
    display = Display(quiet=True)
    display.console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    display.say("$ dude train builtin:quickstart")
    display.samples(report.before.answers[:1], report.after.answers[:1])
    display.before_after(report.before, report.after)
    svg = display.console.export_svg(title="dude train", font_aspect_ratio=0.61)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)  # they name a server
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(svg.replace("Fira Code", "Menlo, Consolas, DejaVu Sans Mono"), encoding="utf-8")
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
