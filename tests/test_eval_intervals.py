"""Intervals and tests of `dude eval`: do they cover what they say, and do the words follow the numbers?"""

from __future__ import annotations

import numpy as np
import pytest
from night import some_by_day

from dude_peft.measure import intervals
from dude_peft.measure.intervals import (
    SHARE,
    SHARES_APART,
    bootstrap_mean,
    bootstrap_mean_of_means,
    bootstrap_share,
    compare,
    mcnemar_exact,
    mean_of_means,
    wilson_interval,
)

DRAWS = 2000


@pytest.mark.parametrize("items", [50, 300, 1319])
def test_one_accuracy_is_covered(items):
    # Any accuracy: at a single one the coverage of a count jumps by a percent or two (Brown, Cai, DasGupta 2001).
    generator = np.random.default_rng(0)
    covered = 0
    for accuracy in generator.uniform(0.05, 0.95, size=DRAWS):
        low, high = wilson_interval(int(generator.binomial(items, accuracy)), items)
        covered += low <= accuracy <= high
    assert 0.93 * DRAWS <= covered <= 0.97 * DRAWS


@pytest.mark.slow
@pytest.mark.parametrize(("items", "wins", "losses"), [(200, 0.20, 0.10), (400, 0.08, 0.08), (1000, 0.05, 0.03)])
def test_a_paired_difference_is_covered(items, wins, losses):
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(DRAWS):
        up, down, _ = generator.multinomial(items, [wins, losses, 1 - wins - losses])
        low, high = bootstrap_share(int(up), int(down), items)
        covered += low <= wins - losses <= high
    assert 0.93 * DRAWS <= covered <= 0.97 * DRAWS


@pytest.mark.parametrize("items", some_by_day([5, 16, 80], [5]))
def test_real_values_are_covered(items, monkeypatch):
    monkeypatch.setattr(intervals, "_DRAWS", 1000)  # for time; 10,000 give the same coverage
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(DRAWS):
        low, high = bootstrap_mean(generator.normal(0.5, 2.0, size=items))
        covered += low <= 0.5 <= high
    assert 0.93 * DRAWS <= covered <= 0.97 * DRAWS


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_a_mean_over_tasks_is_covered(paired, monkeypatch):
    """Groups of 10 to 200 items, each as heavy; shares of right answers, and their differences."""
    monkeypatch.setattr(intervals, "_DRAWS", 1000)
    sizes, accuracies = [10, 40, 100, 200], np.array([0.3, 0.8, 0.5, 0.95])
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(DRAWS):
        tuned = [generator.random(n) < p for n, p in zip(sizes, accuracies, strict=True)]
        values = np.concatenate(tuned).astype(float)
        truth = float(accuracies.mean())
        if paired:
            values -= np.concatenate([generator.random(n) < 0.5 for n in sizes])
            truth -= 0.5
        low, high = bootstrap_mean_of_means(values, sizes, more=SHARES_APART if paired else SHARE)
        covered += low <= truth <= high
    assert 0.93 * DRAWS <= covered <= 0.97 * DRAWS


@pytest.mark.slow
def test_real_values_over_tasks_are_covered(monkeypatch):
    monkeypatch.setattr(intervals, "_DRAWS", 1000)
    sizes, generator = [20, 60, 150], np.random.default_rng(5)
    covered = 0
    for _ in range(DRAWS):
        values = np.concatenate([generator.normal(n / 100, 2.0, size=n) for n in sizes])
        low, high = bootstrap_mean_of_means(values, sizes, more={})
        covered += low <= np.mean(sizes) / 100 <= high
    assert 0.93 * DRAWS <= covered <= 0.97 * DRAWS


def test_means_over_tasks_and_their_words():
    tuned, base = [1.0] * 2 + [0.0] * 8, [0.0] * 2 + [1.0] * 8
    found = compare(tuned, base, sizes=[2, 8])
    assert mean_of_means(tuned, [2, 8]) == 0.5
    assert found.difference == 0.0
    assert found.p_value is None
    assert (found.wins, found.losses) == (2, 8)
    for ups in ([1, 2], [3, 0]):  # a win more or less is no more certain than a loss
        won = [1.0 if n < up else 0.0 for up in ups for n in range(50)]
        better, worse = (compare(*pair, sizes=[50, 50]) for pair in ((won, [0.0] * 100), ([0.0] * 100, won)))
        assert better.interval == pytest.approx([-end for end in reversed(worse.interval)], abs=0.005)
        assert better.verdict == worse.verdict == "no significant difference"
    assert compare([0.5, 0.31, 0.2], [0.4, 0.3, 0.25], sizes=[1, 1, 1]).interval is None
    real = compare([float(n) for n in range(40)], [n + 3.0 for n in range(40)], higher_is_better=False, sizes=[10, 30])
    assert real.verdict == "better"


def test_one_value_has_no_interval():
    assert bootstrap_mean([3.0]) is None
    found = compare([3.0], [2.0])
    assert found.interval is None
    assert found.verdict == "no significant difference"


def test_the_same_model_is_called_significant_in_one_of_twenty_at_most():
    generator = np.random.default_rng(3)
    called = 0
    for _ in range(1000):
        tuned, base = generator.random((2, 120)) < 0.4
        called += compare(tuned.astype(float), base.astype(float)).verdict != "no significant difference"
    assert called <= 0.06 * 1000


def test_counts_and_words():
    base = [1.0] * 40 + [0.0] * 60
    tuned = [1.0] * 35 + [0.0] * 5 + [1.0] * 25 + [0.0] * 35
    found = compare(tuned, base)
    assert (found.wins, found.losses, found.ties) == (25, 5, 70)
    assert found.difference == pytest.approx(0.20)
    assert found.p_value == pytest.approx(0.00032, abs=1e-5)  # 2 P(Binomial(30, 1/2) <= 5)
    assert found.verdict == "better"
    assert compare(base, tuned).verdict == "worse"
    assert compare(tuned, tuned).verdict == "no significant difference"
    assert compare(tuned, base, higher_is_better=False).wins == 5
    assert compare([2.0, 2.5, 2.2], [1.0, 1.2, 1.1], higher_is_better=False).verdict == "worse"


def test_three_ties_are_no_certainty():
    low, high = compare([0.0] * 3, [0.0] * 3).interval
    assert low < -0.3 < 0.3 < high


def test_mcnemar_is_the_binomial_test():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar_exact(7, 7) == pytest.approx(1.0)


def test_five_wins_alone_are_no_proof():
    found = compare([1.0] * 5 + [0.0] * 95, [0.0] * 100)
    assert found.interval[0] > 0  # the bootstrap would be sure
    assert found.verdict == "no significant difference"


@pytest.mark.parametrize(("tuned", "base"), [([], []), ([1.0], [1.0, 0.0])])
def test_unpaired_values_are_refused(tuned, base):
    with pytest.raises(ValueError, match="paired values"):
        compare(tuned, base)
