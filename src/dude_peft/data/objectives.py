"""Which rows each `train.objective` learns from: answers, pairs of which one is better, or answers with a label."""

from __future__ import annotations

from typing import Literal

Kind = Literal["answers", "pairs", "scores", "labels"]
"""What a row holds to learn: its answers, two answers to the same question, these two to be given a score each, or an
answer and whether it is wanted.
"""
PAIRED: tuple[Kind, ...] = ("pairs", "scores")
"""Rows of two answers. Those to be scored are read to the last token that the chat template writes, as whoever asks a
reward model will write them, and may say by how much the better answer wins (`margin`).
"""

KINDS: dict[str, Kind] = {
    "sft": "answers", "mol": "answers", "dpo": "pairs", "orpo": "pairs", "cpo": "pairs", "reward": "scores",
    "kto": "labels", "grpo": "answers",
}  # fmt: skip
"""By objective."""


def objectives_for(kind: Kind) -> str:
    """The objectives that rows of a kind fit, as a setting: `train.objective: dpo`."""
    alike = PAIRED if kind in PAIRED else (kind,)
    return f"train.objective: {', '.join(name for name, fits in KINDS.items() if fits in alike)}"
