"""Every number of a page as CSV: section, table, row, column, value."""

from __future__ import annotations

import csv
import io
from itertools import takewhile

from dude_peft.reporting.clean import line
from dude_peft.reporting.document import Document, Number

_FORMULA = ("=", "+", "-", "@")


def csv_text(document: Document) -> str:
    """The whole file; a row is named by its first cells that are no numbers."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["section", "table", "row", "column", "value"])
    for section, table in document.tables():
        for place, row in enumerate(table.rows, start=1):
            names = takewhile(lambda cell: isinstance(cell, str), row)
            named = " / ".join(map(str, names)) or str(place)
            for column, cell in zip(table.header, row, strict=True):
                if isinstance(cell, Number) and cell.value is not None:
                    writer.writerow([*map(_inert, (section, table.title, named, column)), repr(cell.value)])
    return stream.getvalue()


def _inert(text: str) -> str:
    """A spreadsheet takes what begins like this for a formula."""
    plain = line(text)
    return f"'{plain}" if plain.startswith(_FORMULA) else plain
