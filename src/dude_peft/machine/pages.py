"""Gives memory that is not needed any more back to the system at once, so that all processes together need little."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
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


def return_freed_blocks() -> None:
    """Gives the pages of freed blocks back to the system, once: those between blocks that are in use, too."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


class MappedFiles:
    """The files that this process has mapped by now, such as safetensors' that weights are views of.

    A mapping stays whole while one of its views lives, so what was read of it would count until the last one is gone.
    """

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.is_file() else []
        places = [line.split()[0].split("-") for line in lines if "/" in line]
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in places]

    def let_go(self, tensor: Tensor) -> None:
        """Takes the pages of a tensor that lies in one of them out of this process; read again, they come back."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and any(start <= begin and end <= stop for start, stop in self._ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
