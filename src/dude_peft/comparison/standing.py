"""How the methods of a comparison stand, as a short table and in words; the numbers are those of `statistics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dude_peft.comparison.outcome import Comparison

if TYPE_CHECKING:
    from dude_peft.comparison.statistics import MethodSummary, Summary


def summary_of(found: Comparison) -> Summary:
    """The statistics of a comparison."""
    from dude_peft.comparison.statistics import summarise

    return summarise(found)


def header(found: Comparison) -> tuple[str, ...]:
    """The names of the columns."""
    judged = "test loss" if found.primary == "loss" else "test answers right"
    return "method", "best rate", "validation loss", judged, "95 % interval", "runs failed"


def standings(found: Comparison, summary: Summary) -> list[tuple[str, ...]]:
    """A row for each method, the best first: what `header` names, as text."""
    return [_row(found, each) for each in summary.methods]


def best_method(summary: Summary) -> str | None:
    """The method with the best mean over its test runs; None where none ended well."""
    return next((each.method for each in summary.methods if each.mean is not None), None)


def _row(found: Comparison, each: MethodSummary) -> tuple[str, ...]:
    chosen = found.protocol["chosen"].get(each.method)
    runs = each.trials + (each.finals if each.tested else 0)
    interval = "" if each.interval is None else " to ".join(_amount(end, found.primary) for end in each.interval)
    return (
        each.method,
        "" if chosen is None else f"{chosen['learning_rate']:g}",
        "" if chosen is None else f"{chosen['validation_loss']:.4f}",
        "" if each.mean is None else _amount(each.mean, found.primary),
        interval,
        f"{each.failed_trials + (each.failed if each.tested else 0)} of {runs}",
    )


def _amount(value: float, primary: str) -> str:
    return f"{value:.4f}" if primary == "loss" else f"{100 * value:.1f} %"
