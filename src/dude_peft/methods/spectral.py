"""Spectral: LoRA, and a learned rescaling of the principal directions, no magnitude."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import SplitOptions, principal, uniform


def directions(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> DeltaStart:
    """Frozen `U` (out, r), `S = S_r / s` (r,), `V = V_r^T` (r, in) of the top-r SVD; `A` (r, in) starts as LoRA's, from
    the seed, and `B` (out, r) and `mu` (r,) are zero.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, and how many directions are rescaled; at most min(out, in).
        scaling: s > 0; it cancels in the rescaling.
        options: tolerance and seed of the SVD, and of A.

    Returns:
        DeltaStart.

    Raises:
        NumericsError: NaN or Inf in W0.

    Source: the idea of SpecLoRA, arXiv 2505.23099, whose formula is not public; this one is our own.
    """
    svd = principal(W0, r, options)
    A = uniform(svd.Vh, r, torch.Generator("cpu").manual_seed(options.svd_seed))
    trained = {"A": A, "B": svd.U.new_zeros(svd.U.shape), "mu": svd.S.new_zeros(r)}
    return DeltaStart({**trained, "U": svd.U, "S": svd.S / scaling, "V": svd.Vh}, svd.captured)


def rescaled_beside(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`L = [B, U S mu]`, `R = [A; V]`."""
    left = torch.cat([tensors["B"], tensors["U"] * (tensors["S"] * tensors["mu"])], dim=1)
    return left, torch.cat([tensors["A"], tensors["V"]])


SPECTRAL = Method(
    "spectral",
    None,
    frozen_start=False,
    magnitude="none",
    learning_rate=1e-3,
    delta=Delta(
        trained={"A": ("r", "in"), "B": ("out", "r"), "mu": ("r",)},
        frozen={"U": ("out", "r"), "S": ("r",), "V": ("r", "in")},
        start=directions,
        factors=rescaled_beside,
        multiple=2,
    ),
    summary="LoRA and a learned rescaling of the top r singular directions, no magnitude",
    choose="LoRA that can turn principal directions up and down",
    start="truncated SVD",
    paper="arXiv 2505.23099",
    certainty="inferred",
)
