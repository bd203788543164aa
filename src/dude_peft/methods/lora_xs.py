"""LoRA-XS: a small square matrix between the frozen principal factors, no magnitude."""

from collections.abc import Mapping

from torch import Tensor

from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import SplitOptions, principal


def principal_frame(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> DeltaStart:
    """Frozen `U = U_r` (out, r) and `SV = S_r V_r^T` (r, in) of the top-r SVD; `C` (r, r) is zero.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, at most min(out, in).
        scaling: unused, part of the common signature.
        options: tolerance and seed of the SVD.

    Returns:
        DeltaStart. Where W0 has fewer than r components, the rows of SV that are left are zero, as in the paper, and
        so is all that C's columns there could change.

    Raises:
        NumericsError: NaN or Inf in W0.

    Source: LoRA-XS, arXiv 2405.17604, section 3; S is on the input's side, as in the authors' code.
    """
    svd = principal(W0, r, options)
    tensors = {"C": svd.S.new_zeros(r, r), "U": svd.U, "SV": svd.S[:, None] * svd.Vh}
    return DeltaStart(tensors, svd.captured)


def framed(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`L = U_r C`, `R = S_r V_r^T`."""
    return tensors["U"] @ tensors["C"], tensors["SV"]


LORA_XS = Method(
    "lora-xs",
    None,
    frozen_start=False,
    magnitude="none",
    learning_rate=3e-3,
    delta=Delta(
        trained={"C": ("r", "r")},
        frozen={"U": ("out", "r"), "SV": ("r", "in")},
        start=principal_frame,
        factors=framed,
    ),
    summary="a trained (r, r) matrix between frozen principal factors, no magnitude",
    choose="as few trained numbers as the rank squared",
    start="truncated SVD",
    paper="arXiv 2405.17604",
    certainty="public code",
)
