"""Gives pages of a tensor that is not needed any more back to the system, before the file behind them is closed.

safetensors maps a file, and the weights of a model are views of the mapping: it stays whole while one of them lives.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def let_go(tensor: Tensor) -> None:
    """Takes the whole pages of a CPU tensor's values out of this process; nobody may read them afterwards."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
