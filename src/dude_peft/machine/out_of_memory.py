"""Errors that mean that memory is out, whoever found it first: Python, torch, the loader of libraries, a thread."""

from __future__ import annotations

import errno

_WORDS = (
    "can't allocate memory",  # torch on the CPU
    "Cannot allocate memory",  # the system, in whatever a library makes of it
    "failed to map segment from shared object",  # a library that does not fit
    "can't start new thread",
    "bad_alloc",
    "Unable to allocate",  # numpy
    "unable to mmap",  # torch, safetensors
    "malloc of size",  # arrow
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says so itself; a device has a class of its own for it, others only words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error)
    return any(word in text for word in _WORDS)


def comes_of_memory(error: BaseException) -> bool:
    """Whether it, or one that it was raised from, says so."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if is_out_of_memory(current):
            return True
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return False
