"""Which rows each `train.objective` learns from: answers, pairs of which one is better, or answers with a label."""

from __future__ import annotations

from typing import Literal

Kind = Literal["answers", "pairs", "labels"]
"""What a row holds to learn: its answers, two answers to the same question, or an answer and whether it is wanted."""

KINDS: dict[str, Kind] = {
    "sft": "answers", "mol": "answers", "dpo": "pairs", "orpo": "pairs", "cpo": "pairs", "kto": "labels",
    "grpo": "answers",
}  # fmt: skip
"""By objective."""


def objectives_for(kind: Kind) -> str:
    """The objectives that rows of a kind fit, as a setting: `train.objective: dpo`."""
    return f"train.objective: {', '.join(name for name, fits in KINDS.items() if fits == kind)}"
