"""What a comparison found: every run of both stages, and what was done. comparison.json holds exactly this.

Stage 1 tunes: a `Trial` is one run, judged on the validation rows. Stage 2 tests: a `Final` is one run at the chosen
settings with a fresh seed, judged once on the test rows. A run that failed is a result, with its reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.sealed import read_sealed, sealed
from dude_peft.errors import ArtifactError, NumericsError, ResourceError
from dude_peft.show import shown
from dude_peft.terminal.html import table

NAME = "comparison.json"
FORMAT = 1

Curve = tuple[tuple[int, float], ...]
"""(step, loss) of each measurement."""


@dataclass(frozen=True)
class Trial:
    """One run of stage 1."""

    method: str
    """The contestant's name, one of `Comparison.methods`."""
    settings: dict[str, Any]
    """What differs between the trials of a contestant beside rate and seed: the values of the axes, by key."""
    learning_rate: float
    seed: int
    validation_loss: float | None
    """Mean loss of the answers' tokens, in nats; None where the run failed."""
    failed: str | None
    """Why it failed; None where it ended well."""
    seconds: float | None
    """Wall-clock time of training; None where the run failed."""
    steps: int | None
    """Optimizer steps; None where the run failed."""
    curve: Curve = ()
    """Validation loss on the way, where evaluation.eval_steps is set."""


@dataclass(frozen=True)
class Forgetting:
    """What training did to the general rows (data.general_test), in nats a token."""

    loss: float
    """Mean loss after training."""
    base_loss: float
    """The base model's."""
    kl_forward: float
    """KL(base || tuned)."""
    kl_reverse: float
    """KL(tuned || base)."""


@dataclass(frozen=True)
class Final:
    """One run of stage 2. Of a run that failed, everything behind `failed` is empty, None or 0."""

    method: str
    settings: dict[str, Any]
    learning_rate: float | None
    """None where no trial of the method ended well, so that there was no rate to choose."""
    seed: int
    losses: tuple[float, ...]
    """Of each test item the mean loss of its answer's tokens, in the order of `Comparison.items`."""
    tokens: tuple[int, ...]
    """Of each test item the number of these tokens."""
    right: tuple[bool, ...] | None
    """Of each question whether the answer was right, in the order of `Comparison.questions`; None without questions."""
    failed: str | None
    seconds_per_step: float | None = None
    peak_memory: int | None = None
    """Bytes: the GPU's, or the process's on a CPU."""
    adapter_bytes: int | None = None
    trained_parameters: int | None = None
    start_seconds: float | None = None
    """Seconds to make the adapter's start."""
    forgetting: Forgetting | None = None
    curve: Curve = ()
    """Training loss on the way."""

    @property
    def started(self) -> bool:
        """Whether there was a rate to choose, so that the run could begin."""
        return self.learning_rate is not None


@dataclass(frozen=True)
class Base:
    """The base model on the test items, before any training."""

    losses: tuple[float, ...]
    right: tuple[bool, ...] | None


@dataclass(frozen=True)
class Comparison:
    """What `dude compare` found."""

    name: str
    methods: tuple[str, ...]
    """The contestants, in the order of the grid."""
    primary: str
    """What decides: `loss`, or `right` for answers."""
    items: tuple[str, ...]
    """Where each test item comes from: `test.jsonl:12`."""
    questions: tuple[str, ...]
    """Where each question comes from that was answered and marked; the first rows of the test."""
    trials: tuple[Trial, ...]
    finals: tuple[Final, ...]
    base: Base | None
    """None until a run of stage 2 has ended well."""
    protocol: dict[str, Any]
    """What was done, by name, as plain values: learning rates, seeds, extensions, choices, whether it is complete."""
    not_tested: tuple[str, ...]
    """What nobody should conclude from this, one sentence each."""
    environment: dict[str, Any]
    data_hashes: dict[str, str]
    """sha256 of the tokens of each set: train, validation, test."""
    warnings: tuple[str, ...] = field(default=())
    """The most important first: one seed, a rate on the edge, runs that are missing."""
    format: int = FORMAT

    def write(self, folder: Path) -> Path:
        """Writes comparison.json whole, with its own hash."""
        path = folder / NAME
        replace_file(path, (json_text(sealed(asdict(self)), ensure_ascii=False) + "\n").encode("utf-8"))
        return path

    def check(self) -> None:
        """Raises NumericsError where every run diverged, ResourceError where every run failed, with a reason."""
        # A test run without a rate was never started.
        ended: list[Trial | Final] = [*self.trials, *(final for final in self.finals if final.started)]
        reasons = [one.failed for one in ended if one.failed is not None]
        if not reasons or len(reasons) < len(ended):
            return
        diverged = all(reason.startswith("diverged") for reason in reasons)
        raise (NumericsError if diverged else ResourceError)(
            f"all {len(ended)} runs of the comparison failed, so nothing was compared; the first: {reasons[0]}"
        )

    def _repr_html_(self) -> str:
        from dude_peft.comparison.standing import header, standings, summary_of

        summary = summary_of(self)
        said = [("", text) for text in summary.answer] + [("warning", text) for text in self.warnings]
        return table("comparison", standings(self, summary), header(self)) + table("", said)

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """What `write` wrote into a folder.

        Raises:
            ArtifactError: it is missing, damaged, or of another version.
        """
        path = folder / NAME
        content = read_sealed(path, "run dude compare again, it writes the file anew")
        if content.get("format") != FORMAT:
            raise ArtifactError(f"{shown(path, 300)} is of a version that this one does not read; compare anew")
        try:
            plain: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
            }
            plain["trials"] = tuple(map(_trial, content["trials"]))
            plain["finals"] = tuple(map(_final, content["finals"]))
            plain["base"] = None if content["base"] is None else _base(content["base"])
            return cls(**plain)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{shown(path, 300)} is damaged; run dude compare again, it writes it anew") from error


def _trial(content: dict[str, Any]) -> Trial:
    return Trial(**{**content, "curve": _curve(content["curve"])})


def _final(content: dict[str, Any]) -> Final:
    forgetting = content["forgetting"]
    return Final(
        **{
            **content,
            "losses": tuple(content["losses"]),
            "tokens": tuple(content["tokens"]),
            "right": None if content["right"] is None else tuple(content["right"]),
            "forgetting": None if forgetting is None else Forgetting(**forgetting),
            "curve": _curve(content["curve"]),
        }
    )


def _base(content: dict[str, Any]) -> Base:
    return Base(tuple(content["losses"]), None if content["right"] is None else tuple(content["right"]))


def _curve(points: list[list[Any]]) -> Curve:
    return tuple((int(step), float(loss)) for step, loss in points)
