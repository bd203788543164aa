"""What a page says, whatever it is written as: the answer in words, then sections of text, tables and figures.

Every text in it may come from a stranger; who writes it out makes it inert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Number:
    """A number and how a reader sees it."""

    value: float | int | None
    text: str


Cell = str | Number


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first cell of a row names it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A drawing, and the numbers in it as a table: who cannot see the one reads the other."""

    title: str
    alt: str
    """What it shows, in words."""
    draw: Callable[[Any], None]
    """Draws on a matplotlib figure."""
    numbers: Table
    width: float = 7.0
    height: float = 3.6


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Sample:
    """One question and what several models made of it."""

    question: str
    expected: str
    answers: tuple[tuple[str, str], ...]
    """(who answers and how well, the answer)."""


@dataclass(frozen=True)
class Samples:
    """Answers side by side."""

    title: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: tuple[str, ...]


Block = Table | Figure | Text | Samples | Commands


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole page."""

    title: str
    answer: tuple[str, ...]
    """The result in words, a sentence each."""
    sections: tuple[Section, ...] = field(default=())

    def tables(self) -> Iterator[tuple[str, Table]]:
        """(section, table) of all, those of the figures among them."""
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Table):
                    yield section.title, block
                elif isinstance(block, Figure):
                    yield section.title, block.numbers


def number(value: float | int | None, form: str = ".4g") -> Number:
    """A number as `form` writes it; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Number(None, "-")
    return Number(value, format(value, form))


def share(value: float | None) -> Number:
    """A share as a percentage."""
    return Number(None, "-") if value is None else Number(value, f"{100 * value:.1f} %")


def interval(
    ends: tuple[float, float] | None, form: str = ".4f", scale: float = 1.0, unit: str = ""
) -> tuple[Cell, ...]:
    """Two cells: both ends."""
    return tuple(
        Number(None, "-") if ends is None else Number(end, f"{scale * end:{form}}{unit}")
        for end in (ends or (0.0, 0.0))
    )


def of_bytes(value: float | None) -> Number:
    """A size in memory or on disk."""
    if value is None:
        return Number(None, "-")
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return Number(value, f"{size:,.4g} {units[0]}")


def table(title: str, header: tuple[str, ...], rows: Iterable[Sequence[Cell]]) -> Table:
    """A table of rows that are made on the way."""
    return Table(title, header, tuple(tuple(row) for row in rows))


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is in nested mappings; a sequence of plain values is one value."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)) and any(isinstance(one, (dict, list, tuple)) for one in tree):
        for place, value in enumerate(tree):
            yield from flat(value, f"{prefix}.{place}")
    else:
        yield prefix, tree


def facts(title: str, tree: Any) -> Table:
    """Nested mappings as a table of keys and values."""
    rows: list[tuple[Cell, ...]] = []
    for key, value in flat(tree):
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "-" if value is None else str(value)
        rows.append((key, number(value, "") if plain else text or "-"))
    return Table(title, ("key", "value"), tuple(rows))
