"""What a comparison shows, and what it does not: methods ranked, pairs tested, tuning and cost beside them.

Every test item counts by its answer's tokens, so that a mean is the loss that `dude train` tells. A final run that
failed takes the values of the worst run that there is, the base model among them: it is never left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median
from typing import Any

import numpy as np

from dude_peft.comparison.crossed import Estimate, difference, holm, mean_interval
from dude_peft.comparison.outcome import Comparison, Curve, Final
from dude_peft.comparison.rates import Rate, expected_best, luck_of_choice, rates_of, trial_noise, width_decades
from dude_peft.measure.intervals import mcnemar_exact


@dataclass(frozen=True)
class Forgotten:
    """What training did to general rows, means over seeds, in nats a token."""

    loss_change: float
    kl_forward: float
    """KL(base || tuned)."""
    kl_reverse: float
    """KL(tuned || base)."""


@dataclass(frozen=True)
class MethodSummary:
    """One method."""

    method: str
    learning_rate: float | None
    settings: dict[str, Any]
    finals: int
    failed: int
    """Final runs that failed; they count as the worst run that there is."""
    mean: float | None
    """Of what decides, over seeds and items; None where every final run failed."""
    interval: tuple[float, float] | None
    """None of a single seed."""
    by_seed: dict[int, float]
    """The mean of each final run that ended well."""
    seed_spread: float | None
    """Standard deviation of these; None of a single one."""
    gain: float | None
    """How much better than the base model."""
    loss: float | None
    right: float | None
    trials: int
    failed_trials: int
    expected_best: tuple[float, ...]
    """Expected best validation loss of 1, 2, ... trials; a failed one counts as the worst of all methods' trials."""
    rates: tuple[Rate, ...]
    """Of the chosen settings."""
    width_decades: float | None
    """Of the rates whose validation loss is within `Summary.within` of the best."""
    width_open: bool
    """Whether the range reaches the end of the grid, and may be wider."""
    steps_to_loss: float | None
    """Median over final runs of the step at which the loss reaches `Summary.target_loss`; None where most do not."""
    unreached: int
    """Final runs that do not reach it."""
    forgotten: Forgotten | None
    seconds_per_step: float | None
    peak_memory: float | None
    adapter_bytes: float | None
    trained_parameters: float | None
    start_seconds: float | None

    @property
    def tested(self) -> bool:
        """Whether its final runs were started: some setting had trials that all ended well."""
        return self.learning_rate is not None


@dataclass(frozen=True)
class SeedTest:
    """McNemar's exact test on the questions of one seed."""

    seed: int
    wins: int
    """Questions that the first method alone answers right."""
    losses: int
    p_value: float


@dataclass(frozen=True)
class PairSummary:
    """Two methods on the same seeds and items."""

    first: str
    second: str
    seeds: tuple[int, ...]
    estimate: Estimate | None
    """First minus second; None of fewer than two seeds or items."""
    difference: float | None
    p_adjusted: float | None
    """Holm's, over all pairs."""
    better: str | None
    """The method that is better; None where no significant difference was found."""
    by_seed: tuple[SeedTest, ...]
    words: str


@dataclass(frozen=True)
class Summary:
    """What a comparison shows."""

    primary: str
    confidence: float
    within: float
    target_loss: float | None
    methods: tuple[MethodSummary, ...]
    """The best first; those whose every final run failed at the end."""
    pairs: tuple[PairSummary, ...]
    answer: tuple[str, ...]
    """The result in words, a sentence each."""
    notes: tuple[str, ...]
    """What a reader should know before believing it."""


def summarise(
    comparison: Comparison,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    within: float = 0.01,
    target_loss: float | None = None,
) -> Summary:
    """What a comparison shows; the same comparison always gives the same.

    Args:
        comparison: what was run.
        confidence: of intervals; 1 - confidence is the level of the tests.
        resamples: draws, for the luck in the choice of a rate.
        seed: of the draws.
        within: share of the best validation loss that a rate may be above it, for the width.
        target_loss: the loss whose step is looked for; None takes the last one of the slowest method.
    """
    table = _Table(comparison)
    target = _target(comparison) if target_loss is None else target_loss
    worst = max((t.validation_loss for t in comparison.trials if t.validation_loss is not None), default=None)
    methods = [_method(name, table, confidence, within, target, worst) for name in comparison.methods]
    methods.sort(key=lambda found: (found.mean is None, table.sign * (found.mean or 0.0)))
    ranked = [found.method for found in methods]
    luck = {found.method: _luck(found, table, resamples, seed) for found in methods}
    pairs = _pairs(table, ranked, luck, confidence)
    notes = _notes(methods, table, luck)
    return Summary(
        comparison.primary,
        confidence,
        within,
        target,
        tuple(methods),
        tuple(pairs),
        (*_one_seed(methods), *_answer(methods, pairs, table), *notes),
        (*_one_seed(methods), *notes),
    )


