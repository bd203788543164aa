"""Buffers of a block's size that are used again and again.

On a CPU fresh memory costs more than what the two passes over an output do in it: the system hands it out page by page
and clears every page. So each thread keeps one buffer for each purpose, of some MiB at most, for as long as it lives.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_kept = threading.local()


def scratch(like: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
    """A buffer of arbitrary content, valid until the same thread asks for the same purpose again.

    Args:
        like: tensor of the same shape and device; only a plain one on the CPU gets a kept buffer.
        dtype: dtype.
        purpose: name of the buffer.
    """
    if not like.is_cpu or torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    size = like.numel()
    buffers: dict[Any, Tensor] = _kept.__dict__
    buffer = buffers.get((purpose, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            buffer = torch.empty(size, dtype=dtype)
        buffers[purpose, dtype] = buffer
    return buffer[:size].view(like.shape)
