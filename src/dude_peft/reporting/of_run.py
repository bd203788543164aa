"""The page of a run: what training changed, by how much, at what cost, and everything to repeat it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from dude_peft.artifact.manifest import WEIGHTS_FILE, seal_of
from dude_peft.artifact.sealed import file_sha256
from dude_peft.config.schema import RunConfig
from dude_peft.doors import open_file, parse_json, read_file
from dude_peft.errors import ArtifactError
from dude_peft.folder.record import ADAPTER, METRICS, REPORT, ROLLOUTS, STAGES, RunReport, Score
from dude_peft.measure.base_weights import WeightOf
from dude_peft.measure.intervals import Comparison, compare
from dude_peft.reporting.adapted import Adapted, AdaptedLayer, adapted
from dude_peft.reporting.curves import lines_figure, map_figure, scatter_figure
from dude_peft.reporting.document import (
    Block,
    Cell,
    Commands,
    Document,
    Figure,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    facts,
    interval,
    number,
    of_bytes,
    share,
    table,
)
from dude_peft.show import shown
from dude_peft.terminal.next_steps import word
from dude_peft.training.next_commands import next_commands

_MOST_SAMPLES = 12
_ANSWERS_SHOWN = 8
_END_BYTES = 1 << 20
_LARGEST_METRICS_BYTES = 256 << 20


def document_of_run(folder: Path, weight_of: WeightOf | None = None) -> Document:
    """Everything that a finished run's folder tells.

    Args:
        folder: of the run.
        weight_of: the base weights, where they are in memory.

    Raises:
        ArtifactError: the report, the metrics or the adapter are damaged.
    """
    report = RunReport.read(folder / REPORT)
    metrics = list(_metrics(folder, report))
    layers = adapted(folder / ADAPTER, report.config.get("model", {}).get("gguf_file"), weight_of)
    if report.adapter_seal is not None and seal_of(folder / ADAPTER) != report.adapter_seal:
        raise ArtifactError(
            f"{shown(folder / ADAPTER, 300)} is not the adapter that {REPORT} is about; restore it, or run dude train "
            "--overwrite again"
        )
    unit = next((score.unit for _, score in report.scores()), "nats a token")
    name = f"{report.method} on {report.model.get('name_or_path', 'a model')}"
    sections = [
        Section("Before and after", tuple(_before_after(report))),
        Section("Answers side by side", tuple(_samples(report))),
        Section("Training", tuple(_curves(metrics, unit))),
        Section("Curriculum", tuple(_stages(report))),
        Section("Answers in training", tuple(_rollouts(folder, report))),
        Section("What moved in the weights", tuple(_moved(layers))),
        Section("What was forgotten", tuple(_forgotten(report, metrics))),
        Section("Cost", (_cost(report, metrics, folder),)),
        Section("Data", (facts("Rows, tokens and their fingerprints", report.data),)),
        Section("Settings", (facts("The whole configuration", report.config),)),
        Section(
            "Environment", (facts("Versions and machine", {"versions": report.versions, "hardware": report.hardware}),)
        ),
        Section("What comes next", tuple(_next(report, folder))),
    ]
    return Document(f"A run: {name}", tuple(_answer(report)), tuple(section for section in sections if section.blocks))


def _answer(report: RunReport) -> Iterator[str]:
    before, after = report.before, report.after
    if before is None or after is None:
        yield "Nothing was measured before and after training, so this run does not tell what it brought."
    else:
        way = "fell" if after.loss < before.loss else "did not fall"
        yield f"The held-out loss {way}: {before.loss:.4f} before training, {after.loss:.4f} after, in {after.unit}."
        if after.preference and "answers" in after.preference:
            found = after.preference
            low, high = found["interval"]
            yield (
                f"Training moved the reward of {found['right']} of {found['answers']} held-out answers to the side of "
                f"their label ({100 * low:.1f} to {100 * high:.1f} %, 95 %)."
            )
        elif after.preference:
            pairs = after.preference
            low, high = pairs["interval"]
            yield (
                f"Training raised the reward of the chosen answer above the rejected one's in {pairs['right']} of "
                f"{pairs['pairs']} held-out pairs ({100 * low:.1f} to {100 * high:.1f} %, 95 %); the mean margin is "
                f"{pairs['rewards/margins']:.3f}."
            )
        if before.rewards and after.rewards:
            yield (
                f"The mean reward of the likeliest answers to {after.rows} held-out questions is "
                f"{before.rewards['reward']:.3f} before training, {after.rewards['reward']:.3f} after."
            )
        if after.rows:
            compared = _compared(before, after)
            yield (
                f"The tuned model answers {after.right} of {after.rows} held-out questions right, the base model "
                f"{before.right}: {compared.verdict}{_p(compared)}."
            )
        else:
            yield "No questions were asked, so this run does not tell how many answers are right."
    yield f"It is one run with one seed ({report.seed}): it tells of this adapter, not of the method."
    for text in report.warnings:
        yield f"Warning: {text}"


def _compared(before: Score, after: Score) -> Comparison:
    return compare([float(one.right) for one in after.answers], [float(one.right) for one in before.answers])


def _p(found: Comparison) -> str:
    return "" if found.p_value is None else f" (McNemar's exact test, p = {found.p_value:.2g})"


def _before_after(report: RunReport) -> Iterator[Block]:
    rows: list[tuple[Cell, ...]] = []
    for when, score in report.scores():
        rows.append((when, number(score.loss, ".4f"), number(score.right), number(score.rows),
                     *interval(score.interval if score.rows else None, ".1f", 100, " %")))  # fmt: skip
    if rows:
        header = ("when", f"loss, {report.scores()[0][1].unit}", "right", "questions", "95 % from", "to")
        yield table("Held-out rows", header, rows)
    yield from _pairs(report)
    rewarded = [(when, score.rewards) for when, score in report.scores() if score.rewards]
    if rewarded:
        names = list(rewarded[0][1])
        means: list[tuple[Cell, ...]] = [
            (when, *(number(found.get(name), ".4f") for name in names)) for when, found in rewarded
        ]
        yield table("Rewards of held-out answers", ("when", *names), means)
    if report.before and report.after and report.after.rows:
        found = _compared(report.before, report.after)
        yield Table(
            "Share of right answers, after minus before, on the same questions",
            ("what", "difference", "95 % from", "to", "won", "lost", "tied"),
            (
                (
                    "after - before", share(found.difference), *interval(found.interval, "+.1f", 100, " %"),
                    number(found.wins), number(found.losses), number(found.ties),
                ),
            ),
        )  # fmt: skip
        yield Text("The loss is one number for all rows, so it has no interval.")
    for measure in (report.tasks or {}).get("measures", ()):
        yield facts(f"Task {measure.get('task', '')}", measure)


def _pairs(report: RunReport) -> Iterator[Block]:
    """What was measured of held-out pairs, or of answers with a label."""
    measured = [(when, score.preference) for when, score in report.scores() if score.preference]
    labelled = any("answers" in found for _, found in measured)
    what, right = ("answers", "reward on the label's side") if labelled else ("pairs", "chosen has the larger reward")
    names = [name for _, found in measured[:1] for name in found if name not in (what, "right", "interval")]
    rows: list[tuple[Cell, ...]] = [
        (
            when, number(found[what]), number(found["right"]), *interval(found["interval"], ".1f", 100, " %"),
            *(number(found.get(name), ".4f") for name in names),
        )
        for when, found in measured
    ]  # fmt: skip
    if rows:
        yield table(f"Held-out {what}", ("when", what, right, "95 % from", "to", *names), rows)


def _samples(report: RunReport) -> Iterator[Block]:
    if not (report.before and report.after and report.after.answers):
        return
    both = list(zip(report.before.answers, report.after.answers, strict=True))
    which = f"The first {_MOST_SAMPLES} of {len(both)}" if len(both) > _MOST_SAMPLES else f"All {len(both)}"
    yield Text(f"{which} questions, in the order of the rows.")
    yield Samples(
        "Base model and tuned model",
        tuple(
            Sample(
                old.question,
                old.expected,
                tuple(
                    (f"{when}: {'right' if a.right else 'wrong'}", a.text)
                    for when, a in (("before", old), ("after", new))
                ),
            )
            for old, new in both[:_MOST_SAMPLES]
        ),
    )


def _rollouts(folder: Path, report: RunReport) -> Iterator[Block]:
    """The first answers in training, and the last ones; the file may be too large to be read as a whole."""
    path = folder / ROLLOUTS
    if not path.is_file():
        return
    _check(path, report)
    with open_file(path) as file:
        head = file.read(_END_BYTES).splitlines()[:_ANSWERS_SHOWN]
        file.seek(max(file.seek(0, os.SEEK_END) - _END_BYTES, 0))
        tail = file.read().splitlines()[-_ANSWERS_SHOWN:]
    first = list(_parsed(head))
    rows: list[tuple[Cell, ...]] = [
        (
            number(line.get("step")), str(line.get("prompt")), str(line.get("completion")),
            number(line.get("reward"), ".3f"), number(line.get("advantage"), "+.3f"),
        )
        for line in (*first, *(line for line in _parsed(tail) if line not in first))
    ]  # fmt: skip
    yield table("The first answers and the last", ("step", "prompt", "answer", "reward", "advantage"), rows)
    yield Text(f"{ROLLOUTS} has all answers, with each of their rewards.")


def _stages(report: RunReport) -> Iterator[Block]:
    """The stages of train.curriculum, and what was left out."""
    found = report.curriculum
    if not found:
        return
    rates = found["by"] == "pass_rate"
    measure = "pass rate" if rates else "tokens"
    rows: list[tuple[Cell, ...]] = [
        (
            number(place), number(stage["rows"], ","), number(stage["least"], ".4g"), number(stage["most"], ".4g"),
            number(stage["mean"], ".4g"), number(stage["first_step"], ","), number(stage["last_step"], ","),
        )
        for place, stage in enumerate(found["stages"], 1)
    ]  # fmt: skip
    header = ("stage", "rows", f"least {measure}", f"most {measure}", f"mean {measure}", "first step", "last step")
    yield table("Stages, from easy to hard", header, rows)
    if rates:
        left_out = ", ".join(f"{count:,} {name}" for name, count in found["dropped"].items())
        yield Text(
            f"The base model gave {found['samples']} answers to each of {found['rows']:,} rows; the mean pass rate is "
            f"{found['mean']:.3f}. Not trained on: {left_out}."
        )
    yield Text(f"{STAGES} has the {measure} and the stage of every row.")


def _metrics(folder: Path, report: RunReport) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    path = folder / METRICS
    if not path.is_file():
        return
    _check(path, report)
    try:
        content = read_file(path, _LARGEST_METRICS_BYTES)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{shown(path, 300)} cannot be read ({shown(error)}); move it away") from error
    yield from _parsed(content.splitlines())


def _check(path: Path, report: RunReport) -> None:
    """Raises ArtifactError where a file is not what the run wrote."""
    wanted = (report.files or {}).get(path.name)
    if wanted is not None and file_sha256(path) != wanted:
        raise ArtifactError(f"{shown(path, 300)} is not what the run wrote; restore it, or move it away")


def _parsed(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """A line that cannot be read is left out, for it was so when the run ended."""
    for raw in lines:
        try:
            line = parse_json(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _series(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[key])) for line in metrics if isinstance(line.get(key), (int, float))]


def _curves(metrics: list[dict[str, Any]], unit: str) -> Iterator[Block]:
    losses = {"training": _series(metrics, "loss"), "held out": _series(metrics, "eval_loss")}
    losses["general"] = _series(metrics, "general_loss")
    if not losses["training"]:
        return
    first, last = losses["training"][0][1], losses["training"][-1][1]
    yield lines_figure(
        "Loss during training",
        f"The training loss goes from {first:.3f} to {last:.3f} over {losses['training'][-1][0]:,} steps.",
        losses,
        x="optimizer step",
        y=unit,
    )
    margins = {name: _series(metrics, f"rewards/{name}") for name in ("chosen", "rejected", "margins")}
    if margins["margins"]:
        last = margins["margins"][-1][1]
        alt = f"Mean rewards of the pairs of training; at the end the margin is {last:.3f}."
        yield lines_figure("Rewards of the pairs", alt, margins, x="optimizer step", y="reward")
    yield from _rewards(metrics)
    rates = _series(metrics, "learning_rate")
    if rates:
        yield lines_figure(
            "Learning rate",
            f"The learning rate: {max(rate for _, rate in rates):.2e} at its highest, {rates[-1][1]:.2e} at the end.",
            {"learning rate": rates},
            x="optimizer step",
            y="learning rate",
        )
    norms = _series(metrics, "grad_norm")
    if norms:
        alt = f"The gradient's norm: between {min(n for _, n in norms):.3g} and {max(n for _, n in norms):.3g}."
        yield lines_figure("Gradient norm", alt, {"gradient norm": norms}, x="optimizer step", y="norm", log_y=True)


_OF_ANSWERS = {
    "kl": ("KL to the base model", "nats a token"),
    "entropy": ("Entropy", "nats a token"),
    "completions/mean_length": ("Length of answers", "tokens"),
    "completions/clipped_ratio": ("Answers that did not end", "share"),
    "frac_reward_zero_std": ("Groups in which no reward differs", "share"),
}


def _rewards(metrics: list[dict[str, Any]]) -> Iterator[Block]:
    """What a model's own answers were like during training."""
    rewards = {"all": _series(metrics, "reward"), "held out": _series(metrics, "eval_reward")}
    if not rewards["all"]:
        return
    names = {name.split("/")[1] for line in metrics for name in line if name.startswith("rewards/")}
    rewards |= {name: _series(metrics, f"rewards/{name}/mean") for name in sorted(names)} if len(names) > 1 else {}
    alt = f"The mean reward goes from {rewards['all'][0][1]:.3f} to {rewards['all'][-1][1]:.3f}."
    yield lines_figure("Rewards during training", alt, rewards, x="optimizer step", y="mean reward")
    spread = {"reward": _series(metrics, "reward_std")}
    yield lines_figure("Spread of rewards", "Their standard deviation.", spread, x="optimizer step", y="reward")
    for key, (title, unit) in _OF_ANSWERS.items():
        if series := _series(metrics, key):
            alt = f"{title}: {series[0][1]:.3f} at the beginning, {series[-1][1]:.3f} at the end."
            yield lines_figure(title, alt, {title: series}, x="optimizer step", y=unit)


