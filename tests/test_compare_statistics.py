"""The statistics of a comparison: against scipy and by hand, on planted differences and ties, and with failures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the statistics need scipy, which is not installed here")

from scipy import stats as scipy_stats

from dude_peft.artifact.json_text import json_text
from dude_peft.comparison.crossed import difference, holm, mean_interval, spread
from dude_peft.comparison.outcome import Base, Comparison, Final, Forgetting, Trial
from dude_peft.comparison.rates import Rate, expected_best, luck_of_choice, rates_of, trial_noise, width_decades
from dude_peft.comparison.statistics import summarise

ITEMS = 60


def comparison(levels, *, seeds=5, primary="loss", noise=0.02, **changes):
    """Methods with the given mean losses (or shares of right answers), on the same items."""
    rng = np.random.default_rng(0)
    item = rng.normal(0, 0.3, ITEMS)
    trials, finals = [], []
    for method, level in levels.items():
        for rate in (1e-4, 3e-4, 1e-3):
            loss = level + abs(math.log10(rate / 3e-4))
            trials += [Trial(method, {}, rate, seed, loss + 0.001 * seed, None, 1.0, 10) for seed in (0, 1)]
        for seed in range(seeds):
            shift = rng.normal(0, noise)
            losses = level + item + shift + rng.normal(0, noise, ITEMS)
            right = tuple(bool(value) for value in rng.random(ITEMS) < level) if primary == "right" else None
            finals.append(
                Final(
                    method, {}, 3e-4, 10 + seed, tuple(losses), (4,) * ITEMS, right, None, 0.5, 2**30, 10_000, 500, 1.5,
                    Forgetting(3.1, 3.0, 0.2, 0.1), ((1, 3.0), (10, level + 0.5), (20, level)),
                )
            )  # fmt: skip
    base = Base(tuple(2.0 + item), (False,) * ITEMS if primary == "right" else None)
    names = tuple(f"row {n}" for n in range(ITEMS))
    found = Comparison(
        "mine", tuple(levels), primary, names, names, tuple(trials), tuple(finals), base, {}, (), {}, {}
    )  # fmt: skip
    return replace(found, **changes)


def failing(final):
    return replace(
        final, losses=(), tokens=(), right=None, failed="NaN at step 3", forgetting=None, curve=(),
        seconds_per_step=None, peak_memory=None, adapter_bytes=None, trained_parameters=None, start_seconds=None,
    )  # fmt: skip


# The arithmetic


def test_without_item_effects_it_is_the_t_test_of_the_seeds():
    """Every item of a seed moves alike: all that is known are the seeds' means."""
    means = np.array([0.03, 0.05, 0.02, 0.06])
    values = np.repeat(means[:, None], 50, 1)
    found = difference(values, level=0.05, strictest=0.05)
    theirs = scipy_stats.ttest_1samp(means, 0)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-6)


def test_without_seed_effects_it_is_the_t_test_of_the_items():
    items = np.random.default_rng(1).normal(0.1, 0.5, 40)
    found = difference(np.repeat(items[None], 3, 0), level=0.05, strictest=0.05)
    theirs = scipy_stats.ttest_1samp(items, 0)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-6)


def test_mean_squares_by_hand():
    """[[0, 2, 4], [2, 4, 9]]: MS_seeds 13.5, MS_items 15.5, MS_rest 1.5, over 6 numbers."""
    found = spread(np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 9.0]]))
    assert (found.of_seeds, found.of_items) == pytest.approx((13.5 / 6, 14.0 / 6))


def test_power_is_that_of_the_noncentral_t_where_one_part_is_all():
    means = np.array([0.03, 0.05, 0.02, 0.06, 0.01, 0.04])
    found = difference(np.repeat(means[:, None], 50, 1), level=0.05, strictest=0.05)
    error, t = means.std(ddof=1) / math.sqrt(6), scipy_stats.t.ppf(0.975, 5)
    assert scipy_stats.nct.sf(t, 5, found.detectable / error) == pytest.approx(0.8, abs=0.03)


def test_items_that_are_all_alike_are_no_certainty():
    tied = difference(np.zeros((3, 50)), level=0.05, strictest=0.05)
    assert tied.p_value == 1
    assert 0.02 < tied.interval[1] < 0.1
    low, high = mean_interval(np.ones((3, 50)), level=0.05)
    assert 0.9 < low < 1
    assert high == 1


