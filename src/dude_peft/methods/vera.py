"""VeRA: trained vectors between frozen random factors, no magnitude."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import SplitOptions

_D_START = 0.1


def random_frame(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> DeltaStart:
    """Frozen random `A` (r, in) and `B` (out, r); the vector `d` (r,) starts at 0.1 and `b` (out,) at zero.

    The factors follow from `svd_seed` and the sides alone, so layers with the same inputs share A, and layers with as
    many outputs share B: each is uniform within sqrt(6 / fan_in), fan_in being in for A and r for B.

    Args:
        W0: (out, in); only its shape, dtype and device are used.
        r: rank.
        scaling: unused: the paper has none, so lora_alpha = r is the paper's.
        options: the seed.

    Returns:
        DeltaStart.

    Source: VeRA, arXiv 2310.11454, section 3; the bounds and d's start are those of PEFT.
    """
    out, in_ = W0.shape
    A, B = (_uniform(rows, r, seed, W0) for rows, seed in ((in_, options.svd_seed), (out, options.svd_seed ^ 1)))
    tensors = {"d": W0.new_full((r,), _D_START), "b": W0.new_zeros(out)}
    return DeltaStart({**tensors, "A": A.T * math.sqrt(6 / in_), "B": B * math.sqrt(6 / r)})


def _uniform(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """(rows, columns) within -1 and 1, drawn row by row on the CPU, so that every device has the same."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.empty(rows, columns, dtype=torch.float32).uniform_(-1, 1, generator=generator).to(like)


def scaled_frame(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`L = diag(b) B`, `R = diag(d) A`."""
    return tensors["b"][:, None] * tensors["B"], tensors["d"][:, None] * tensors["A"]


VERA = Method(
    "vera",
    None,
    frozen_start=False,
    magnitude="none",
    learning_rate=3e-3,
    delta=Delta(
        trained={"d": ("r",), "b": ("out",)},
        frozen={"A": ("r", "in"), "B": ("out", "r")},
        start=random_frame,
        factors=scaled_frame,
    ),
    summary="two trained vectors around frozen random factors, no magnitude",
    choose="vectors alone are to be trained, without an SVD",
    paper="arXiv 2310.11454",
    certainty="public code",
)
