"""What tuning tells: loss over learning rate, what more trials would bring, and how much luck is in the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dude_peft.comparison.outcome import Trial


@dataclass(frozen=True)
class Rate:
    """The trials of one learning rate."""

    learning_rate: float
    losses: tuple[float, ...]
    """Validation losses of those that ended well."""
    failed: int

    @property
    def mean(self) -> float | None:
        """None where a trial failed: nobody would choose such a rate."""
        return None if self.failed or not self.losses else float(np.mean(self.losses))


def rates_of(trials: Sequence[Trial]) -> tuple[Rate, ...]:
    """The trials by learning rate, from the smallest."""
    found = []
    for rate in sorted({trial.learning_rate for trial in trials}):
        here = [trial for trial in trials if trial.learning_rate == rate]
        good = tuple(trial.validation_loss for trial in here if trial.validation_loss is not None)
        found.append(Rate(rate, good, len(here) - len(good)))
    return tuple(found)


def expected_best(losses: Sequence[float]) -> tuple[float, ...]:
    """Expected best validation loss of 1, 2, ... n trials that are drawn from those n.

        E[min of k] = sum_i v_(i) (((n - i + 1) / n)^k - ((n - i) / n)^k),   v_(1) <= v_(2) <= ...

    Source: Dodge et al. 2019, arXiv 1909.03004, equation 8, for a loss.
    """
    values, n = np.sort(np.asarray(losses, dtype=float)), len(losses)
    left = np.arange(n, -1, -1) / max(n, 1)
    return tuple(float(values @ (left[:-1] ** k - left[1:] ** k)) for k in range(1, n + 1))


def width_decades(rates: Sequence[Rate], within: float) -> tuple[float, bool] | None:
    """Decades of learning rates round the best one whose mean validation loss is at most (1 + within) times the best.

    Between two rates the loss is taken as straight over log rate. A rate that failed ends the range.

    Returns:
        (width, whether a range that ends with the grid may be wider); None where no rate is without a failure.
    """
    means = [rate.mean for rate in rates]
    good = [(mean, place) for place, mean in enumerate(means) if mean is not None]
    if not good:
        return None
    lowest, best = min(good)
    limit, places = lowest + within * abs(lowest), [math.log10(rate.learning_rate) for rate in rates]
    ends, open_ended = [], False
    for step in (-1, 1):
        at = best
        while 0 <= at + step < len(rates) and means[at + step] is not None and means[at + step] <= limit:  # type: ignore[operator]
            at += step
        end, beyond = places[at], at + step
        if not 0 <= beyond < len(rates):
            open_ended = True
        elif (higher := means[beyond]) is not None:
            here = means[at]
            assert here is not None
            end += (places[beyond] - end) * (limit - here) / (higher - here)
        ends.append(end)
    return ends[1] - ends[0], open_ended


def luck_of_choice(rates: Sequence[Rate], noise: float, *, resamples: int, seed: int) -> float:
    """Variance that the choice of a rate adds to a method's loss: trials with other seeds might have chosen another.

    The means are taken as true, new trials are drawn round them, and each draw chooses its best rate.

    Args:
        rates: what was tried.
        noise: standard deviation of one trial's loss over seeds.
        resamples: draws.
        seed: of the draws.
    """
    usable = [rate for rate in rates if rate.mean is not None]
    if len(usable) < 2 or not noise > 0:
        return 0.0
    means = np.array([rate.mean for rate in usable], dtype=float)
    errors = noise / np.sqrt([len(rate.losses) for rate in usable])
    draws = means + errors * np.random.default_rng(seed).standard_normal((resamples, len(usable)))
    chosen = means[draws.argmin(1)]
    return float(chosen.var()) if np.ptp(chosen) else 0.0


def trial_noise(rates: Sequence[Rate]) -> float | None:
    """Standard deviation of a trial's loss over seeds, pooled over rates; None where no rate has two seeds."""
    squares = sum(float(np.var(rate.losses)) * len(rate.losses) for rate in rates if rate.losses)
    degrees = sum(len(rate.losses) - 1 for rate in rates if rate.losses)
    return math.sqrt(squares / degrees) if degrees > 0 else None
