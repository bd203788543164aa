"""The page as one HTML file: no script, no request, and a policy that allows neither.

Jinja escapes every text. Figures are images inside the page, each with its description and its numbers as a table.
"""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined

from dude_peft.reporting.clean import line, lines
from dude_peft.reporting.document import Document, Figure, Number
from dude_peft.reporting.drawing import can_draw, svg
from dude_peft.version import __version__

_MOST_ROWS = 400
"""Of one table on a page; the CSV has all of them."""


def html(document: Document) -> str:
    """The whole file."""
    environment = Environment(
        loader=PackageLoader("dude_peft", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"line": line, "lines": lines}
    style = environment.get_template("page.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        document=document,
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        image=_image,
        drawn=can_draw(),
        kind=lambda block: type(block).__name__,
        is_number=lambda cell: isinstance(cell, Number),
        most=_MOST_ROWS,
        version=__version__,
    )


def _image(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure).encode()).decode()
