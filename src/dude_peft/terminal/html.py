"""Results as HTML tables, for notebooks: every text in them is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(title: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """A table with its title."""
    head = f"<thead><tr>{_cells(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    caption = f"<caption style='text-align:left'><b>{escape(title)}</b></caption>"
    return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


def _cells(values: Sequence[object], tag: str) -> str:
    style = " style='text-align:left; white-space:pre-wrap'"
    return "".join(f"<{tag}{style}>{escape(str(value))}</{tag}>" for value in values)
