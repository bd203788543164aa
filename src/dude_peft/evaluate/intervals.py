"""Whether two models differ on the same items: paired bootstrap, McNemar's exact test, and the outcome in words.

One accuracy alone has the Wilson interval of `train/score.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_DRAWS = 10_000


@dataclass(frozen=True)
class Comparison:
    """Tuned minus base on the same items."""

    difference: float
    """Mean of tuned - base."""
    interval: tuple[float, float]
    """95 %, percentile bootstrap over items."""
    wins: int
    """Items where tuned is better."""
    losses: int
    ties: int
    p_value: float | None
    """McNemar's exact test; None where values are not right or wrong."""
    verdict: str
    """`better`, `worse` or `no significant difference`."""


def compare(
    tuned: Sequence[float], base: Sequence[float], *, higher_is_better: bool = True, seed: int = 0
) -> Comparison:
    """Compare two models item by item.

    A difference is called significant if zero lies outside the interval and, where every value is 0 or 1, McNemar's
    p < 0.05 as well: with few discordant items the bootstrap alone is too sure.

    Args:
        tuned: value of each item.
        base: of the same items, in the same order.
        higher_is_better: False for losses.
        seed: of the bootstrap.

    Raises:
        ValueError: other lengths, or no items.
    """
    if len(tuned) != len(base) or not len(tuned):
        raise ValueError(f"paired values wanted, not {len(tuned)} and {len(base)}")
    differences = np.asarray(tuned, dtype=float) - np.asarray(base, dtype=float)
    interval = bootstrap_mean(differences, seed=seed)
    good = differences if higher_is_better else -differences
    wins, losses = int((good > 0).sum()), int((good < 0).sum())
    p_value = mcnemar_exact(wins, losses) if _is_binary(tuned) and _is_binary(base) else None
    significant = not interval[0] <= 0 <= interval[1] and (p_value is None or p_value < 1 - LEVEL)
    verdict = ("better" if good.mean() > 0 else "worse") if significant else "no significant difference"
    ties = len(differences) - wins - losses
    return Comparison(float(differences.mean()), interval, wins, losses, ties, p_value, verdict)


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled items (Efron 1979).

    Items of equal value are drawn together, as one multinomial count: the same distribution, in little memory.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=_DRAWS)
    low, high = np.quantile(draws @ distinct / total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided p of McNemar's exact test (1947): are wins and losses as likely as heads and tails?"""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _is_binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)
