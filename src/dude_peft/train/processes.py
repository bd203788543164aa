"""What the processes of one run are, and what they tell each other; with one process, nothing."""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that writes and shows; known from the start, by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gathered(value: T) -> list[T]:
    """Every process's `value`, in their order; all of them have to call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """The first process's `value`, in all of them."""
    return gathered(value)[0]


def summed(tensor: Any) -> Any:
    """The sum of every process's tensor, in place and in all of them."""
    if count() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor
