"""Full: a whole matrix trained on every target layer, no rank and no magnitude, a control."""

from collections.abc import Mapping

from torch import Tensor

from dude_peft.methods.delta import Delta, DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import SplitOptions


def no_change(W0: Tensor, r: int, scaling: float, options: SplitOptions) -> DeltaStart:
    """`dW` (out, in) is zero; `W' = W0 + dW`.

    Args:
        W0: (out, in) float32 or float64.
        r: unused: there is no rank.
        scaling: unused: it is 1.
        options: unused, part of the common signature.

    Returns:
        DeltaStart.

    Source: full fine-tuning of the target layers, what every adapter is compared with.
    """
    return DeltaStart({"dW": W0.new_zeros(W0.shape)})


def whole(tensors: Mapping[str, Tensor]) -> tuple[Tensor, None]:
    """`L = dW`; R is the identity."""
    return tensors["dW"], None


FULL = Method(
    "full",
    None,
    frozen_start=False,
    magnitude="none",
    learning_rate=1e-4,
    delta=Delta(trained={"dW": ("out", "in")}, frozen={}, start=no_change, factors=whole, multiple=0),
    summary="a trained matrix of W0's size, no rank, no magnitude",
    choose="the control: what full fine-tuning of the target layers gives",
    paper="this project",
    certainty="control",
)
