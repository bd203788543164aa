"""What a run shows while it goes: one bar at a terminal, plain lines in a log, and tables at the end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dude_peft.data.show import shown
from dude_peft.train.record import Answer, Score

_LOG_WIDTH = 110
_LONGEST_ANSWER = 700


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """`dude train ... | head` must not end a run: the rest goes nowhere."""
        self.quiet = True
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Display:
    """Writes to standard output; `Display(quiet=True)` writes nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = _Console(quiet=quiet, highlight=False, emoji=False, markup=False)
        if not self._console.is_terminal and "COLUMNS" not in os.environ:
            self._console.width = _LOG_WIDTH
        self.live = self._console.is_terminal and not quiet

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that should be noticed."""
        self._console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """A part of the run; yields `advance(count, note="")`. At a terminal a bar, otherwise a line at the end."""
        start = time.perf_counter()
        if not self.live:
            yield lambda count, note="": None
        else:
            with self._bar() as bar:
                task = bar.add_task(name, total=total, note="")
                yield lambda count, note="": bar.update(task, advance=count, note=note)
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A part of the run whose length nobody knows: a spinner at a terminal, a line with its time at the end."""
        start = time.perf_counter()
        with self._console.status(name) if self.live else contextlib.nullcontext():
            yield
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")

    def _bar(self) -> Any:
        from rich import progress

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def before_after(self, before: Score, after: Score) -> None:
        """The run's result as a table."""
        table = Table(title="Held-out rows", title_justify="left")
        table.add_column("")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        loss = f"{after.loss - before.loss:+.3f}"
        table.add_row("loss (nats a token)", f"{before.loss:.3f}", f"{after.loss:.3f}", loss)
        if after.rows:
            change = 100 * (after.right - before.right) / after.rows
            table.add_row("exact match", _share(before), _share(after), f"{change:+.1f} points")
            table.add_row("  95 % interval", _interval(before), _interval(after), "")
        self._console.print(table)

    def samples(self, before: tuple[Answer, ...], after: tuple[Answer, ...]) -> None:
        """Answers of the model before and after, side by side."""
        for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
            table = Table(
                title=Text(f"{number}. {_lines(new.question)}\nexpected: {_lines(new.expected)}"),
                title_justify="left",
                title_style="",
                expand=True,
            )
            for title, answer in (("before", old), ("after", new)):
                table.add_column(f"{title}: {'right' if answer.right else 'wrong'}", ratio=1)
            table.add_row(Text(_lines(old.text)), Text(_lines(new.text)))
            self._console.print(table)


def _share(score: Score) -> str:
    return f"{score.right}/{score.rows} = {100 * score.right / score.rows:.1f} %"


def _interval(score: Score) -> str:
    low, high = score.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _lines(text: str) -> str:
    """Foreign text for a terminal: line breaks stay, other control characters are escaped."""
    cut = text if len(text) <= _LONGEST_ANSWER else text[:_LONGEST_ANSWER] + " …"
    return "\n".join(shown(line, None) for line in cut.splitlines())
