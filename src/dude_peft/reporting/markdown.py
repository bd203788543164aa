"""The page as Markdown, for pull requests and model cards: figures are left to their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dude_peft.exporting.card import escaped
from dude_peft.reporting.document import Block, Commands, Document, Figure, Number, Samples, Table, Text

_MOST_ROWS = 60


def markdown(document: Document) -> str:
    """The whole file; every foreign text in it is escaped."""
    parts = [f"# {escaped(document.title)}", *map(_paragraph, document.answer)]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        for block in section.blocks:
            parts += _block(block)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield _paragraph(block.text)
    elif isinstance(block, Table):
        yield f"**{escaped(block.title)}**"
        yield _table(block)
    elif isinstance(block, Figure):
        yield f"**{escaped(block.title)}.** {escaped(block.alt)}"
    elif isinstance(block, Samples):
        header = ["question", "expected", *(f"answer {n}" for n, _ in enumerate(block.samples[0].answers, start=1))]
        rows = [
            (sample.question, sample.expected, *(f"{who}: {text}" for who, text in sample.answers))
            for sample in block.samples
        ]
        yield from _block(Table(block.title, tuple(header), tuple(rows)))
    elif isinstance(block, Commands):
        # A line that holds backticks would end a block of fewer.
        fence = "`" * max(3, 1 + max((_ticks(line) for line in block.lines), default=0))
        yield "\n".join([f"{fence}bash", *block.lines, fence])


def _paragraph(text: str) -> str:
    """A text that is no heading, list or quotation, whatever it begins with."""
    return re.sub(r"^(\d*)([#>+=.)-])", r"\1\\\2", escaped(text))


def _ticks(line: str) -> int:
    return max(map(len, "".join(c if c == "`" else " " for c in line).split()), default=0)


def _table(block: Table) -> str:
    lines: list[Sequence[str]] = [[escaped(name) for name in block.header], ["---"] * len(block.header)]
    lines += [
        [cell.text if isinstance(cell, Number) else escaped(cell) for cell in row] for row in block.rows[:_MOST_ROWS]
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    left = len(block.rows) - _MOST_ROWS
    return text if left <= 0 else f"{text}\n\n{left:,} more rows: dude report --to csv writes all of them."