def test_losses_that_are_all_alike_are_told_as_they_are():
    assert difference(np.full((3, 50), 0.25), level=0.05, strictest=0.05).p_value == 0
    assert difference(np.zeros((3, 50)) + 0.0, level=0.05, strictest=0.05).p_value == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def test_expected_best_by_hand_and_by_drawing():
    assert expected_best([3.0, 1.0]) == pytest.approx((2.0, 1.5))  # of two draws, 1 is missed in one of four
    losses = [2.0, 1.0, 1.5, 1.2, 3.0]
    draws = np.random.default_rng(0).choice(losses, (40_000, 3)).min(1).mean()
    assert expected_best(losses)[2] == pytest.approx(draws, abs=0.01)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.0, 1.0, 2.0), (2 * 0.01, False)),  # a decade each way, straight: a hundredth of it
        ((1.005, 1.0, 1.005), (2.0, True)),
        ((1.0, 1.005, None), (1.0, True)),
        ((None, None, None), None),
    ],
)
def test_the_width_of_good_rates(losses, expected):
    rates = [Rate(10.0**place, () if loss is None else (loss,), int(loss is None)) for place, loss in enumerate(losses)]
    found = width_decades(rates, 0.01)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == pytest.approx(expected[0])
        assert found[1] is expected[1]


def test_luck_is_there_only_where_another_rate_might_have_been_chosen():
    def rates(second):
        return [Rate(1e-4, (1.0, 1.1), 0), Rate(1e-3, (second, second + 0.1), 0)]

    noise = trial_noise(rates(1.05))
    assert noise == pytest.approx(np.std([1.0, 1.1], ddof=1))
    assert luck_of_choice(rates(9.0), noise, resamples=2000, seed=0) == 0
    assert luck_of_choice(rates(1.05), noise, resamples=2000, seed=0) > 1e-4


# Whole comparisons


def test_a_planted_difference_is_found_and_a_planted_tie_is_told_as_one():
    found = summarise(comparison({"lora": 1.5, "dude": 1.3, "dora": 1.3}))
    assert [one.method for one in found.methods][-1] == "lora"
    by_names = {frozenset((pair.first, pair.second)): pair for pair in found.pairs}
    assert by_names[frozenset(("dude", "lora"))].better == "dude"
    tie = by_names[frozenset(("dude", "dora"))]
    assert tie.better is None
    assert "no significant difference" in tie.words
    assert "would have been found four times in five" in tie.words
    pair = by_names[frozenset(("dude", "lora"))]
    assert pair.words.startswith("dude beats lora by 0.")
    assert any("dude beats lora" in line or "dora beats lora" in line for line in found.answer)


def test_every_number_is_json_and_the_same_each_time():
    one = comparison({"lora": 0.4, "dude": 0.7}, primary="right")
    first, again = (json_text(asdict(summarise(one))) for _ in range(2))
    assert first == again
    assert json.loads(first)["primary"] == "right"


def test_right_answers_have_mcnemars_test_for_each_seed():
    one = comparison({"lora": 0.4, "dude": 0.8}, primary="right")
    found = summarise(one)
    pair = found.pairs[0]
    assert pair.better == "dude"
    assert len(pair.by_seed) == 5
    finals = {(final.method, final.seed): np.array(final.right) for final in one.finals}
    first, second = (finals[name, 10] for name in (pair.first, pair.second))
    wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
    assert (pair.by_seed[0].wins, pair.by_seed[0].losses) == (wins, losses)
    assert pair.by_seed[0].p_value == pytest.approx(scipy_stats.binomtest(wins, wins + losses).pvalue)
    assert any("Rates were chosen by loss" in note for note in found.notes)


def test_one_seed_makes_no_claim():
    found = summarise(comparison({"lora": 1.9, "dude": 1.0}, seeds=1))
    assert found.answer[0].startswith("One seed: no interval over seeds is possible")
    pair = found.pairs[0]
    assert pair.estimate is None
    assert pair.better is None
    assert pair.difference == pytest.approx(-0.9, abs=0.1)
    assert "one seed cannot show" in pair.words
    assert found.methods[0].interval is None


