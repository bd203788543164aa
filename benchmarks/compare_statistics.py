"""Whether the statistics of a comparison keep what they promise: thousands of synthetic comparisons, tuning included.

    python benchmarks/compare_statistics.py --json benchmarks/results/DATE-compare-statistics.json

Two methods have the same loss over log learning rate, a parabola. Each is tuned on noisy validation losses, and its
chosen rate is run with fresh seeds on items. Whatever goes through `summarise` here goes through it in `dude compare`.

false positives    comparisons that call two methods different that are the same; wanted: at most 5 %
coverage           intervals that hold the true difference, 0; wanted: 93 to 97 %
bootstrap          coverage of a plain two-level bootstrap of the same values
power              comparisons that find a difference of the size that is detectable by calculation; predicted: 80 %
without luck       false positives if the luck in the choice of a rate were left out

Seeds, items and their interaction have the standard deviations in each setting's name, in hundredths of a nat.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from dude_peft.comparison.crossed import Spread, difference
from dude_peft.comparison.outcome import Base, Comparison, Final, Trial
from dude_peft.comparison.statistics import summarise

RATES = [10 ** (-4.5 + step / 2) for step in range(5)]
BEST = -3.5
# final seeds, tuning seeds, items, sd of: seed, item, rest; rise of the loss a decade from the best rate
SETTINGS: dict[str, tuple[int, int, int, float, float, float, float]] = {
    "items alone, 3 seeds": (3, 1, 200, 0.0, 0.1, 0.1, 0.2),
    "seeds 1, items 10, 3 seeds": (3, 1, 200, 0.01, 0.1, 0.1, 0.2),
    "seeds 1, items 10, 3 seeds, flat rates": (3, 1, 200, 0.01, 0.1, 0.1, 0.02),
    "seeds 3, items 10, 3 seeds": (3, 3, 200, 0.03, 0.1, 0.1, 0.2),
    "seeds 3, items 10, 3 seeds, flat rates": (3, 3, 200, 0.03, 0.1, 0.1, 0.05),
    "seeds 3, items 10, 5 seeds": (5, 3, 200, 0.03, 0.1, 0.1, 0.2),
    "seeds 3, items 10, 5 seeds, steep rates": (5, 3, 200, 0.03, 0.1, 0.1, 1.0),
    "seeds 3, items 10, 5 seeds, one tuning seed": (5, 1, 200, 0.03, 0.1, 0.1, 0.2),
    "seeds 10, items 10, 5 seeds": (5, 3, 50, 0.1, 0.1, 0.1, 1.0),
    "seeds 3, items 10, 2 seeds": (2, 1, 200, 0.03, 0.1, 0.1, 0.2),
}


def main() -> None:
    """Simulate, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=2000, help="of every setting")
    parser.add_argument("--json", type=Path, default=None, help="write the record here (see benchmarks/results)")
    asked = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    begun = time.perf_counter()
    for number, (name, setting) in enumerate(SETTINGS.items()):
        found = simulate(setting, asked.comparisons, np.random.default_rng(number))
        results[name] = {key: round(value, 3) for key, value in found.items()}
        told = "  ".join(f"{key} {value:.1%}" for key, value in results[name].items())
        print(f"{name}: {told}", flush=True)
    record = {
        "benchmark": "compare_statistics",
        "comparisons": asked.comparisons,
        "settings": {name: list(setting) for name, setting in SETTINGS.items()},
        "results": results,
        "environment": {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "seconds": round(time.perf_counter() - begun),
        },
    }
    if asked.json is not None:
        asked.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def simulate(setting: tuple[int, int, int, float, float, float, float], count: int, rng: Any) -> dict[str, float]:
    """Shares of `count` comparisons, and of as many with a difference."""
    wrong = covered = found = plain = careless = 0
    apart = _detectable(setting)
    for number in range(count):
        comparison = synthetic(setting, 0.0, rng)
        pair = summarise(comparison, resamples=500).pairs[0]
        assert pair.estimate is not None
        low, high = pair.estimate.interval
        wrong += pair.better is not None
        covered += low <= 0 <= high
        careless += difference(_differences(comparison), level=0.05, strictest=0.05).p_value < 0.05
        if number < count // 4:
            plain += _bootstrap_covers(comparison, rng)
        pair = summarise(synthetic(setting, apart, rng), resamples=500).pairs[0]
        found += pair.better == "b"
    return {
        "false positives": wrong / count,
        "coverage": covered / count,
        "bootstrap": plain / (count // 4),
        "power": found / count,
        "without luck": careless / count,
    }


def synthetic(setting: tuple[int, int, int, float, float, float, float], apart: float, rng: Any) -> Comparison:
    """A comparison of a and b, where a's loss is larger by `apart`."""
    seeds, tuning, items, of_seed, of_item, of_rest, rise = setting
    trials: list[Trial] = []
    finals: list[Final] = []
    for method, more in (("a", apart), ("b", 0.0)):
        losses = {
            rate: [1 + more + rise * (math.log10(rate) - BEST) ** 2 + _noise(setting, rng) for _ in range(tuning)]
            for rate in RATES
        }
        for rate, each in losses.items():
            trials += [Trial(method, {}, rate, seed, loss, None, 1.0, 1) for seed, loss in enumerate(each)]
        chosen = min(RATES, key=lambda rate: np.mean(losses[rate]))
        centre = 1 + more + rise * (math.log10(chosen) - BEST) ** 2
        item = of_item / math.sqrt(2) * rng.standard_normal(items)
        for seed in range(seeds):
            rest = of_rest / math.sqrt(2) * rng.standard_normal(items)
            values = centre + of_seed / math.sqrt(2) * rng.standard_normal() + item + rest
            finals.append(Final(method, {}, chosen, 100 + seed, tuple(values), (1,) * items, None, None))
    base = Base((2.0,) * items, None)
    return Comparison(
        "", ("a", "b"), "loss", ("",) * items, (), tuple(trials), tuple(finals), base, {}, (), {}, {}
    )  # fmt: skip


def _noise(setting: tuple[int, int, int, float, float, float, float], rng: Any) -> float:
    """Of a trial's validation loss: its seed; the validation items are the same for all."""
    _, _, items, of_seed, _, of_rest, _ = setting
    return math.sqrt((of_seed**2 + of_rest**2 / items) / 2) * float(rng.standard_normal())


def _detectable(setting: tuple[int, int, int, float, float, float, float]) -> float:
    """By calculation, from the true variances; the luck in the choice is simulated."""
    seeds, tuning, items, of_seed, of_item, of_rest, rise = setting
    losses = np.array([rise * (math.log10(rate) - BEST) ** 2 for rate in RATES])
    sd = math.sqrt((of_seed**2 + of_rest**2 / items) / 2 / tuning)
    draws = losses + sd * np.random.default_rng(0).standard_normal((20_000, len(RATES)))
    luck = 2 * float(losses[draws.argmin(1)].var())
    whole = Spread(seeds, items, (of_seed**2 + of_rest**2 / items) / seeds, of_item**2 / items, luck)
    return whole.detectable(0.05)


def _differences(comparison: Comparison) -> np.ndarray:
    first, second = ([f.losses for f in comparison.finals if f.method == name] for name in ("a", "b"))
    return np.array(first) - np.array(second)


def _bootstrap_covers(comparison: Comparison, rng: Any) -> bool:
    """Whether a plain two-level bootstrap's 95 % interval holds 0."""
    values = _differences(comparison)
    seeds, items = values.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), 400) / seeds
    of_items = rng.multinomial(items, np.full(items, 1 / items), 400) / items
    low, high = np.quantile(((of_seeds @ values) * of_items).sum(1), [0.025, 0.975])
    return bool(low <= 0 <= high)


if __name__ == "__main__":
    main()
