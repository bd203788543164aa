"""OLoRA: the factors of the base weight's QR decomposition, no magnitude."""

import torch
from torch import Tensor

from dude_peft.core.svd import full_precision_products
from dude_peft.methods.method import Method
from dude_peft.methods.splits import Split, SplitOptions


def qr_split(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split:
    """First r columns of Q and rows of R of the thin QR `W0 = Q R`: `B = Q[:, :r]`, `A = R[:r]`.

    Neither is divided by the scaling, so s B A is what is taken out of W0, as in PEFT's `init_lora_weights="olora"`.
    The first r columns of Q follow from the first r columns of W0 alone, and R[:r] = Q[:, :r]^T W0: a QR of (out, r)
    and one product with W0 are all that is computed. R's diagonal is made nonnegative, which leaves B A as it is and
    makes the factors unique where these columns are independent.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, at most min(out, in).
        scaling: unused, part of the common signature.
        options: unused likewise.

    Returns:
        Split with both factors.

    Source: OLoRA, arXiv 2406.01775, section 3; the scaling is that of the authors' code in PEFT.
    """
    with full_precision_products(W0.device):
        Q, triangle = torch.linalg.qr(W0[:, :r])
        sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(W0)
        Q = Q * sign
        R = Q.T @ W0
    R[:, :r] = sign[:, None] * triangle  # with its exact zeros
    return Split(R, Q)


OLORA = Method(
    "olora",
    qr_split,
    frozen_start=True,
    magnitude="none",
    learning_rate=3e-4,
    summary="factors of W0's QR decomposition, no magnitude",
    choose="a start out of W0 without an SVD",
    start="QR",
    paper="arXiv 2406.01775",
    certainty="public code",
)
