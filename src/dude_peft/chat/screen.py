"""Answers on standard output as they come: one, or two beside or below each other; nothing in them is obeyed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dude_peft.show import shown_lines

Write = Callable[[str], None]


@contextmanager
def one_answer() -> Iterator[Write]:
    """Yields what writes its pieces; the line is ended at the end, also where the answer was stopped."""
    try:
        yield _plain
    finally:
        print(flush=True)


@contextmanager
def answers(console: Console, names: Sequence[str]) -> Iterator[list[Write]]:
    """Yields a writer for each name, to be used in order: columns at a terminal, sections otherwise."""
    if console.is_terminal:
        with _columns(console, names) as writers:
            yield writers
        return
    begun: set[str] = set()

    def section(name: str) -> Write:
        def write(piece: str) -> None:
            if name not in begun:
                _plain(f"{chr(10) if begun else ''}{name}:\n")
                begun.add(name)
            _plain(piece)

        return write

    with one_answer():
        yield [section(name) for name in names]


@contextmanager
def _columns(console: Console, names: Sequence[str]) -> Iterator[list[Write]]:
    texts = [Text() for _ in names]
    table = Table(expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*texts)
    try:
        # Gone at the end, since a table taller than the screen can only be redrawn in part; then printed whole.
        with Live(table, console=console, auto_refresh=False, transient=True) as live:

            def column(text: Text) -> Write:
                def write(piece: str) -> None:
                    text.append(shown_lines(piece))
                    live.refresh()

                return write

            yield [column(text) for text in texts]
    finally:
        console.print(table)


def _plain(piece: str) -> None:
    print(shown_lines(piece), end="", flush=True)
