"""Whether numbers are numbers: looked at wherever some are about to be written, or were read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; whole numbers never do, and neither does what has no values."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # The sum is the quicker look; it may overflow where no entry does.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first of some tensors that holds NaN or Inf; None where all numbers are finite."""
    return next((name for name, tensor in tensors if not is_finite(tensor.detach())), None)
