"""OSoRA: a trained output scale and trained singular values of the principal part, no magnitude."""

from collections.abc import Mapping

from torch import Tensor

from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import SplitOptions, principal


def principal_triplets(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> DeltaStart:
    """Frozen `U` (out, r), `S = S_r / s` (r,) and `V = V_r^T` (r, in) of the top-r SVD; `do` (out,) and `dS` (r,) are
    zero.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, at most min(out, in).
        scaling: s > 0; it cancels at the start, as in the other methods that start at the principal part.
        options: tolerance and seed of the SVD.

    Returns:
        DeltaStart.

    Raises:
        NumericsError: NaN or Inf in W0.

    Source: OSoRA, arXiv 2505.14350. Its count, r + out numbers a layer, is the paper's; that o scales the rows of the
    principal part alone, and starts at 1, is our reading.
    """
    svd = principal(W0, r, options)
    zeros = {"do": W0.new_zeros(W0.shape[0]), "dS": svd.S.new_zeros(r)}
    return DeltaStart({**zeros, "U": svd.U, "S": svd.S / scaling, "V": svd.Vh}, svd.captured)


def rescaled(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`L R = diag(o) U diag(S + dS) V - U diag(S) V` with o = 1 + do: `L = do U (S + dS) + U dS`, `R = V`."""
    U, S, dS = tensors["U"], tensors["S"], tensors["dS"]
    return tensors["do"][:, None] * (U * (S + dS)) + U * dS, tensors["V"]


OSORA = Method(
    "osora",
    None,
    frozen_start=False,
    magnitude="none",
    learning_rate=3e-3,
    delta=Delta(
        trained={"do": ("out",), "dS": ("r",)},
        frozen={"U": ("out", "r"), "S": ("r",), "V": ("r", "in")},
        start=principal_triplets,
        factors=rescaled,
    ),
    summary="an output scale and the singular values of the principal part, no magnitude",
    choose="vectors alone are to be trained, in the principal directions",
    start="truncated SVD",
    paper="arXiv 2505.14350",
    certainty="inferred",
)
