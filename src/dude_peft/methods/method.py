"""What a method is: data and one pure function, or two.

Every method of the table is a point of (how W0 is split, or what makes the factors of its change) x (is there a
magnitude, is it trained) x (how alpha becomes the scaling), and one layer runs them all. A new method is one file with
one `Method` and one line in `__init__.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dude_peft.errors import ConfigError
from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.sizes import Shapes
from dude_peft.methods.splits import Split, SplitOptions


@dataclass(frozen=True)
class Method:
    """One adaptation method."""

    name: str
    split: Callable[[Tensor, int, float, SplitOptions], Split] | None
    """Pure function (W0 (out, in) in float32 or float64, r, scaling, options) -> Split; None with a delta."""
    frozen_start: bool
    """True where the split gives both factors: A0 and B0 are frozen, the deviations are trained."""
    magnitude: Literal["trained", "fixed", "none"]
    """trained: m is trained. fixed: every row keeps its norm, m = m0. none: rows have the norm they get, g = 1."""
    learning_rate: float
    """Peak learning rate where a run leaves it open. dude's is the best of a sweep on SmolLM2-135M; the others stand to
    it as their best rates do in a comparison of all methods on a small model (docs/methods.md). Training the principal
    factors moves the weight further per unit of rate, so these methods peak lower. Methods are compared at each one's
    best rate, never at one rate for all."""
    delta: Delta | None = None
    """What makes L and R, where these are not a pair of trained deviations."""
    rate_of: str = ""
    """The relative that the rate is taken from, until one is measured for this method; empty where it is its own."""
    rank_stabilized: bool = False
    """True for s = alpha / sqrt(r), False for s = alpha / r."""
    norm_gradient: Literal["exact"] | None = None
    """exact where the method is defined by it; None leaves it to the run, which takes the norm as a constant."""
    summary: str = ""
    """One line for people."""
    choose: str = ""
    """One line for people: when to take it."""
    start: Literal["none", "QR", "truncated SVD", "whole SVD"] = "none"
    """What its start takes of every weight."""
    paper: str = ""
    certainty: Literal["paper", "public code", "inferred", "control"] = "paper"
    """Where the formula comes from. A control is this project's own, to tell claims apart."""

    def __post_init__(self) -> None:
        if (self.split is None) == (self.delta is None):
            raise ValueError(f"method {self.name!r} needs a split or a delta, and not both")
        if self.normalised and not self.ranked:
            raise ValueError(f"method {self.name!r} has a magnitude, which needs a rank")

    def begin(self, W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split | DeltaStart:
        """Where a layer starts: its split, or the tensors of its delta."""
        if self.delta is not None:
            return self.delta.start(W0, r, scaling, options)
        assert self.split is not None
        return self.split(W0, r, scaling, options)

    @property
    def draws(self) -> bool:
        """Whether its start draws from torch's global generator."""
        return self.delta is None and not self.frozen_start

    @property
    def multiple(self) -> int:
        """How many times r the rank of the change is; 0 where there is no rank."""
        if self.delta is not None:
            return self.delta.multiple
        return 2 if self.frozen_start else 1

    @property
    def stackable(self) -> bool:
        """Whether it adapts stacks of experts (`target_parameters`); a delta is made for one matrix."""
        return self.delta is None

    @property
    def ranked(self) -> bool:
        """Whether the change has a rank, so that its files are a stock LoRA or DoRA; else it is a whole matrix."""
        return self.multiple > 0

    def size(self, *ranks: int) -> str:
        """How large it is at these ranks, for people: r = 4; r = 2 to 9 where layers differ."""
        if not self.ranked:
            return "no rank"
        return "r = " + " to ".join(str(rank) for rank in dict.fromkeys([min(ranks), max(ranks)]))

    @property
    def normalised(self) -> bool:
        """Whether the rows of V are normalised and carry a magnitude, trained or fixed."""
        return self.magnitude != "none"

    def scaling(self, r: int, lora_alpha: float) -> float:
        """Scaling s of rank r and alpha; 1 without a rank."""
        if not self.ranked:
            return 1.0
        return lora_alpha / (math.sqrt(r) if self.rank_stabilized else r)

    def gradient_through_norm(self, asked: str | None) -> Literal["detached", "exact"]:
        """How this method's gradient passes the row norm, where a run asks for `asked` or leaves it open.

        Raises:
            ConfigError: the run asks for what would be another method.
        """
        if asked not in (None, "detached", "exact"):
            raise ConfigError(f"norm_gradient={asked!r}; it is 'detached' or 'exact'")
        if self.norm_gradient is not None and asked == "detached":
            raise ConfigError(
                f"norm_gradient='detached' contradicts method {self.name!r}, which is defined by the exact one; leave "
                "norm_gradient out, or choose another method"
            )
        return "exact" if "exact" in (self.norm_gradient, asked) else "detached"

    @property
    def trained(self) -> Shapes:
        """What a layer trains."""
        deviations: Shapes = {"dA": ("r", "in"), "dB": ("r", "out")} if self.delta is None else self.delta.trained
        return {**deviations, "dm": ("out",)} if self.magnitude == "trained" else deviations

    @property
    def kept(self) -> Shapes:
        """What a layer keeps frozen beside: its start, the row norms, and what the changing norm follows from."""
        start: Shapes = {"A0": ("r", "in"), "B0": ("r", "out")} if self.frozen_start else {}
        product: Shapes = {"W0 A0^T": ("r", "out")} if self.frozen_start else {}
        start = start if self.delta is None else self.delta.frozen
        return {**start, "m0": ("out",), **product} if self.normalised else start

    @property
    def step(self) -> str:
        """What a training step computes beside the frozen layer."""
        if not self.ranked:
            return "a product with a matrix of W0's size"
        rank = "rank r" if self.multiple == 1 else f"rank {self.multiple}r"
        if self.delta is not None and self.delta.step:
            rank += f", {self.delta.step}"
        if not self.normalised:
            return rank
        through = ", and backward through it" if self.norm_gradient == "exact" else ""
        return f"{rank}; the row norm{through}"
