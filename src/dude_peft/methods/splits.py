"""The ways to split a base weight: its principal factors, or nothing at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dude_peft.core.svd import top_svd
from dude_peft.methods.method import Split, SplitOptions


def principal_split(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split:
    """Principal factors `A = sqrt(S_r / s) V_r^T`, `B = U_r sqrt(S_r / s)` of the top-r SVD, so that s B A is W0's best
    rank-r part.

    An all-zero W0 has none: its factors and with them every gradient would stay zero for ever, so it starts as LoRA
    does, with a random A (seeded) and B = 0.

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
    svd = top_svd(
        W0,
        r,
        tol=options.svd_tol or 1e-3,
        seed=options.svd_seed,
        exact=options.svd_tol == 0,
        overwrite=options.overwrite,
    )
    if svd.rank == 0:
        generator = torch.Generator("cpu").manual_seed(options.svd_seed)
        return Split(_uniform(W0, r, generator), W0.new_zeros(W0.shape[0], r), svd.captured)
    root = (svd.S / scaling).sqrt()
    return Split(root[:, None] * svd.Vh, svd.U * root, svd.captured)


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
    return Split(_uniform(W0, r, None), None)


def _uniform(W0: Tensor, r: int, generator: torch.Generator | None) -> Tensor:
    bound = 1 / math.sqrt(W0.shape[1])
    # Drawn in float32 on the CPU, so that a seed gives the same start on every device.
    A = torch.empty(r, W0.shape[1], dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    return A.to(W0)