def _moved(found: Adapted) -> Iterator[Block]:
    layers = found.layers
    if not layers:
        yield Text(f"The layers are not shown: {found.problem}.")
        return
    if found.problem is not None:
        yield Text(f"The directions need the base model's weights: {found.problem}")
    for kind, words in (
        ("magnitude", "mean |m - m0| / m0 of the rows"),
        ("direction", "mean 1 - cos(V, W0) of the rows"),
    ):
        values = {
            (str(one.block), one.module): v
            for one in layers
            if (v := getattr(one, kind)) is not None and one.block is not None
        }
        if values:
            blocks = sorted({row for row, _ in values}, key=int)
            modules = list(dict.fromkeys(one.module for one in layers if (str(one.block), one.module) in values))
            most = max(values, key=lambda place: values[place])
            ends = f"between {min(values.values()):.2e} and {values[most]:.2e}"
            alt = f"{words}: {ends}, the most in block {most[0]}, {most[1]}."
            yield map_figure(f"How far the {kind} moved: {words}", alt, blocks, modules, values)
    yield from _correlation(layers)
    if layers and layers[0].start:
        yield _spectrum(layers)
    yield _layer_table(layers)


def _correlation(layers: tuple[AdaptedLayer, ...]) -> Iterator[Block]:
    """As the DoRA paper draws it, section 3.2: magnitude against direction, a point for each layer."""
    both = [(one.module, one.direction, one.magnitude) for one in layers]
    points = [(module, d, m) for module, d, m in both if d is not None and m is not None]
    if len(points) < 3 or len({d for _, d, _ in points}) < 2 or len({m for _, _, m in points}) < 2:
        return
    from scipy.stats import linregress

    line = linregress([d for _, d, _ in points], [m for _, _, m in points])
    groups: dict[str, list[tuple[float, float]]] = {}
    for module, d, m in points:
        groups.setdefault(module, []).append((d, m))
    yield scatter_figure(
        "Magnitude against direction",
        f"A point for each layer. The correlation is {line.rvalue:.2f} over {len(points)} layers.",
        groups,
        x="mean 1 - cos(V, W0)",
        y="mean |m - m0| / m0",
        trend=(float(line.slope), float(line.intercept)),
    )
    yield Text(
        f"The correlation of the two is {line.rvalue:+.2f} over {len(points)} layers. The DoRA paper (section 3.2) "
        "finds a negative one for full fine-tuning and DoRA, and a positive one for LoRA."
    )


