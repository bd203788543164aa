"""Which rows each `train.objective` learns from: answers, or pairs of answers of which one is better."""

from __future__ import annotations

from typing import Literal

Kind = Literal["answers", "pairs"]
"""What a row holds to learn: its answers, or two answers to the same question."""

KINDS: dict[str, Kind] = {"sft": "answers", "mol": "answers", "dpo": "pairs", "orpo": "pairs", "cpo": "pairs"}
"""By objective."""


def objectives_for(kind: Kind) -> str:
    """The objectives that rows of a kind fit, as a setting: `train.objective: dpo`."""
    return f"train.objective: {', '.join(name for name, fits in KINDS.items() if fits == kind)}"
