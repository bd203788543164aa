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


def scratch(rows: int, columns: int, dtype: torch.dtype, like: Tensor, purpose: str) -> Tensor:
    """A (rows, columns) buffer of arbitrary content, valid until the same thread asks for the same purpose again.

    Args:
        rows: rows.
        columns: columns.
        dtype: dtype.
        like: tensor whose device counts; only a plain tensor on the CPU gets a kept buffer.
        purpose: name of the buffer.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.empty(rows, columns, dtype=dtype, device=like.device)
    buffers: dict[Any, Tensor] = _kept.__dict__
    buffer = buffers.get((purpose, dtype))
    if buffer is None or buffer.numel() < rows * columns:
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            buffer = torch.empty(rows * columns, dtype=dtype)
        buffers[purpose, dtype] = buffer
    return buffer[: rows * columns].view(rows, columns)