def _spectrum(layers: tuple[AdaptedLayer, ...]) -> Figure:
    count = min(len(one.start) for one in layers)
    lines = {
        when: [(i + 1.0, fmean(getattr(one, part)[i] for one in layers)) for i in range(count)]
        for when, part in (("before", "start"), ("after", "end"), ("the change s D", "change"))
    }
    angles = [one.angle for one in layers if one.angle is not None]
    alt = (
        f"Singular values of s B A, mean over {len(layers)} layers, before and after, and of the whole change. The "
        f"rows of A turned by {fmean(angles):.2f} degrees at their largest principal angle, on average."
    )
    title = "Spectrum of the trained subspace, before and after"
    return lines_figure(title, alt, lines, x="place", y="singular value", log_y=True)


def _layer_table(layers: tuple[AdaptedLayer, ...]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            one.name, number(one.magnitude), number(one.direction), number(one.relative),
            number(max(one.change, default=None)), number(one.angle, ".3g"),
        )
        for one in layers
    ]  # fmt: skip
    header = ("layer", "magnitude", "direction", "||s D|| / ||W0||", "largest singular value of s D", "angle, degrees")
    return table("Every adapted layer", header, rows)


def _forgotten(report: RunReport, metrics: list[dict[str, Any]]) -> Iterator[Block]:
    measured = report.data.get("general_test", {}).get("measured") if isinstance(report.data, dict) else None
    text = (report.tasks or {}).get("text")
    if isinstance(measured, (dict, list)) and measured:
        yield facts("Held-out general rows", measured)
        lines = {name: _series(metrics, f"general_{name}") for name in ("kl_base_tuned", "kl_tuned_base")}
        if any(lines.values()):
            alt = "The two divergences from the base model on general rows, over the steps."
            yield lines_figure("Distance from the base model", alt, lines, x="optimizer step", y="nats a token")
    if text:
        yield facts("General text", text)
    if not measured and not text:
        yield Text("Not measured. data.general_test measures it in a run, and dude eval --text FILE for an adapter.")


