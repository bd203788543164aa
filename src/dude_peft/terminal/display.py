"""Progress of a command: one bar at a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from typing_extensions import override

from dude_peft.parents import fits
from dude_peft.show import shown, shown_lines

_LOG_WIDTH = 110
_PATIENCE = 5.0
"""Seconds that a log may stay silent."""


@fits()
class _Console(Console):
    @override
    def on_broken_pipe(self) -> None:
        """`dude train ... | head` must not end a run: the rest goes nowhere."""
        self.quiet = True
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if self.stderr else 1)


class Display:
    """Writes to standard output, or to standard error beside results; `Display(quiet=True)` writes nothing.

    Nothing that passes here is obeyed by a terminal; names in a line are `shown` as well, which keeps them on it.
    """

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        self.console = _Console(quiet=quiet, stderr=stderr, highlight=False, emoji=False, markup=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = _LOG_WIDTH
        self.live = self.console.is_terminal and not quiet

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(Text(shown_lines(text)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that should be noticed."""
        self.console.print(Text(shown_lines(f"warning: {text}"), style="yellow"), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, behind_seconds: float = 0.0) -> Iterator[Callable[..., None]]:
        """A part of the run; yields `advance(count, note="", total=None)`: a bar, or a line at its end.

        The note stands below the bar; a total that becomes known on the way replaces the first one.

        Args:
            name: of the part.
            total: what is done when it ends.
            behind_seconds: what comes behind it and belongs to the time that is left.
        """
        start, name = time.perf_counter(), shown(name, None)
        if not self.live:
            with self._named_late(name):
                yield lambda count, note="", total=None: None
        else:
            bar, line = self._bar(), Text(no_wrap=True, overflow="ellipsis")
            task = bar.add_task(name, total=total, behind_seconds=behind_seconds)

            def advance(count: int, note: str = "", total: int | None = None) -> None:
                bar.update(task, advance=count, total=total)
                line.plain = shown(note, None)

            with Live(Group(bar, line), console=self.console, transient=True):
                yield advance
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A part of the run whose length nobody knows: a spinner at a terminal, a line with its time at the end.

        In a log, a part that lasts is named before its end as well: whoever waits shall know for what.
        """
        start, name = time.perf_counter(), shown(name, None)
        with self.console.status(Text(name)) if self.live else self._named_late(name):
            yield
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def _named_late(self, name: str) -> Iterator[None]:
        timer = threading.Timer(_PATIENCE, self.say, [f"{name} ..."])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _bar(self) -> Any:
        from rich import progress

        return progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            _time_left(),
            console=self.console,
        )


def _time_left() -> Any:
    """Rich's column, and what its task says comes behind it; made here, since rich.progress is slow to import."""
    from rich import progress

    class TimeLeft(progress.ProgressColumn):
        max_refresh = 0.5

        @override
        def render(self, task: progress.Task) -> Text:
            left = task.time_remaining
            if left is None:
                return Text("-:--:--", style="progress.remaining")
            total = int(left + float(task.fields["behind_seconds"]))
            return Text(str(timedelta(seconds=total)), style="progress.remaining")

    return TimeLeft()
