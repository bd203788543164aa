"""Benchmark tasks in a run: what it asks of whoever scores them, which is `dude eval`'s room, built on this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dude_peft.config.schema import EvaluationSection
from dude_peft.errors import ConfigError
from dude_peft.training.progress import Display


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    value: float
    higher_is_better: bool


class TaskScorer(Protocol):
    """Scores a run's model on `evaluation.tasks`; every process of the run makes the same calls."""

    def check(self, tokenizer: Any) -> None:
        """Everything that needs no weights, so that a mistake costs seconds.

        Raises:
            ConfigError: an unknown task, a missing package or chat template.
            DataError: data that is missing or malformed.
        """

    def score(self, model: Any, tokenizer: Any, folder: Path) -> Mapping[str, TaskScore]:
        """The model as it is, in the middle of training; keys are `TASK/METRIC,FILTER`, a task's main one first."""

    def finish(self, model: Any, tokenizer: Any, folder: Path, *, name: str, display: Display) -> dict[str, Any]:
        """The trained model beside its base: fills `folder`, shows the table; what of it report.json keeps."""


ScorerOf = Callable[[EvaluationSection, str], TaskScorer]
"""Of `evaluation`, and of `data.special_tokens`."""


def scorer_for(settings: EvaluationSection, special_tokens: str, scorer_of: ScorerOf | None) -> TaskScorer | None:
    """The scorer of a run; None where it asks for no task.

    Raises:
        ConfigError: the run asks for tasks, and its caller brought nobody who scores them.
    """
    if not settings.tasks and settings.tasks_text is None:
        return None
    if scorer_of is None:
        raise ConfigError(
            "evaluation.tasks: `run` needs a scorer: scorer_of=dude_peft.evaluation.in_training.TasksOfRun"
        )
    return scorer_of(settings, special_tokens)


def chosen_score(scores: Mapping[str, TaskScore], metric: str) -> float:
    """The score that `evaluation.metric_for_best_model` names, turned so that lower is better.

    Raises:
        ConfigError: there is none of that name.
    """
    found = scores.get(metric) or next((s for key, s in scores.items() if key.startswith(f"{metric}/")), None)
    if found is None:
        raise ConfigError(f"evaluation.metric_for_best_model: there is no {metric!r} among {', '.join(scores)}")
    return -found.value if found.higher_is_better else found.value
