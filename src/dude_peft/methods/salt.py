"""SALT: the top singular values scaled and shifted, a low-rank change among all other directions, no magnitude."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dude_peft.core.svd import top_svd
from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import SplitOptions, uniform


def whole_frame(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> DeltaStart:
    """Frozen `U` (out, n), `S = S_r / s` (r,) and `V` (n, in) of the WHOLE SVD, n = min(out, in); the scale `da` (r,),
    the shift `b` (r,) and `X` (n - r, r) are zero, `Y` (r, n - r) starts as LoRA's A, from the seed.

    It keeps n (out + in) numbers, the memory of two weights and more, in the model and in the file, and takes a whole
    SVD at the start.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, and how many values are scaled; at most n.
        scaling: s > 0; it cancels in the scale.
        options: the seed.

    Returns:
        DeltaStart.

    Raises:
        NumericsError: NaN or Inf in W0, or an SVD that does not converge.

    Source: SALT, arXiv 2503.16055, equation for W'. The authors' code starts off W0 and takes the ReLU of the new
    values; here the start is W0, and there is no ReLU.
    """
    n = min(W0.shape)
    svd = top_svd(W0, n, exact=True, overwrite=options.overwrite)
    zeros = {"da": svd.S.new_zeros(r), "b": svd.S.new_zeros(r), "X": svd.S.new_zeros(n - r, r)}
    Y = uniform(svd.S.new_empty(r, n - r), r, torch.Generator("cpu").manual_seed(options.svd_seed))
    return DeltaStart({**zeros, "Y": Y, "U": svd.U, "S": svd.S[:r] / scaling, "V": svd.Vh})


def shifted(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`L = [U_r (S da + b), U_rest X]`, `R = [V_r; Y V_rest]`, with a = 1 + da."""
    U, S, V = tensors["U"], tensors["S"], tensors["V"]
    r = len(S)
    left = torch.cat([U[:, :r] * (S * tensors["da"] + tensors["b"]), U[:, r:] @ tensors["X"]], dim=1)
    return left, torch.cat([V[:r], tensors["Y"] @ V[r:]])


SALT = Method(
    "salt",
    None,
    frozen_start=False,
    magnitude="none",
    learning_rate=1e-3,
    delta=Delta(
        trained={"da": ("r",), "b": ("r",), "X": ("rest", "r"), "Y": ("r", "rest")},
        frozen={"U": ("out", "min"), "S": ("r",), "V": ("min", "in")},
        start=whole_frame,
        factors=shifted,
        multiple=2,
        step="made by products with U and V",
    ),
    summary="top singular values scaled and shifted, a low-rank change of the rest, no magnitude",
    choose="small models: it keeps two more weights a layer",
    start="whole SVD",
    paper="arXiv 2503.16055",
    certainty="public code",
)
