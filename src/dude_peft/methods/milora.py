"""MiLoRA: the minor singular components, no magnitude."""

from torch import Tensor

from dude_peft.core.svd import top_svd
from dude_peft.methods.method import Method
from dude_peft.methods.splits import Split, SplitOptions, balanced


def minor_split(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> Split:
    """Minor factors `A = sqrt(S_r / s) V_r^T`, `B = U_r sqrt(S_r / s)` of the r SMALLEST of min(out, in) triplets.

    No truncated method finds these: it takes a whole SVD, in time O(out in min(out, in)) and the memory of some three
    weights beside W0. On one core a 4096^2 weight takes 23 to 30 s, the truncated SVD of `dude` 0.3 to 1.2 s.

    Args:
        W0: (out, in) float32 or float64.
        r: rank, at most min(out, in).
        scaling: s > 0.
        options: the seed of the random start of zero singular values.

    Returns:
        Split with both factors.

    Raises:
        NumericsError: NaN or Inf in W0, or an SVD that does not converge.

    Source: MiLoRA, arXiv 2406.09044, section 3.
    """
    svd = top_svd(W0, min(W0.shape), exact=True, overwrite=options.overwrite)
    U, S, Vh = svd.U[:, -r:], svd.S[-r:], svd.Vh[-r:]
    energy = float(svd.S.cpu().double().square().sum())
    captured = float(S.cpu().double().square().sum()) / energy if energy else 1.0
    return Split(*balanced(U, S, Vh, scaling, options.svd_seed), captured)


MILORA = Method(
    "milora",
    minor_split,
    frozen_start=True,
    magnitude="none",
    learning_rate=1e-3,
    summary="minor singular factors, no magnitude",
    choose="what W0 knows best is to stay as it is",
    start="whole SVD",
    paper="arXiv 2406.09044",
    certainty="public code",
)
