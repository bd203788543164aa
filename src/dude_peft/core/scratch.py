"""Buffers of a block's size that are used again and again.

On a CPU fresh memory costs more than what is done in it: the system hands it out page by page and clears every page. So
each thread keeps one buffer for each purpose, of some MiB at most, for as long as it lives.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Views of a buffer that are kept, one for each shape; making them takes longer than small operations.
_MOST_VIEWS = 32
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_kept = threading.local()


def scratch(like: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
    """A buffer of arbitrary content, valid until the same thread asks for the same purpose again.

    Args:
        like: tensor of the same shape and device; only a plain one on the CPU gets a kept buffer.
        dtype: dtype.
        purpose: name of the buffer.
    """
    if has_scratch(like):
        return buffer(like.shape, dtype, purpose)
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def has_scratch(tensor: Tensor) -> bool:
    """Whether what belongs to the tensor may lie in a kept buffer."""
    if not tensor.is_cpu or type(tensor) not in _PLAIN_TYPES or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # under vmap a tensor may stand for many


def buffer(shape: Sequence[int], dtype: torch.dtype, purpose: str) -> Tensor:
    """The same by its shape, for what `has_scratch`."""
    kept: dict[Any, dict[Any, Tensor]] = _kept.__dict__
    views = kept.get((purpose, dtype))
    if views is None:
        views = kept[purpose, dtype] = {}
    found = views.get(shape)
    if found is None:
        size, largest = math.prod(shape), views.get(None)
        if largest is None or largest.numel() < size or len(views) > _MOST_VIEWS:
            views.clear()
            if largest is None or largest.numel() < size:
                with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
                    largest = torch.empty(size, dtype=dtype, device="cpu")  # whatever the default device is
            views[None] = largest
        with torch.inference_mode(False):
            found = views[shape] = largest[:size].view(*shape)
    return found