def test_a_failed_final_counts_against_its_method():
    whole = comparison({"lora": 1.5, "dude": 1.4})
    finals = tuple(failing(final) if final.method == "dude" and final.seed == 10 else final for final in whole.finals)
    found = summarise(replace(whole, finals=finals))
    dude = next(one for one in found.methods if one.method == "dude")
    assert dude.failed == 1
    assert dude.mean is not None
    assert dude.mean > summarise(whole).methods[0].mean + 0.1  # a fifth of the way to the base model's 2.0
    assert len(dude.by_seed) == 4
    assert any("dude: 1 of 5 final runs failed" in note for note in found.notes)
    assert found.pairs[0].seeds == (10, 11, 12, 13, 14)


def test_a_method_that_always_fails_stands_last():
    whole = comparison({"lora": 1.5, "dude": 1.4})
    finals = tuple(failing(final) if final.method == "dude" else final for final in whole.finals)
    found = summarise(replace(whole, finals=finals))
    assert [one.method for one in found.methods] == ["lora", "dude"]
    assert found.methods[1].mean is None
    assert found.pairs[0].better is None
    assert "not compared" in found.pairs[0].words
    nothing = summarise(replace(whole, finals=tuple(map(failing, whole.finals)), base=None))
    assert nothing.answer[0].startswith("No method has a test run that ended well")


def test_a_comparison_that_has_only_begun():
    found = summarise(replace(comparison({"lora": 1.5, "dude": 1.4}), finals=(), base=None))
    assert found.answer[0].startswith("No method has a test run")
    assert all(one.trials == 6 for one in found.methods)
    assert summarise(replace(comparison({"lora": 1.5}), trials=())).pairs == ()


def test_failed_trials_count_as_the_worst_and_close_the_range():
    whole = comparison({"lora": 1.5, "dude": 1.4})
    trials = tuple(
        replace(trial, validation_loss=None, failed="NaN") if trial.method == "dude" and trial.learning_rate == 1e-3
        else trial
        for trial in whole.trials
    )  # fmt: skip
    found = summarise(replace(whole, trials=trials))
    dude = next(one for one in found.methods if one.method == "dude")
    assert dude.failed_trials == 2
    assert len(dude.expected_best) == 6
    assert dude.expected_best[0] > summarise(whole).methods[0].expected_best[0]
    assert rates_of([trial for trial in trials if trial.method == "dude"])[-1].mean is None


def test_steps_costs_and_forgetting():
    found = summarise(comparison({"lora": 1.5, "dude": 1.4}))
    lora, dude = (next(one for one in found.methods if one.method == name) for name in ("lora", "dude"))
    assert found.target_loss == pytest.approx(1.5)
    assert lora.steps_to_loss == pytest.approx(20)
    assert dude.steps_to_loss == pytest.approx(10 + 10 * 0.4 / 0.5)
    assert (dude.seconds_per_step, dude.peak_memory, dude.adapter_bytes) == (0.5, 2**30, 10_000)
    assert dude.forgotten is not None
    assert dude.forgotten.loss_change == pytest.approx(0.1)
    assert summarise(comparison({"lora": 1.5}), target_loss=0.1).methods[0].steps_to_loss is None


def test_items_count_by_their_tokens():
    """As `dude train` tells its loss: a mean over tokens."""
    losses, tokens = np.linspace(1, 2, ITEMS), np.arange(1, ITEMS + 1)
    whole = comparison({"lora": 1.5})
    finals = tuple(replace(final, losses=tuple(losses), tokens=tuple(tokens.tolist())) for final in whole.finals)
    found = summarise(replace(whole, finals=finals)).methods[0]
    assert found.mean == pytest.approx(losses @ tokens / tokens.sum())


def test_false_positives_coverage_and_power():
    """A short run of benchmarks/compare_statistics.py: its bounds are those of the few draws."""
    rng = np.random.default_rng(0)
    wrong = covered = found = 0
    for _ in range(300):
        seeds = 0.1 * rng.standard_normal((5, 1))
        values = seeds + rng.standard_normal((1, 40)) / 3 + rng.standard_normal((5, 40)) / 3
        estimate = difference(values, level=0.05, strictest=0.05)
        wrong += estimate.p_value < 0.05
        covered += estimate.interval[0] <= 0 <= estimate.interval[1]
        apart = estimate.detectable
        found += difference(values + apart, level=0.05, strictest=0.05).p_value < 0.05
    assert wrong <= 27  # of 15 expected, 3 standard deviations
    assert covered == 300 - wrong
    assert found >= 195
