"""What an evaluation found, as results.json holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

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
        from dude_peft.evaluation.table import facts_of

        return table(f"{self.model}: 95 % intervals", facts_of(self))

    def text_of(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
