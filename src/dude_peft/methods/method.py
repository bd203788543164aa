"""What a method is: data and one pure function.

Every method of the table is a point of (how W0 is split) x (is the magnitude trained) x (how alpha becomes the
scaling), and one layer runs them all. A new method is one file with one `Method` and one line in `__init__.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Split(NamedTuple):
    """Where the factors of one layer start.

    With a B, the pair (A, B) is frozen as (A0, B0) and the trained deviations start at zero. Without one, B starts at
    zero, nothing has to be taken out of W0, and A is the trained factor itself.
    """

    A: Tensor
    """(r, in) start of A, float32 or float64."""
    B: Tensor | None
    """(out, r) start of B, or None for zero."""
    captured: float | None = None
    """Share of ||W0||^2 that the top-r singular values hold, where an SVD was taken."""


@dataclass(frozen=True)
class SplitOptions:
    """Settings of a split that are not the method's own."""

    svd_tol: float = 1e-3
    """Relative gain of captured energy at which the top-r SVD stops; 0 asks for a full SVD."""
    svd_seed: int = 0
    """Seed of the SVD's start block, and of the random start of an all-zero weight."""
    overwrite: bool = False
    """Whether the split may use W0's memory as its own and leave other numbers there: a copy less of a large matrix."""


@dataclass(frozen=True)
class Method:
    """One adaptation method."""

    name: str
    split: Callable[[Tensor, int, float, SplitOptions], Split]
    """Pure function (W0 (out, in) in float32 or float64, r, scaling, options) -> Split."""
    principal: bool
    """True where the split takes principal factors: A0 and B0 are frozen, the deviations are trained."""
    magnitude: bool
    """True where the magnitude m is trained; otherwise the gain is 1."""
    learning_rate: float
    """Peak learning rate where a run leaves it open. Training the principal factors moves the weight further per unit
    of rate, so these methods peak lower: over thousands of steps on Qwen3-0.6B at r = 128, PiSSA is best at 2e-5 and
    LoRA at 2e-4 (arXiv 2602.04998). Methods are compared at each one's best rate, never at one rate for all."""
    rank_stabilized: bool = False
    """True for s = alpha / sqrt(r), False for s = alpha / r."""
    summary: str = ""
    """One line for people."""
    paper: str = ""

    def scaling(self, r: int, lora_alpha: float) -> float:
        """Scaling s of rank r and alpha."""
        return lora_alpha / (math.sqrt(r) if self.rank_stabilized else r)
