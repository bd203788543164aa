"""Errors that mean that memory is out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """A device has an error of its own for it, the CPU's allocator only words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