class _Table:
    """The values that decide, a row for each final run."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.marks = comparison.primary == "right"
        self.sign = -1.0 if self.marks else 1.0
        """Times a value, smaller is better."""
        good = [final for final in comparison.finals if final.failed is None]
        self.base = None if comparison.base is None else self._of_base(comparison, good)
        rows = [values for final in good if (values := self.of(final)) is not None]
        rows += [] if self.base is None else [self.base]
        self.worst = max(rows, key=lambda values: self.sign * values.mean(), default=None)

    def of(self, final: Final) -> np.ndarray | None:
        if self.marks:
            return None if final.right is None else np.asarray(final.right, dtype=float)
        return _by_tokens(np.asarray(final.losses, dtype=float), final.tokens)

    def rows(self, method: str) -> dict[int, np.ndarray]:
        """Values of the method's final runs by seed, those that failed among them; empty where every one failed."""
        finals = [final for final in self.comparison.finals if final.method == method]
        found = {final.seed: self.of(final) if final.failed is None else None for final in finals}
        if all(values is None for values in found.values()) or self.worst is None:
            return {}
        return {seed: self.worst if values is None else values for seed, values in found.items()}

    def _of_base(self, comparison: Comparison, good: Sequence[Final]) -> np.ndarray | None:
        base = comparison.base
        assert base is not None
        if self.marks:
            return None if base.right is None else np.asarray(base.right, dtype=float)
        return _by_tokens(np.asarray(base.losses, dtype=float), good[0].tokens) if good else None