def _cost(report: RunReport, metrics: list[dict[str, Any]], folder: Path) -> Table:
    weights = folder / ADAPTER / WEIGHTS_FILE
    rows: list[tuple[Cell, ...]] = [
        ("trained parameters", number(report.trainable_parameters, ",")),
        ("all parameters", number(report.total_parameters, ",")),
        ("adapter file", of_bytes(weights.stat().st_size if weights.is_file() else None)),
        ("peak memory in training", of_bytes(max((m for _, m in _series(metrics, "memory_bytes")), default=None))),
        ("optimizer steps", number(report.steps, ",")),
        ("tokens trained on", number(report.tokens, ",")),
        ("tokens a second in training", number(report.tokens_per_second, ",.1f")),
        *((f"seconds: {name}", number(value, ",.2f")) for name, value in report.seconds.items()),
    ]
    if report.best_step is not None:
        rows.append(("step of the adapter that was kept", number(report.best_step, ",")))
    return table("What it took", ("what", "value"), rows)


def _next(report: RunReport, folder: Path) -> Iterator[Block]:
    try:
        config = RunConfig.model_validate(report.config)
    except ValidationError:  # of another version
        return
    commands = next_commands(config, folder, report)
    if commands:
        yield Commands(tuple(f"dude {' '.join(map(word, words))}" for words in commands))
