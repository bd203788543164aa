"""What `dude compare` shows: one bar while its runs go on, then a table of the methods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dude_peft.comparison.outcome import NAME, Comparison
from dude_peft.comparison.standing import header, standings
from dude_peft.show import shown
from dude_peft.terminal.display import Display

if TYPE_CHECKING:
    from dude_peft.comparison.statistics import Summary


class Progress:
    """Runs done, running and failed, the time that is left, and the best so far: a bar, or lines in a log."""

    def __init__(self, display: Display, total: int) -> None:
        self._display, self._total = display, total
        self._done = self._failed = self._new = 0
        self._stack = contextlib.ExitStack()
        self._advance: Callable[..., None] = lambda count, note="", total=None: None
        self._start = time.perf_counter()

    def __enter__(self) -> Progress:
        self._advance = self._stack.enter_context(self._display.stage("runs", self._total))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def begin(self, done: int) -> None:
        """So many runs ended before."""
        self._done = done
        self._advance(done)
        if done:
            self._display.say(f"{done} runs have ended already; the comparison goes on")

    def expect(self, total: int) -> None:
        """So many runs there will be in all."""
        self._total = total

    def ended(self, words: str, running: int, best: str, *, failed: bool) -> None:
        """One run has ended."""
        self._done += 1
        self._new += 1
        self._failed += failed
        self._advance(1, note=f"running {running}, failed {self._failed}{best}", total=self._total)
        if not self._display.live:
            left = (time.perf_counter() - self._start) / self._new * (self._total - self._done)
            self._display.say(f"[{self._done}/{self._total}] {words}{best}; ETA {left:.0f} s")


def show_result(display: Display, found: Comparison, summary: Summary, folder: Path) -> None:
    """The warnings, a line for each method, and the answer in words."""
    for warning in found.warnings:
        display.warn(shown(warning, None))
    table = Table(title="Each method at its best setting", title_justify="left")
    for column in header(found):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in standings(found, summary):
        table.add_row(*(Text(shown(cell, None)) for cell in row))
    display.console.print(table)
    for sentence in summary.answer:
        display.say(shown(sentence, None))
    display.say(f"result: {shown(folder / NAME, None)}")
