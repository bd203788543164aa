"""What `dude compare` shows: one bar while its runs go on, then a table of the methods."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from dude_peft.compare.outcome import NAME, Comparison, Final
from dude_peft.show import shown
from dude_peft.terminal.display import Display


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


def show_result(display: Display, found: Comparison, folder: Path) -> None:
    """The warnings, and a line for each method."""
    for warning in found.warnings:
        display.warn(shown(warning, None))
    judged = "test loss (nats a token)" if found.primary == "loss" else "test answers right"
    table = Table(title="Each method at its best setting", title_justify="left")
    for column in ("method", "best rate", "validation loss", judged, "failed"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in standings(found):
        table.add_row(*(Text(shown(cell, None)) for cell in row))
    display.console.print(table)
    display.say(f"result: {shown(folder / NAME, None)}")


def standings(found: Comparison) -> list[tuple[str, ...]]:
    """Of each method its name, best rate, validation loss, mean over the test runs, and failures, as text."""
    rows = []
    for name in found.methods:
        chosen = found.protocol["chosen"].get(name)
        finals = [final for final in found.finals if final.method == name]
        values = [judged_value(final, found.primary) for final in finals if final.failed is None]
        runs = [run for run in (*found.trials, *found.finals) if run.method == name]
        failed = sum(run.failed is not None for run in runs)
        rows.append(
            (
                name,
                "" if chosen is None else f"{chosen['learning_rate']:g}",
                "" if chosen is None else f"{chosen['validation_loss']:.4f}",
                _mean(values, found.primary),
                f"{failed} of {len(runs)}",
            )
        )
    return rows


def judged_value(final: Final, primary: str) -> float:
    """What decides, of one run: mean loss over all tokens, or share of right answers."""
    if primary == "right":
        right = final.right or ()
        return sum(right) / max(len(right), 1)
    total = math.fsum(loss * count for loss, count in zip(final.losses, final.tokens, strict=True))
    return total / max(sum(final.tokens), 1)


def _mean(values: list[float], primary: str) -> str:
    if not values:
        return ""
    mean = math.fsum(values) / len(values)
    of = f" ({len(values)} seeds)" if len(values) > 1 else " (one seed)"
    return (f"{mean:.4f}" if primary == "loss" else f"{100 * mean:.1f} %") + of
