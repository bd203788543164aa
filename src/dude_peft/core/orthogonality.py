"""How far groups of factor pairs are from orthogonal to W0 and to each other, in sums of r-sized products."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def orthogonality(
    W0_dA: Tensor,
    W0_A0: Tensor | None,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """PEGO's two penalties on the delta weights s D_i of the groups, with squares instead of absolute values.

        to W0            sum_i    || W0 (s D_i)^T ||^2       = s^2 tr( (W0 R_i^T)^T (W0 R_i^T) L_i^T L_i )
        between groups   sum_{i<j} || (s D_i)(s D_j)^T ||^2  = s^4 tr( M^T L_i^T L_i M L_j^T L_j ),  M = R_i R_j^T

    D_i = L_i R_i with L_i = [dB, B0] and R_i = [A; dA] of the group's pairs. No (out, out) matrix is formed, and W0 is
    only applied to rows, as for the row norm. The paper's sum of absolute values is at most out times the root of each
    term, and zero where the term is.

    Args:
        W0_dA: (out, r) W0 dA^T, from `rows_product` or the frozen layer itself.
        W0_A0: (out, r) W0 A0^T; None with A0.
        dA: (r, in) deviation of A; A itself where the method has no frozen start.
        dB: (out, r) deviation of B, or B itself.
        A0: (r, in) frozen start.
        B0: (out, r) frozen start.
        scaling: s.
        groups: how many; the pairs fall into them in order, the first ones one larger where r is no multiple.

    Returns:
        Two scalars, to W0 and between groups, differentiable in W0_dA, dA and dB.

    Source: PEGO, arXiv 2407.15085; the sums over layers, groups and pairs are those of the authors' code.
    """
    parts = []
    for pairs in torch.arange(dA.shape[0], device=dA.device).tensor_split(groups):
        L, R, W0_R = dB[:, pairs], dA[pairs], W0_dA[:, pairs]
        if A0 is not None and B0 is not None and W0_A0 is not None:
            L = torch.cat([L, B0[:, pairs]], dim=1)
            R = torch.cat([A0[pairs] + R, R])
            W0_R = torch.cat([W0_A0[:, pairs] + W0_R, W0_R], dim=1)
        parts.append((L.T @ L, R, W0_R))
    base, between = dA.new_zeros(()), dA.new_zeros(())
    for LtL, _, W0_R in parts:
        base = base + (LtL * (W0_R.T @ W0_R)).sum()
    for (LtL, R, _), (other_LtL, other_R, _) in itertools.combinations(parts, 2):
        M = R @ other_R.T
        between = between + (M * (LtL @ M @ other_LtL)).sum()
    return scaling**2 * base, scaling**4 * between
