"""How the methods of a comparison stand, as a short table: the numbers behind it are the statistics' and the page's."""

from __future__ import annotations

import math

from dude_peft.comparison.outcome import Comparison, Final


def header(found: Comparison) -> tuple[str, ...]:
    """The names of the columns."""
    judged = "test loss (nats a token)" if found.primary == "loss" else "test answers right"
    return "method", "best rate", "validation loss", judged, "failed"


def standings(found: Comparison) -> list[tuple[str, ...]]:
    """Of each method its name, best rate, validation loss, mean over the test runs, and failures, as text."""
    rows: list[tuple[str, ...]] = []
    for name in found.methods:
        chosen = found.protocol["chosen"].get(name)
        finals = [final for final in found.finals if final.method == name]
        values = [judged_value(final, found.primary) for final in finals if final.failed is None]
        ends = [trial.failed for trial in found.trials if trial.method == name] + [final.failed for final in finals]
        failed = sum(end is not None for end in ends)
        rows.append(
            (
                name,
                "" if chosen is None else f"{chosen['learning_rate']:g}",
                "" if chosen is None else f"{chosen['validation_loss']:.4f}",
                _mean(values, found.primary),
                f"{failed} of {len(ends)}",
            )
        )
    return rows


def best_method(found: Comparison) -> str | None:
    """The method with the best mean over its test runs, of those that did not fail once; None without any."""
    means = {}
    for name in found.methods:
        finals = [final for final in found.finals if final.method == name]
        if finals and all(final.failed is None for final in finals):
            means[name] = math.fsum(judged_value(final, found.primary) for final in finals) / len(finals)
    choose = min if found.primary == "loss" else max
    return choose(means, key=lambda name: means[name]) if means else None


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
