"""What the processes of one run tell each other; with one process, nothing."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that writes and shows."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gathered(value: T) -> list[T]:
    """Every process's `value`, in their order; all of them have to call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """The first process's `value`, in all of them."""
    return gathered(value)[0]
