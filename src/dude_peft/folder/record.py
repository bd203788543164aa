"""What a run records: scores, answers, the report; and the names of the files in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.artifact.sealed import read_sealed
from dude_peft.errors import ArtifactError
from dude_peft.show import shown
from dude_peft.terminal.html import table

ADAPTER, CHECKPOINTS, RECOVERED, BEFORE = "adapter", "checkpoints", "recovered", "before.json"
SCORES = "scores"
CONFIG, METRICS, PICTURE, REPORT = "config.yaml", "metrics.jsonl", "loss.png", "report.json"
ROLLOUTS, STAGES = "rollouts.jsonl", "curriculum.jsonl"
RANKS = "ranks.png"
PAGE = "page.html"


@dataclass(frozen=True)
class Answer:
    """One held-out question and what the model made of it."""

    question: str
    expected: str
    text: str
    right: bool


@dataclass(frozen=True)
class Score:
    """A model's standing on the held-out rows."""

    loss: float
    """Mean cross-entropy of the answers' tokens, in nats."""
    right: int
    """Questions answered right."""
    rows: int
    """Questions asked."""
    interval: tuple[float, float]
    """95 % Wilson interval of right / rows."""
    answers: tuple[Answer, ...]
    """All of them, in the order of the rows."""
    losses: tuple[float, ...] = ()
    """Of each held-out row the mean loss of its answer's tokens; runs of older versions did not keep them."""
    tokens: tuple[int, ...] = ()
    """Of each held-out row the number of these tokens."""
    preference: dict[str, Any] | None = None
    """Of held-out pairs, beside their loss: `pairs`, `right` (those whose better answer has the larger reward), the
    95 % `interval` of that, and means over pairs in TRL's names; of labelled answers `answers` in place of `pairs`.
    `loss` and `losses` are then train.objective's."""
    rewards: dict[str, float] | None = None
    """Of `train.objective: grpo`: mean rewards of `answers`, `reward` and `rewards/NAME/mean`."""

    @property
    def watched(self) -> float:
        """What training is to change: the reward where there is one, else the loss."""
        return self.loss if self.rewards is None else self.rewards["reward"]

    @property
    def unit(self) -> str:
        """What the loss is measured in."""
        if self.preference is None:
            return "nats a token"
        return "preference loss an answer" if "answers" in self.preference else "preference loss a pair"


@dataclass(frozen=True, repr=False)
class RunReport:
    """Everything that is needed to judge a run and to repeat it; what report.json holds."""

    method: str
    seed: int
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    trainable_parameters: int
    total_parameters: int
    steps: int
    tokens: int
    """Tokens, padding aside, that went through training."""
    tokens_per_second: float
    before: Score | None
    after: Score | None
    seconds: dict[str, float]
    """Wall-clock time of each phase of the process that finished the run; `training` is that of all."""
    warnings: list[str]
    best_step: int | None = None
    """Step of the adapter that was kept, where evaluation.metric_for_best_model was measured on the way."""
    tasks: dict[str, Any] | None = None
    """What evaluation.tasks found, `measures` and `text`, as in scores/results.json."""
    files: dict[str, str] | None = None
    """sha256 of what else the run wrote beside its adapter, by name."""
    budget: dict[str, Any] | None = None
    """adapter.budget as the run was asked for it; `config` has the ranks that came of it."""
    curriculum: dict[str, Any] | None = None
    """Of train.curriculum: `stages`, each with its rows, its bounds, its mean and its steps, and what was left out."""
    adapter_seal: str | None = None
    """Hash of the adapter's manifest (`manifest.seal_of`), which tells it from others; older versions wrote none."""

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return Path(self.config["output_dir"]) / ADAPTER

    def scores(self) -> list[tuple[str, Score]]:
        """Those that were measured, `before` and `after`."""
        both = (("before", self.before), ("after", self.after))
        return [(when, score) for when, score in both if score is not None]

    def __repr__(self) -> str:
        losses = ", ".join(f"{when} {score.loss:.4f}" for when, score in self.scores()) or "not measured"
        return f"RunReport({self.method}, {self.steps} steps, loss {losses}, {self.adapter})"

    def _repr_html_(self) -> str:
        facts: list[tuple[object, ...]] = [
            ("method", self.method),
            ("steps", f"{self.steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("trained parameters", f"{self.trainable_parameters:,} of {self.total_parameters:,}"),
            ("adapter", self.adapter),
            *(("warning", text) for text in self.warnings),
        ]
        rows = [
            (
                when,
                f"{score.loss:.4f}",
                f"{score.right} of {score.rows}",
                " to ".join(f"{x:.1%}" for x in score.interval),
                *(() if score.preference is None else (f"{score.preference['rewards/accuracies']:.1%}",)),
            )
            for when, score in self.scores()
        ]
        unit, pairs = next(((s.unit, s.preference is not None) for _, s in self.scores()), ("", False))
        judged = "answers judged right" if unit.endswith("answer") else "pairs ranked right"
        header = ("held-out rows", f"loss, {unit}", "exact match", "95 % interval", *([judged] * pairs))
        return table("run", facts) + (table("result", rows, header) if rows else "")

    @classmethod
    def read(cls, path: Path) -> RunReport:
        """What `RunFolder.write_report` wrote.

        Raises:
            ArtifactError: it is damaged.
        """
        remedy = "restore it, or add --overwrite to start over"
        content = read_sealed(path, remedy)
        try:
            scores = {
                name: None if content[name] is None else score_from(content[name]) for name in ("before", "after")
            }
            return cls(**{**content, **scores})
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{shown(path, 300)} is damaged; {remedy}") from error


def score_from(content: dict[str, Any]) -> Score:
    """A Score from its JSON; KeyError, TypeError or ValueError where it is none."""
    answers = tuple(Answer(**answer) for answer in content["answers"])
    low, high = content["interval"]
    rows: dict[str, Any] = {name: tuple(content.get(name, ())) for name in ("losses", "tokens")}
    if preference := content.get("preference"):
        preference = {**preference, "interval": tuple(preference["interval"])}
    return Score(**{**content, "interval": (low, high), "answers": answers, **rows, "preference": preference})
