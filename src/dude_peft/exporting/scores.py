"""Whether an exported reward model gives the scores of the live one, within what rounding explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dude_peft.errors import NumericsError

_BY_DTYPE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of scores, as a share of the largest score, that rounding in this dtype explains."""


@dataclass(frozen=True)
class ScoreDifference:
    """How far an export's scores are from the live adapter's, over all prompts."""

    score: float
    """Largest |difference of scores| / largest |score|."""
    largest_score: float
    prompts: int

    def check(self, dtypes: set[torch.dtype]) -> None:
        """Raises NumericsError where it is more than the roundings of these dtypes explain."""
        allowed = max([_BY_DTYPE[dtype] for dtype in dtypes if dtype in _BY_DTYPE] or [_BY_DTYPE[torch.float32]])
        if not self.score <= allowed:
            raise NumericsError(
                f"the export's scores differ from the live adapter's by up to {self.score:.1e} of the largest, more "
                f"than rounding can explain ({allowed:.1e}); choose a wider --dtype"
            )

    def summary(self) -> str:
        """One line for people."""
        return f"{self.prompts} prompts: largest difference of scores {self.score:.1e} of the largest score"


def compare_scores(live: dict[str, Tensor], export: dict[str, Tensor], count: int) -> ScoreDifference:
    """The difference between the scores `live.N` and `out.N`, (1,) each.

    Raises:
        NumericsError: one of them is NaN or Inf.
    """
    ours, theirs = (
        torch.cat([found[f"{name}.{n}"].flatten() for n in range(count)])
        for found, name in ((live, "live"), (export, "out"))
    )
    for scores, what in ((ours, "the live adapter itself"), (theirs, "the export")):
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(f"{what} gives a score that is NaN or Inf; use an earlier checkpoint, or float32")
    largest = float(ours.abs().max())
    return ScoreDifference(float((ours - theirs).abs().max()) / max(largest, 1e-30), largest, count)
