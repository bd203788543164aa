"""Means over seeds and items, as far as both may be trusted: seeds and items are crossed random effects.

    x[s, i] = mean + seed_s + item_i + rest_si,   variance of the mean: (MS_seeds + MS_items - MS_rest) / (S I)

Other seeds and other items would have given another mean. A plain two-level bootstrap of three seeds is too sure: it
cannot draw a seed that nobody ran. So the seeds' part of the variance goes with Student's t of S - 1 degrees of
freedom, and the items' part with I - 1:

    half^2 = (t_{S-1}^2 MS_seeds + t_{I-1}^2 max(MS_items - MS_rest, 0)) / (S I)

One t for the sum, with Satterthwaite's degrees of freedom, covers 88 to 95 % where two or three seeds vary as much as
items; this one 95 to 98 %, more than 95 where the seeds hardly matter (`benchmarks/compare_statistics.py`).
Source: Howe 1974, Journal of the American Statistical Association 69.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and items, or a difference of two."""

    mean: float
    interval: tuple[float, float]
    p_value: float
    """Two-sided, of a mean of zero."""
    detectable: float
    """The smallest mean that such data show with a probability of 80 %, at the level that was asked for."""


@dataclass(frozen=True)
class Spread:
    """How uncertain a mean over seeds and items is: the two parts of its variance, and a known third one."""

    seeds: int
    items: int
    of_seeds: float
    """Variance of the mean through seeds, and all that changes with them."""
    of_items: float
    """Variance of the mean through items, beyond that."""
    known: float = 0.0
    """Variance from elsewhere: the luck in choosing a learning rate."""

    def half(self, level: float) -> float:
        """Half of the interval that misses with a probability of `level`."""
        from scipy.stats import norm, t

        seeds, items = (float(t.ppf(1 - level / 2, n - 1)) for n in (self.seeds, self.items))
        # Where a part is nothing, its t of one degree of freedom may be infinite at level 0.
        parts = ((seeds, self.of_seeds), (items, self.of_items), (float(norm.ppf(1 - level / 2)), self.known))
        return math.sqrt(sum(factor**2 * variance for factor, variance in parts if variance > 0))

    def p_value(self, mean: float) -> float:
        """The level at which the interval round `mean` ends at zero."""
        from scipy.optimize import brentq

        if mean == 0 or self.half(1e-12) == 0:
            return 1.0 if mean == 0 else 0.0
        if self.half(1e-12) <= abs(mean):
            return 1e-12
        return float(brentq(lambda level: self.half(level) - abs(mean), 1e-12, 1.0))

    def detectable(self, level: float) -> float:
        """The smallest mean that is found at `level` with a probability of 80 %."""
        from scipy.stats import t

        parts = ((self.of_seeds, self.seeds - 1), (self.of_items, self.items - 1))
        total = self.of_seeds + self.of_items + self.known
        degrees = total**2 / max(sum(v**2 / n for v, n in parts), np.finfo(float).tiny)
        return self.half(level) + float(t.ppf(_POWER, max(degrees, 1.0))) * math.sqrt(total)


def spread(values: np.ndarray, known: float = 0.0) -> Spread:
    """The spread of the mean of `values`, (S, I), both at least 2."""
    seeds, items = values.shape
    mean, by_seed, by_item = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_item + mean
    of_seeds = items * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    of_items = seeds * float(((by_item - mean) ** 2).sum()) / (items - 1)
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (items - 1))
    return Spread(seeds, items, of_seeds / values.size, max(of_items - of_rest, 0.0) / values.size, known)


def difference(values: np.ndarray, *, level: float, strictest: float, known: float = 0.0) -> Estimate:
    """The mean of paired differences, (S, I).

    Where all are -1, 0 or 1, half an item up, half an item down and one tied are added to what the variance is taken
    from (Agresti and Min 2005), so that items that are all alike are no certainty.

    Args:
        values: of every seed and item; at least two of each.
        level: 0.05 for a 95 % interval.
        strictest: the level at which a difference has to be found among several.
        known: variance of the mean from elsewhere.
    """
    found = spread(_with_doubt(values, 1 / math.sqrt(2), -1 / math.sqrt(2)), known) if _is_marks(values) else None
    found = found or spread(values, known)
    mean, half = float(values.mean()), found.half(level)
    return Estimate(mean, (mean - half, mean + half), found.p_value(mean), found.detectable(strictest))


def mean_interval(values: np.ndarray, *, level: float) -> tuple[float, float]:
    """The interval of the mean of `values`, (S, I): of right answers, two right and two wrong items are added to it.

    Source: Agresti and Coull 1998 for shares.
    """
    if not _is_marks(values):
        mean, half = float(values.mean()), spread(values).half(level)
        return mean - half, mean + half
    doubted = _with_doubt(values, 1.0, 1.0, 0.0, 0.0)
    mean, half = float(doubted.mean()), spread(doubted).half(level)
    return max(0.0, mean - half), min(1.0, mean + half)


def _with_doubt(values: np.ndarray, *more: float) -> np.ndarray:
    return np.hstack([values, np.tile(more, (len(values), 1))])


def _is_marks(values: np.ndarray) -> bool:
    return bool(np.isin(values, (-1.0, 0.0, 1.0)).all())


def holm(p_values: list[float]) -> list[float]:
    """Each p value as Holm (1979) adjusts it for the others."""
    count, highest = len(p_values), 0.0
    adjusted = [1.0] * count
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
