"""`train.curriculum`: which rows are trained on in which stage, from how difficult each of them is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dude_peft.artifact.json_text import json_text
from dude_peft.config.schema import CurriculumSection, DropSection
from dude_peft.errors import DataError

_SOLVED, _HOPELESS = "solved", "hopeless"


@dataclass(frozen=True)
class Stage:
    """Rows that are trained on together."""

    rows: NDArray[np.int64]
    """Numbers of their examples, ascending."""
    least: float
    """Of their pass rates, or lengths."""
    most: float
    mean: float


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run."""

    settings: CurriculumSection
    values: NDArray[np.float64]
    """Of every example its pass rate, or its tokens."""
    stages: tuple[Stage, ...]
    """From easy to hard."""
    dropped: dict[str, int]
    """Rows that are not trained on, as they are `solved` or `hopeless`."""

    @property
    def sizes(self) -> list[int]:
        """Rows of each stage."""
        return [len(stage.rows) for stage in self.stages]

    def text(self, place_of: Callable[[int], str]) -> str:
        """curriculum.jsonl: of each row, in the order of the data, its pass rate or tokens, and its stage from 1.

        A row that is not trained on has the stage null.
        """
        of: dict[int, int] = {row: n for n, stage in enumerate(self.stages, 1) for row in stage.rows.tolist()}
        each = enumerate(self.values.tolist())
        lines = ({"row": place_of(row), self.settings.by: value, "stage": of.get(row)} for row, value in each)
        return "".join(json_text(line, ensure_ascii=False) + "\n" for line in lines)

    def told(self, bounds: Sequence[int] | None = None) -> list[str]:
        """A line for each stage, and one for what is left out.

        Args:
            bounds: the last step of each stage, where they are known.
        """
        lines = []
        rates = self.settings.by == "pass_rate"
        for number, stage in enumerate(self.stages, 1):
            steps = ""
            if bounds is not None:
                first = bounds[number - 2] + 1 if number > 1 else 1
                steps = f"; steps {first:,} to {bounds[number - 1]:,}"
            span = (
                f"pass rates {stage.most:.3g} to {stage.least:.3g}, mean {stage.mean:.3f}"
                if rates
                else f"{stage.least:.0f} to {stage.most:.0f} tokens, mean {stage.mean:.1f}"
            )
            rows = "1 row" if len(stage.rows) == 1 else f"{len(stage.rows):,} rows"
            lines.append(f"stage {number} of {len(self.stages)}: {rows}, {span}{steps}")
        left_out = [f"{count:,} {name}" for name, count in self.dropped.items() if count]
        if left_out:
            lines.append(f"not trained on, of {len(self.values):,} rows: {', '.join(left_out)}")
        return lines

    def record(self, bounds: Sequence[int] | None = None) -> dict[str, Any]:
        """What report.json says."""
        found: dict[str, Any] = {"by": self.settings.by, "rows": len(self.values), "mean": float(self.values.mean())}
        if self.settings.by == "pass_rate":
            found |= {"samples": self.settings.samples, "dropped": dict(self.dropped)}
        stages: list[dict[str, Any]] = []
        for number, stage in enumerate(self.stages):
            own: dict[str, Any] = {
                "rows": len(stage.rows),
                "least": stage.least,
                "most": stage.most,
                "mean": stage.mean,
            }
            if bounds is not None:
                own |= {"first_step": bounds[number - 1] + 1 if number else 1, "last_step": bounds[number]}
            stages.append(own)
        return found | {"stages": stages}


def staged(settings: CurriculumSection, values: NDArray[np.float64]) -> Curriculum:
    """Puts rows into stages.

    Args:
        settings: completed (`CurriculumSection.completed`).
        values: of every example its pass rate, or its tokens.

    Raises:
        DataError: no row is left, or a stage has none.
    """
    rates = settings.by == "pass_rate"
    drop = settings.drop or DropSection()
    nothing = np.zeros(len(values), bool)
    solved = values >= drop.solved if drop.solved is not None else nothing
    hopeless = values <= drop.hopeless if drop.hopeless is not None else nothing
    kept = np.flatnonzero(~(solved | hopeless))
    dropped = {_SOLVED: int(solved.sum()), _HOPELESS: int(hopeless.sum())} if rates else {}
    if not len(kept):
        raise DataError(
            f"train.curriculum: no row is left to train on: of {len(values):,} the base model solves "
            f"{dropped[_SOLVED]:,} and fails at {dropped[_HOPELESS]:,}; write other bounds into train.curriculum.drop "
            "({} keeps all), or take other rows"
        )
    difficulty = -values if rates else values
    order = kept[np.argsort(difficulty[kept], kind="stable")]
    if isinstance(settings.stages, int):
        parts = np.array_split(order, settings.stages)
    else:
        limits = [-bound if rates else bound for bound in settings.stages]
        of = np.searchsorted(limits, difficulty[order], side="left")
        parts = [order[of == number] for number in range(len(limits))]
    empty = [number for number, part in enumerate(parts, 1) if not len(part)]
    if empty:
        raise DataError(
            f"train.curriculum: stage {empty[0]} of {len(parts)} has no row; the {len(kept):,} rows to train on have "
            f"{_spread(values[kept], rates)}; write other bounds into train.curriculum.stages, or take more rows"
        )
    stages = tuple(
        Stage(np.sort(part), float(values[part].min()), float(values[part].max()), float(values[part].mean()))
        for part in parts
    )
    return Curriculum(settings, values, stages, dropped)


def values_in(text: str, settings: CurriculumSection) -> NDArray[np.float64]:
    """What curriculum.jsonl says of each row."""
    return np.array([json.loads(line)[settings.by] for line in text.splitlines()], np.float64)


def sha256_of(text: str) -> str:
    """Of curriculum.jsonl."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _spread(values: NDArray[np.float64], rates: bool) -> str:
    """A few quantiles, in words."""
    low, middle, high = (float(np.percentile(values, part, method="nearest")) for part in (0, 50, 100))
    if rates:
        return f"pass rates from {high:.3g} to {low:.3g}, median {middle:.3g}"
    return f"{low:.0f} to {high:.0f} tokens, median {middle:.0f}"
