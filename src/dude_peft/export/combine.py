"""How the changes W' - W0 of several adapters become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from dude_peft.errors import ConfigError
from dude_peft.tuner.config import closest

KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True)
class Combination:
    """A way to combine changes: a weighted sum, or one of PEFT's that drop some entries first.

    Args:
        kind: linear, ties, dare_linear, dare_ties or magnitude_prune (peft.utils.merge_utils).
        density: share of the entries that is kept, above 0 up to 1; not for linear.
        seed: of the entries that dare_* drops.
    """

    kind: str = "linear"
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"combination '{self.kind}' is unknown; {closest(self.kind, KINDS)}")
        if self.by_rows and self.density is not None:
            raise ConfigError("density goes with ties, dare_linear, dare_ties and magnitude_prune, not with linear")
        if not self.by_rows and not 0 < (self.density or 0) <= 1:
            raise ConfigError(f"combination {self.kind} needs a density above 0 up to 1, 0.5 is usual")

    @property
    def by_rows(self) -> bool:
        """Whether rows of a weight may be combined one by one."""
        return self.kind == "linear"

    def of(self, deltas: list[Tensor], weights: list[float]) -> Tensor:
        """The combined change, (out, in) as each of them."""
        if self.by_rows:
            total = deltas[0].mul_(weights[0])
            for delta, weight in zip(deltas[1:], weights[1:], strict=True):
                total.add_(delta, alpha=weight)
            return total
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            combined: Tensor = getattr(merge_utils, self.kind)(deltas, torch.tensor(weights), self.density)
        return combined
