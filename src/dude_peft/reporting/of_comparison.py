"""The page of a comparison: which method is better, how sure that is, what it cost, and what nobody tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dude_peft.comparison.outcome import Comparison
from dude_peft.comparison.statistics import Summary, summarise
from dude_peft.reporting.curves import bars_figure, lines_figure, scatter_figure
from dude_peft.reporting.document import (
    Block,
    Cell,
    Document,
    Section,
    Text,
    facts,
    number,
    of_bytes,
    table,
)


def document_of_comparison(folder: Path) -> Document:
    """Everything that a comparison's folder tells.

    Raises:
        ArtifactError: comparison.json is damaged.
    """
    comparison = Comparison.read(folder)
    found = summarise(comparison)
    sections = [
        Section("Ranking", tuple(_ranking(found))),
        Section("Pairs of methods", tuple(_pairs(found))),
        Section("Learning rates", tuple(_rates(found))),
        Section("Seeds", tuple(_seeds(found, comparison))),
        Section("What tuning costs", tuple(_tuning(found, comparison))),
        Section("Forgetting against gain", tuple(_forgetting(found))),
        Section("Cost against gain", tuple(_costs(found))),
        Section("Convergence", tuple(_convergence(found, comparison))),
        Section("Protocol", (facts("What was done", comparison.protocol),)),
        Section("What was not tested", tuple(Text(text) for text in comparison.not_tested)),
        Section(
            "Data and environment",
            (facts("Data, sha256", comparison.data_hashes), facts("Environment", comparison.environment)),
        ),
    ]
    answer = (*found.answer, *(f"Warning: {text}" for text in comparison.warnings))
    return Document(f"A comparison: {comparison.name}", answer, tuple(one for one in sections if one.blocks))


def _unit(found: Summary) -> str:
    return "share right" if found.primary == "right" else "loss, nats a token"


def _ranking(found: Summary) -> Iterator[Block]:
    ranked = [one for one in found.methods if one.mean is not None]
    if ranked:
        bars = [(one.method, one.mean or 0.0, one.interval) for one in ranked]
        alt = f"{_unit(found)}, mean over seeds and items with its interval: {ranked[0].method} is first."
        yield bars_figure(f"Mean on the test rows, {100 * found.confidence:g} % interval", alt, bars, x=_unit(found))
    rows: list[tuple[Cell, ...]] = [
        (
            one.method, f"{one.learning_rate:g}" if one.learning_rate is not None else "-", number(one.mean, ".4f"),
            *_ends(one.interval), number(one.gain, "+.4f"), number(one.seed_spread), number(one.loss, ".4f"),
            number(one.right, ".4f"), number(one.finals), number(one.failed),
        )
        for one in found.methods
    ]  # fmt: skip
    header = (
        "method", "learning rate", _unit(found), "interval from", "to", "better than the base by", "spread over seeds",
        "loss", "share right", "final runs", "failed",
    )  # fmt: skip
    yield table("Methods, the best first", header, rows)
    yield Text(
        "An interval of one method holds the luck of its questions, which all methods share. So two intervals may "
        "overlap where the difference is significant: the pairs below decide."
    )
    settings = {one.method: one.settings for one in found.methods if one.settings}
    if settings:
        yield facts("Chosen settings", settings)


def _ends(ends: tuple[float, float] | None) -> tuple[Cell, ...]:
    return (number(None), number(None)) if ends is None else (number(ends[0], ".4f"), number(ends[1], ".4f"))


def _pairs(found: Summary) -> Iterator[Block]:
    rows: list[tuple[Cell, ...]] = []
    for pair in found.pairs:
        estimate = pair.estimate
        rows.append((
            f"{pair.first} - {pair.second}", number(pair.difference, "+.4f"),
            *_ends(None if estimate is None else estimate.interval),
            number(None if estimate is None else estimate.p_value, ".2g"), number(pair.p_adjusted, ".2g"),
            number(None if estimate is None else estimate.detectable, ".4f"), number(len(pair.seeds)),
        ))  # fmt: skip
    if not rows:
        return
    for pair in found.pairs:
        yield Text(f"{pair.words}.")
    header = (
        "pair", "difference", "interval from", "to", "p", "p after Holm", "found 4 times in 5", "seeds",
    )  # fmt: skip
    yield table(f"Differences in {_unit(found)}, paired over seeds and items", header, rows)
    tests: list[tuple[Cell, ...]] = [
        (
            f"{pair.first} - {pair.second}",
            str(one.seed),
            number(one.wins),
            number(one.losses),
            number(one.p_value, ".2g"),
        )
        for pair in found.pairs
        for one in pair.by_seed
    ]
    if tests:
        columns = ("pair", "seed", "first alone right", "second alone right", "p")
        yield table("McNemar's exact test, seed by seed", columns, tests)


def _rates(found: Summary) -> Iterator[Block]:
    lines = {
        one.method: [(rate.learning_rate, rate.mean) for rate in one.rates if rate.mean is not None]
        for one in found.methods
    }
    if any(lines.values()):
        alt = "Mean validation loss over learning rate, a line for each method. " + " ".join(
            f"{one.method}: lowest at {one.learning_rate:g}." for one in found.methods if one.learning_rate is not None
        )
        yield lines_figure(
            "Validation loss over learning rate", alt, lines, x="learning rate", y="nats a token", log_x=True
        )
    rows: list[tuple[Cell, ...]] = [
        (
            one.method,
            number(one.width_decades, ".2f"),
            "at least" if one.width_open else "exactly" if one.width_decades is not None else "-",
        )
        for one in found.methods
    ]
    header = ("method", "decades", "which is")
    yield table(f"Width of the rates within {100 * found.within:g} % of the best validation loss", header, rows)
    trials: list[tuple[Cell, ...]] = [
        (
            one.method,
            f"{rate.learning_rate:g}",
            number(rate.mean, ".4f"),
            number(len(rate.losses)),
            number(rate.failed),
        )
        for one in found.methods
        for rate in one.rates
    ]
    yield table("Trials by learning rate", ("method", "learning rate", "mean loss", "ended well", "failed"), trials)


def _seeds(found: Summary, comparison: Comparison) -> Iterator[Block]:
    groups = {
        one.method: [(float(seed), value) for seed, value in one.by_seed.items()]
        for one in found.methods
        if one.by_seed
    }
    if groups:
        alt = "The mean of each final run: " + "; ".join(
            f"{name} from {min(v for _, v in points):.4f} to {max(v for _, v in points):.4f}"
            for name, points in groups.items()
        )
        yield scatter_figure("Final runs by seed", f"{alt}.", groups, x="seed", y=_unit(found))
    failed: list[tuple[Cell, ...]] = [
        (final.method, str(final.seed), final.failed)
        for final in comparison.finals
        if final.failed is not None and final.started
    ]
    failed += [
        (trial.method, f"{trial.seed} (tuning, rate {trial.learning_rate:g})", trial.failed)
        for trial in comparison.trials
        if trial.failed is not None
    ]
    if failed:
        yield table("Runs that failed", ("method", "seed", "why"), failed)


def _tuning(found: Summary, comparison: Comparison) -> Iterator[Block]:
    lines = {
        one.method: [(float(place), value) for place, value in enumerate(one.expected_best, start=1)]
        for one in found.methods
    }
    if any(lines.values()):
        alt = "Expected best validation loss against the number of trials. " + " ".join(
            f"{name}: {points[0][1]:.4f} after one, {points[-1][1]:.4f} after {len(points)}."
            for name, points in lines.items()
            if points
        )
        title = "Expected best validation loss over trials (Dodge et al. 2019)"
        yield lines_figure(title, alt, lines, x="trials", y="nats a token")
    rows: list[tuple[Cell, ...]] = [
        (
            trial.method, f"{trial.learning_rate:g}", str(trial.seed), _settings(trial.settings),
            number(trial.validation_loss, ".6g"), number(trial.seconds, ".4g"), number(trial.steps),
        )
        for trial in comparison.trials
    ]  # fmt: skip
    header = ("method", "learning rate", "seed", "settings", "validation loss", "seconds", "steps")
    if rows:
        yield table("Every trial", header, rows)


def _settings(settings: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "-"


def _forgetting(found: Summary) -> Iterator[Block]:
    rows: list[tuple[Cell, ...]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for one in found.methods:
        if one.forgotten is not None:
            lost = one.forgotten
            rows.append(
                (
                    one.method,
                    number(one.gain, "+.4f"),
                    number(lost.loss_change, "+.4f"),
                    number(lost.kl_forward),
                    number(lost.kl_reverse),
                )
            )
            if one.gain is not None:
                points[one.method] = [(one.gain, lost.loss_change)]
    if not rows:
        yield Text("Not measured: data.general_test names general rows.")
        return
    if points:
        alt = "What each method gains on the test rows, and what its loss on general rows rises by."
        yield scatter_figure(
            "Forgetting against gain", alt, points, x=f"gain ({_unit(found)})", y="rise of the general loss"
        )
    header = ("method", "gain", "rise of the general loss", "KL(base || tuned)", "KL(tuned || base)")
    yield table("General rows, mean over seeds", header, rows)


def _costs(found: Summary) -> Iterator[Block]:
    points = {
        one.method: [(one.seconds_per_step, one.gain)]
        for one in found.methods
        if one.seconds_per_step is not None and one.gain is not None
    }
    if points:
        alt = "Gain over seconds a step, a point for each method."
        yield scatter_figure("Gain against time", alt, points, x="seconds a step", y=f"gain ({_unit(found)})")
    rows: list[tuple[Cell, ...]] = [
        (
            one.method, number(one.gain, "+.4f"), number(one.seconds_per_step), of_bytes(one.peak_memory),
            of_bytes(one.adapter_bytes), number(one.trained_parameters, ",.0f"), number(one.start_seconds),
        )
        for one in found.methods
    ]  # fmt: skip
    header = ("method", "gain", "seconds a step", "peak memory", "adapter file", "trained parameters", "start, seconds")
    yield table("Cost, median over final runs", header, rows)


def _convergence(found: Summary, comparison: Comparison) -> Iterator[Block]:
    if found.target_loss is None:
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in found.methods:
        first = next((f for f in comparison.finals if f.method == one.method and f.failed is None and f.curve), None)
        if first is not None:
            lines[f"{one.method}, seed {first.seed}"] = [(float(step), loss) for step, loss in first.curve]
    alt = "Training loss over steps of each method's first final run."
    yield lines_figure("Training loss", alt, lines, x="optimizer step", y="nats a token")
    rows: list[tuple[Cell, ...]] = [
        (one.method, number(one.steps_to_loss, ".4g"), number(one.unreached)) for one in found.methods
    ]
    header = ("method", "steps", "runs that do not reach it")
    yield table(f"Steps to a training loss of {found.target_loss:.4f}, median over final runs", header, rows)
