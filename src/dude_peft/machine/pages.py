"""Gives memory that is not needed any more back to the system at once, so that all processes together need little."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE_BYTES = 2**20


def return_large_blocks() -> None:
    """From here on the C library gives a freed block of a MiB or more back, instead of keeping it for later.

    It raises that limit by itself, up to 32 MiB. Blocks that are gathered and freed in every forward then leave holes:
    a process with half of a model grew to four times the model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none, and keeps no large blocks
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def let_go(tensor: Tensor) -> None:
    """Takes the whole pages of a CPU tensor's values out of this process; nobody may read them afterwards.

    safetensors maps a file, and weights are views of the mapping: by itself it stays whole while one of them lives.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