def _by_tokens(losses: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Values whose plain mean is the mean over tokens, and whose variance is that of this ratio."""
    weights = np.asarray(tokens, dtype=float)
    if not len(weights) or not weights.sum():
        return losses
    mean = float(losses @ weights / weights.sum())
    values: np.ndarray = mean + weights / weights.mean() * (losses - mean)
    return values


def _method(
    name: str, table: _Table, confidence: float, within: float, target: float | None, worst: float | None
) -> MethodSummary:
    comparison = table.comparison
    finals = [final for final in comparison.finals if final.method == name]
    good = [final for final in finals if final.failed is None]
    trials = [trial for trial in comparison.trials if trial.method == name]
    chosen = finals[0] if finals else None
    rates = rates_of([trial for trial in trials if chosen is None or trial.settings == chosen.settings])
    width = width_decades(rates, within)
    rows = table.rows(name)
    values = np.stack(list(rows.values())) if rows else None
    mean = None if values is None else float(values.mean())
    known = [t.validation_loss if t.validation_loss is not None else worst for t in trials]
    steps = [] if target is None else [_step(final.curve, target) for final in good]
    reached = [step for step in steps if step is not None]
    by_seed = {final.seed: float(found.mean()) for final in good if (found := table.of(final)) is not None}
    return MethodSummary(
        method=name,
        learning_rate=None if chosen is None else chosen.learning_rate,
        settings={} if chosen is None else dict(chosen.settings),
        finals=len(finals),
        failed=len(finals) - len(good),
        mean=mean,
        interval=mean_interval(values, level=1 - confidence) if values is not None and _testable(values) else None,
        by_seed=by_seed,
        seed_spread=float(np.std(list(by_seed.values()), ddof=1)) if len(by_seed) > 1 else None,
        gain=None if mean is None or table.base is None else table.sign * (float(table.base.mean()) - mean),
        loss=_mean(float(_by_tokens(np.asarray(final.losses), final.tokens).mean()) for final in good if final.losses),
        right=_mean(fmean(final.right) for final in good if final.right),
        trials=len(trials),
        failed_trials=sum(trial.validation_loss is None for trial in trials),
        expected_best=expected_best([loss for loss in known if loss is not None]) if None not in known else (),
        rates=rates,
        width_decades=None if width is None else width[0],
        width_open=width is not None and width[1],
        steps_to_loss=float(median(reached)) if len(reached) * 2 > len(good) else None,
        unreached=len(steps) - len(reached),
        forgotten=_forgotten(good),
        seconds_per_step=_median(final.seconds_per_step for final in good),
        peak_memory=_median(final.peak_memory for final in good),
        adapter_bytes=_median(final.adapter_bytes for final in good),
        trained_parameters=_median(final.trained_parameters for final in good),
        start_seconds=_median(final.start_seconds for final in good),
    )


def _pairs(table: _Table, ranked: Sequence[str], luck: dict[str, float], confidence: float) -> list[PairSummary]:
    level, both = 1 - confidence, list(combinations(ranked, 2))
    rows = {name: table.rows(name) for name in ranked}
    estimates: list[Estimate | None] = []
    differences: list[float | None] = []
    shared = [tuple(seed for seed in rows[one] if seed in rows[other]) for one, other in both]
    for (one, other), seeds in zip(both, shared, strict=True):
        values = np.stack([rows[one][seed] - rows[other][seed] for seed in seeds]) if seeds else None
        differences.append(None if values is None else float(values.mean()))
        known = luck[one] + luck[other]
        # The strictest level that Holm may ask of a pair: what is said to be detectable is so whatever the others do.
        estimates.append(
            difference(values, level=level, strictest=level / len(both), known=known)
            if values is not None and _testable(values)
            else None
        )
    adjusted = iter(holm([found.p_value for found in estimates if found is not None]))
    pairs = []
    for (one, other), seeds, mean, found in zip(both, shared, differences, estimates, strict=True):
        p_adjusted = None if found is None else next(adjusted)
        better = None
        if p_adjusted is not None and mean is not None and p_adjusted < level:
            better = one if table.sign * mean < 0 else other
        words = _words(table, (one, other), mean, found, p_adjusted, better, len(seeds))
        pairs.append(
            PairSummary(one, other, seeds, found, mean, p_adjusted, better, _mcnemar(table, one, other), words)
        )
    return pairs


def _mcnemar(table: _Table, one: str, other: str) -> tuple[SeedTest, ...]:
    def answers(method: str) -> dict[int, np.ndarray]:
        finals = [f for f in table.comparison.finals if f.method == method and f.failed is None and f.right is not None]
        return {final.seed: np.asarray(final.right, dtype=bool) for final in finals}

    first, second, found = answers(one), answers(other), []
    for seed in first:
        if seed in second:
            wins, losses = (int((a & ~b).sum()) for a, b in ((first[seed], second[seed]), (second[seed], first[seed])))
            found.append(SeedTest(seed, wins, losses, mcnemar_exact(wins, losses)))
    return tuple(found)


def _luck(found: MethodSummary, table: _Table, resamples: int, seed: int) -> float:
    """Variance of the method's mean by the choice of its rate; unknown for right answers, as loss chooses."""
    if table.marks:
        return 0.0
    noise = trial_noise(found.rates)
    noise = found.seed_spread if noise is None else noise
    return luck_of_choice(found.rates, noise or 0.0, resamples=resamples, seed=seed)


def _testable(values: np.ndarray) -> bool:
    return bool(min(values.shape) > 1)


def _target(comparison: Comparison) -> float | None:
    """The loss at the end of the slowest method: the one that all reach."""
    ends: dict[str, list[float]] = {}
    for final in comparison.finals:
        if final.failed is None and final.curve:
            ends.setdefault(final.method, []).append(final.curve[-1][1])
    return max((fmean(losses) for losses in ends.values()), default=None)


def _step(curve: Curve, target: float) -> float | None:
    """The first step at which the loss is at most `target`, straight between two points."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] <= loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def _forgotten(good: Sequence[Final]) -> Forgotten | None:
    found = [final.forgetting for final in good if final.forgetting is not None]
    if not found:
        return None
    return Forgotten(
        fmean(one.loss - one.base_loss for one in found),
        fmean(one.kl_forward for one in found),
        fmean(one.kl_reverse for one in found),
    )


def _mean(values: Any) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None


def amount(value: float, primary: str, *, sign: bool = False) -> str:
    """A difference of what decides, with its unit."""
    mark = "+" if sign else ""
    return f"{100 * value:{mark}.1f} points" if primary == "right" else f"{value:{mark}.4f} nats a token"


def _bare(value: float, primary: str) -> str:
    return amount(value, primary).partition(" ")[0]


def _words(
    table: _Table,
    names: tuple[str, str],
    mean: float | None,
    found: Estimate | None,
    p_adjusted: float | None,
    better: str | None,
    seeds: int,
) -> str:
    (one, other), primary = names, table.comparison.primary
    if mean is None:
        return f"{one} and {other}: not compared, because no final run of the same seed ended well"
    if found is None or p_adjusted is None:
        known = f"{one} and {other} differ by {amount(abs(mean), primary)}"
        return f"{known}, but {'one seed' if seeds == 1 else 'so few items'} cannot show whether the methods do"
    sign = 1.0 if table.sign * mean < 0 else -1.0
    low, high = sorted(-table.sign * sign * end for end in found.interval)
    between = f"{_bare(low, primary)} to {_bare(high, primary)}"
    if better is not None:
        worse = other if better == one else one
        told = f"p {'<' if p_adjusted < 1e-4 else '='} {max(p_adjusted, 1e-4):.2g} after Holm"
        return f"{better} beats {worse} by {amount(abs(mean), primary)} ({between}; {told})"
    holm_alone = " after Holm" if found.p_value < p_adjusted and low * high > 0 else ""
    return (
        f"{one} and {other}: no significant difference{holm_alone} ({between}); a difference of "
        f"{amount(found.detectable, primary)} would have been found four times in five"
    )


def _answer(methods: Sequence[MethodSummary], pairs: Sequence[PairSummary], table: _Table) -> list[str]:
    """The first method, and what is known of it against the others."""
    ranked = [found for found in methods if found.mean is not None]
    if not ranked:
        return ["No method has a test run that ended well, so nothing can be said."]
    best, primary = ranked[0], table.comparison.primary
    assert best.mean is not None
    value = f"{best.mean:.1%} right" if table.marks else f"a loss of {best.mean:.4f} nats a token"
    found = [f"{best.method} has the best mean, {value} at its chosen settings."]
    against = [pair for pair in pairs if best.method in (pair.first, pair.second) and pair.estimate is not None]
    beaten = [pair for pair in against if pair.better == best.method]
    if beaten:
        found += [f"{pair.words}." for pair in beaten]
    tied = [
        f"{pair.second if pair.first == best.method else pair.first} ({_bare(pair.estimate.detectable, primary)})"
        for pair in against
        if pair.better is None and pair.estimate is not None
    ]
    if tied:
        unit = amount(0.0, primary).partition(" ")[2]
        found.append(
            f"No significant difference was found between {best.method} and {', '.join(tied)}. In brackets stands the "
            f"difference in {unit} that would have been found four times in five."
        )
    if best.gain is not None:
        told = "better" if best.gain > 0 else "worse"
        found.append(f"Against the base model it is {amount(abs(best.gain), primary)} {told}.")
    return found


def _one_seed(methods: Sequence[MethodSummary]) -> list[str]:
    if not any(method.finals == 1 for method in methods):
        return []
    return ["One seed: no interval over seeds is possible, so nothing can be claimed about the methods."]


def _notes(methods: Sequence[MethodSummary], table: _Table, luck: dict[str, float]) -> list[str]:
    found, some = [], any(method.mean is not None for method in methods)
    if some and any(method.finals == 2 for method in methods):
        found.append("Two seeds: intervals are wide; three or more show smaller differences.")
    for method in methods:
        if method.failed == method.finals and method.finals:
            why = "every final run failed"
            if not method.tested:
                why = "no setting had trials that all ended well, so none was tested"
            found.append(f"{method.method}: {why}{'; it stands last' if some else ''}.")
        elif method.failed:
            found.append(
                f"{method.method}: {method.failed} of {method.finals} final runs failed; each counts as the worst run."
            )
    if table.marks:
        found.append("Rates were chosen by loss; the intervals do not cover the luck in that choice.")
    elif any(trial_noise(method.rates) is None for method in methods if len(method.rates) > 1):
        # benchmarks/compare_statistics.py: up to 10 % false positives, for the noise of a trial hides its own luck.
        found.append("One tuning seed for each rate: a lucky choice of a rate can look like a difference of methods.")
    elif any(variance > 0 for variance in luck.values()):
        found.append("The intervals between methods cover the luck in the choice of each rate.")
    return found
