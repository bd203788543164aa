"""What an evaluation found, as results.json holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dude_peft.artifact.json_text import json_text, with_nulls
from dude_peft.evaluation.forgetting import TextScore
from dude_peft.evaluation.second_opinion import Disagreement
from dude_peft.measure.intervals import Comparison
from dude_peft.terminal.html import table

RESULTS, SAMPLES, ANSWERS, TASKS = "results.json", "samples", "answers", "tasks"


@dataclass(frozen=True)
class Value:
    """One model's number."""

    value: float
    interval: tuple[float, float] | None
    """95 %: Wilson for a share of right answers, bootstrap over items for other means; None for what is no mean."""


@dataclass(frozen=True)
class Measure:
    """One metric of one task, read through one of its filters."""

    task: str
    """As it was asked for, or `mmlu/stem` and `mmlu_anatomy` for a part."""
    metric: str
    filter: str
    items: int
    of: int
    """Items that the task has; where `items` is less they are a seeded sample, stratified by subject."""
    model: Value
    base: Value | None
    """The same model without its adapter, on the same items; None for a plain model."""
    comparison: Comparison | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Counts:
    """What a reader should know before believing a number: items of each name that was asked for."""

    cut_prompts: dict[str, int]
    """Whose prompt is longer than the model reads: its beginning was cut off."""
    unstopped: dict[str, int]
    """Whose generation the limit of tokens ended."""
    empty: dict[str, int]
    """Whose generation has no text."""


@dataclass(frozen=True)
class Evaluation:
    """The content of results.json."""

    model: str
    adapted: bool
    merged: bool
    """Whether the adapter ran merged into its base, which was compared first."""
    measures: list[Measure]
    parts: list[Measure]
    """Of tasks that have several: by group, by subject."""
    text: TextScore | None
    counts: dict[str, Counts]
    """`model` and `base`."""
    second_opinion: dict[str, list[Disagreement]] | None
    """math-verify against the harness, by task; None where it is not installed or nothing is GSM8K's."""
    provenance: dict[str, Any]

    def _repr_html_(self) -> str:
        return table(f"{self.model}: 95 % intervals", facts_of(self))

    def text_of(self) -> str:
        """As JSON; null stands where a metric has no number."""
        return json_text(with_nulls(asdict(self))[0], indent=2, ensure_ascii=False) + "\n"


def facts_of(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Scores and differences, each a name and a line; subjects are in results.json alone."""
    rows = [*evaluation.measures, *(part for part in evaluation.parts if "/" in part.task)]
    facts = [(_name(measure), _line(measure)) for measure in rows]
    if evaluation.text is not None:
        facts += _text(evaluation.text)
    elif evaluation.adapted:
        facts.append(("forgetting on general text", "not measured; give a text with --text"))
    return facts


def _name(measure: Measure) -> str:
    kept = "" if measure.filter == "none" else f" ({measure.filter})"
    return f"{measure.task} {measure.metric}{kept}"


def _line(measure: Measure) -> str:
    items = f"{measure.items:,} items"
    if measure.items < measure.of:
        items = f"a sample of {measure.items:,} of {measure.of:,} items"
    if measure.base is None:
        return f"{_number(measure.model)}; {items}"
    compared = f"; {_difference(measure.comparison)}" if measure.comparison is not None else ""
    return f"{_number(measure.model)}, base {_number(measure.base)}{compared}; {items}"


def _number(value: Value) -> str:
    if value.interval is None:
        return f"{value.value:.4f}"
    low, high = value.interval
    if low >= 0 and high <= 1 and value.value <= 1:
        return f"{value.value:.1%} ({low:.1%} to {high:.1%})"
    return f"{value.value:.4f} ({low:.4f} to {high:.4f})"


def _difference(comparison: Comparison, scale: float = 100) -> str:
    unit = " points" if scale == 100 else " nats"
    digits = 1 if scale == 100 else 4
    known = []
    if comparison.interval is not None:
        low, high = comparison.interval
        known.append(f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}")
    if comparison.p_value is not None:
        known.append(f"McNemar p = {comparison.p_value:.2g}")
    return (
        f"difference {scale * comparison.difference:+.{digits}f}{unit} ({', '.join(known) or 'one item'}): "
        f"{comparison.verdict}; {comparison.wins} won, {comparison.losses} lost, {comparison.ties} tied"
    )


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


def _text(text: TextScore) -> list[tuple[str, str]]:
    loss = f"{text.loss:.4f} nats a token{_between(text.interval)}, perplexity {text.perplexity:.2f}"
    tokens = f"{text.tokens:,} tokens of {text.file}"
    if text.base_loss is None or text.comparison is None or text.kl_tuned_base is None:
        return [("general text, loss", f"{loss}; {tokens}")]
    base = f"base {text.base_loss:.4f}, perplexity {text.base_perplexity:.2f}"
    moved = f"{text.kl_tuned_base:.4f} nats a token{_between(text.kl_tuned_base_interval)}"
    lost = f"{text.kl_base_tuned:.4f} nats a token{_between(text.kl_base_tuned_interval)}"
    return [
        ("forgetting, loss on general text", f"{loss}; {base}; {_difference(text.comparison, 1)}; {tokens}"),
        ("forgetting, KL(tuned || base) there", moved),
        ("forgetting, KL(base || tuned) there", lost),
    ]
