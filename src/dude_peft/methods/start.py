"""Where one layer's adapter starts: the same function for a model in memory and for a checkpoint on disk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dude_peft.core.finite import first_not_finite
from dude_peft.core.magnitude import row_norm
from dude_peft.errors import NumericsError
from dude_peft.methods.delta import DeltaStart
from dude_peft.methods.method import Method
from dude_peft.methods.splits import Split, SplitOptions


class Start(NamedTuple):
    """The start of one layer."""

    split: Split | DeltaStart
    """What the method makes of W0."""
    m0: Tensor
    """(out,) row norms of W0, float64."""


def start_of(method: Method, W0: Tensor, r: int, scaling: float, options: SplitOptions, where: str) -> Start:
    """What the method makes of W0, and W0's row norms, after a look for NaN and Inf.

    The bits depend on torch's number of threads. Callers run it with one thread, and several layers at a time instead:
    then they depend on nothing but the weight, and a loaded machine does not make threads wait for each other.

    Args:
        method: entry of the table.
        W0: (out, in) float32 or float64; with `options.overwrite` other numbers may be left in it.
        r: rank.
        scaling: s.
        options: settings of the start.
        where: name of the layer, for messages.

    Raises:
        NumericsError: NaN or Inf in W0, or an SVD that does not converge.
    """
    check_finite(where, W0)
    m0 = row_norm(W0)  # first: the start may overwrite W0
    dtype = W0.dtype
    try:
        begun = method.begin(W0, r, scaling, options)
    except NumericsError as error:
        raise NumericsError(f"base weight of '{where}': {error}") from error
    factors = begun.tensors.values() if isinstance(begun, DeltaStart) else (begun.A, begun.B)
    made = [*(("factors", tensor) for tensor in factors), ("row norms", m0.to(dtype) if method.normalised else None)]
    lost = first_not_finite((name, tensor) for name, tensor in made if tensor is not None)
    if lost is not None:
        raise NumericsError(
            f"base weight of '{where}': the {lost} of its start overflow {dtype}; check the checkpoint, or use a wider "
            "dtype"
        )
    return Start(begun, m0)


def check_finite(layer_name: str, W0: Tensor) -> None:
    """Refuse a weight with NaN or Inf, naming the first place."""
    if bool(torch.isfinite(W0.sum())):
        return
    bad = torch.nonzero(~torch.isfinite(W0))
    if len(bad):
        row, column = bad[0].tolist()
        raise NumericsError(
            f"base weight of '{layer_name}' holds {W0[row, column].item()} at [{row}, {column}] ({len(bad)} such "
            "entries); the checkpoint is damaged, download it again"
        )
