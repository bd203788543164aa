"""The ways to split a base weight that several methods share, and the balanced factors of a part of its SVD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dude_peft.core.svd import TopSVD, top_svd


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
    """Share of ||W0||^2 that s B A holds, where the singular values tell it."""


@dataclass(frozen=True)
class SplitOptions:
    """Settings of a split that are not the method's own."""

    svd_tol: float = 1e-3
    """Relative gain of captured energy at which the top-r SVD stops; 0 asks for a full SVD."""
    svd_seed: int = 0
    """Seed of the SVD's start block, of random directions, and of the random start where a singular value is zero."""
    overwrite: bool = False
    """Whether the split may use W0's memory as its own and leave other numbers there: a copy less of a large matrix."""


def principal_split(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split:
    """Principal factors `A = sqrt(S_r / s) V_r^T`, `B = U_r sqrt(S_r / s)` of the top-r SVD, so that s B A is W0's best
    rank-r part.

    Where W0 has fewer than r of them, the rest starts as LoRA does (`balanced`).

    Args:
        W0: (out, in) float32 or float64.
        r: rank, at most min(out, in).
        scaling: s > 0.
        options: tolerance and seed of the SVD.

    Returns:
        Split with both factors.

    Raises:
        NumericsError: NaN or Inf in W0.

    Source: PiSSA, arXiv 2404.02948, equations 2 and 3; DuDe section 3.
    """
    svd = principal(W0, r, options)
    return Split(*balanced(svd.U, svd.S, svd.Vh, scaling, options.svd_seed), svd.captured)


def principal(W0: Tensor, r: int, options: SplitOptions) -> TopSVD:
    """The top-r singular triplets of W0 as the options ask for them."""
    exact = options.svd_tol == 0
    tol = options.svd_tol or 1e-3
    return top_svd(W0, r, tol=tol, seed=options.svd_seed, exact=exact, overwrite=options.overwrite)


def balanced(U: Tensor, S: Tensor, Vh: Tensor, scaling: float, seed: int) -> tuple[Tensor, Tensor]:
    """Factors `A = sqrt(S / s) Vh`, `B = U sqrt(S / s)`, so that s B A = U diag(S) Vh.

    A pair of factors of a zero singular value would be zero, and with it both gradients for ever. It starts as LoRA
    does instead, with a random A (seeded) and B = 0: the product stays what it was.

    Args:
        U: (out, r) orthonormal columns.
        S: (r,) at least 0.
        Vh: (r, in) orthonormal rows.
        scaling: s > 0.
        seed: of the random rows.

    Returns:
        A (r, in) and B (out, r).

    Source: PiSSA, arXiv 2404.02948, equations 2 and 3.
    """
    root = (S / scaling).sqrt()
    A, B = root[:, None] * Vh, U * root
    absent = S == 0
    if bool(absent.any()):
        drawn = uniform(Vh, len(S), torch.Generator("cpu").manual_seed(seed))
        A = torch.where(absent[:, None], drawn, A)
        B = torch.where(absent, 0.0, B)
    return A, B


def zero_split(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split:
    """LoRA's start: A uniform in +-1/sqrt(in) from torch's global generator, B = 0.

    Args:
        W0: (out, in); only its shape, dtype and device are used.
        r: rank.
        scaling: unused, part of the common signature.
        options: unused likewise.

    Returns:
        Split with A alone.

    Source: LoRA, arXiv 2106.09685, section 4.1; the bound is that of the reference implementation and of PEFT.
    """
    return Split(uniform(W0, r, None), None)


def uniform(like: Tensor, r: int, generator: torch.Generator | None) -> Tensor:
    """(r, in) uniform within 1/sqrt(in), in being the columns of `like`; None draws from torch's global generator."""
    bound = 1 / math.sqrt(max(1, like.shape[1]))
    # Drawn in float32 on the CPU, so that a seed gives the same start on every device.
    A = torch.empty(r, like.shape[1], dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    return A.to(like)
