"""Casts, and the end of autocast, only where they do something: torch takes microseconds to find that they do not.

An adapted layer asks for some thirty in a step. On small layers, and where a GPU waits for Python, that is much.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; itself where it has it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within: no operation is cast by torch's autocast."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
