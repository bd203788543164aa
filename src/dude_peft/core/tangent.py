"""How much of a gradient low-rank factors can follow, rank by rank, without forming the gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def tangent_energy(left: Tensor, right: Tensor, inner: Tensor) -> Tensor:
    """Energy of a matrix G in the tangent space of the leading r singular triplets of a weight, for r = 0 .. k.

        E(r) = ||U_r^T G||^2 + ||G V_r||^2 - ||U_r^T G V_r||^2 = || P(G) ||^2
        P(G) = U_r U_r^T G + G V_r V_r^T - U_r U_r^T G V_r V_r^T

    P(G) is what B_0 dA + dB A_0 can become to first order, factors at the triplets' directions.

    Args:
        left: (k, in) U_k^T G.
        right: (out, k) G V_k.
        inner: (k, k) U_k^T G V_k.

    Returns:
        (k + 1,) float64, rising from 0.
    """
    left, right, inner = left.double(), right.double(), inner.double()
    both = inner.square().cumsum(dim=0).cumsum(dim=1).diagonal()
    energy = left.square().sum(dim=1).cumsum(dim=0) + right.square().sum(dim=0).cumsum(dim=0) - both
    return torch.cat([energy.new_zeros(1), energy])
