"""The general change of a weight: s L R, its factors made anew in every forward out of small trained tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dude_peft.methods.sizes import Shapes
from dude_peft.methods.splits import SplitOptions


class DeltaStart(NamedTuple):
    """Where the tensors of one layer start."""

    tensors: dict[str, Tensor]
    """Every trained and every frozen one, by name."""
    captured: float | None = None
    """Share of ||W0||^2 that the frozen ones hold, where the singular values tell it."""


@dataclass(frozen=True)
class Delta:
    """How `V = W0 + s L R` follows from named tensors, L (out, k) and R (k, in), k a multiple of r.

    Autograd carries the gradients of L and R on to the trained ones. The layer, the files and everything behind them
    see L and R alone, as LoRA's B and A. Without a rank, L (out, in) is the whole change: R is the identity, and never
    formed.
    """

    trained: Shapes
    """Name -> sides, in the tensor's order."""
    frozen: Shapes
    """Likewise; they are stored, so that loading computes no decomposition and draws nothing."""
    start: Callable[[Tensor, int, float, SplitOptions], DeltaStart]
    """Pure function (W0 (out, in) in float32 or float64, r, scaling, options) -> DeltaStart."""
    factors: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor | None]]
    """Pure, differentiable function from all tensors to (L, R); at the start L R is exactly zero, so it is written in
    deviations, never as a difference of two products. R is None where it is the identity."""
    multiple: int = 1
    """k / r; 0 where there is no rank, because R is the identity."""
    step: str = ""
    """What making L and R takes, where it is more than a product with r columns."""

    def pair(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """L (out, k) and R (k, in), None for the identity, in float32 or better whatever autocast and dtypes are."""
        dtypes = [tensor.dtype for tensor in tensors.values()]
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        device = next(iter(tensors.values())).device
        with torch.autocast(device.type, enabled=False):
            return self.factors({name: tensor.to(wide) for name, tensor in tensors.items()})
