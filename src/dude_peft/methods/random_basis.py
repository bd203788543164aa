"""Random basis, a control: DuDe with random directions of the same strengths."""

import hashlib

import torch
from torch import Tensor

from dude_peft.core.svd import full_precision_products
from dude_peft.methods.method import Method
from dude_peft.methods.splits import Split, SplitOptions, balanced, principal


def random_split(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split:
    """Factors of `U diag(S) V^T` with W0's own top-r singular values S, and random orthonormal U (out, r), V (in, r).

    The directions are drawn from `svd_seed`, the shape and W0's first row, so layers of one shape have different ones,
    in whatever order they are computed.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, at most min(out, in).
        scaling: s > 0.
        options: tolerance and seed of the SVD.

    Returns:
        Split with both factors; s B A is no part of W0, so nothing is said of its energy.

    Raises:
        NumericsError: NaN or Inf in W0.

    Source: this project; a control for `dude`, whose U and V are W0's own.
    """
    generator = torch.Generator("cpu").manual_seed(_seed(W0, options.svd_seed))
    U, V = (_orthonormal(size, r, generator, W0) for size in W0.shape)
    svd = principal(W0, r, options)
    return Split(*balanced(U, svd.S, V.T, scaling, options.svd_seed))


def _seed(W0: Tensor, svd_seed: int) -> int:
    row = W0[0].detach().cpu().float().contiguous().view(torch.uint8).numpy().tobytes()
    text = f"{svd_seed} {tuple(W0.shape)} ".encode()
    return int.from_bytes(hashlib.blake2b(text + row, digest_size=7).digest(), "little")


def _orthonormal(size: int, r: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """(size, r) orthonormal columns, uniformly distributed: the QR of a Gaussian matrix with R's diagonal positive."""
    drawn = torch.randn(size, r, generator=generator, dtype=torch.float32, device="cpu")
    with full_precision_products(like.device):
        Q, R = torch.linalg.qr(drawn.to(like))
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)


RANDOM_BASIS = Method(
    "random-basis",
    random_split,
    frozen_start=True,
    magnitude="trained",
    learning_rate=3e-4,
    summary="dude with random directions of the same singular values",
    choose="to see whether it is the principal directions that help",
    start="truncated SVD",
    paper="this project",
    certainty="control",
)
