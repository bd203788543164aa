"""What the processes of one run are, and what they tell each other; with one process, nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dude_peft.errors import ConfigError, DudeError
from dude_peft.show import shown

T = TypeVar("T")

LAUNCHED = "DUDE_LAUNCHED"
"""Of the environment: whether `launch` started this process, and tells why another one ended."""
LOST = 70
"""Exit code of a process that ended because another one did."""
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torch's launcher, and ours, tells a process. Clusters and shells have the first two as well, at times."""
_OF_ANOTHER = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Socket Timeout")


def is_launched() -> bool:
    """Whether a launcher started this process.

    Raises:
        ConfigError: the environment's RANK and WORLD_SIZE make this one of several processes, and no launcher set them:
            it would wait for the others, or for what the first one makes.
    """
    told = {name: os.environ[name] for name in _OF_LAUNCHERS if name in os.environ}
    numbers = {name: int(text) if text.isdecimal() else -1 for name, text in told.items()}
    size, whole = numbers.get("WORLD_SIZE", 1), len(told) == len(_OF_LAUNCHERS)
    fits = min(numbers.values(), default=0) >= 0 and numbers.get("RANK", 0) < size
    if fits and (whole or (size == 1 and "LOCAL_RANK" not in told)):
        return whole
    found = ", ".join(f"{name}={shown(text, 20)}" for name, text in told.items())
    missing = [name for name in _OF_LAUNCHERS if name not in told] if fits else []
    without = f" and no {' or '.join(missing)}" if missing else ""
    raise ConfigError(
        f"the environment has {found}{without}, as no launcher sets them; unset {', '.join(told)}, and start several "
        "processes with --launch or torchrun"
    )


def rank() -> int:
    """Number of this process, from 0; known from the start, by the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those of its machine; 0 where nobody tells."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes and shows."""
    return rank() == 0


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def comes_of_another(error: BaseException) -> bool:
    """Whether an error is only that another process of this run has ended, or was raised from one."""
    current: BaseException | None = error
    while current is not None and count() > 1:
        if isinstance(current, RuntimeError) and any(words in str(current) for words in _OF_ANOTHER):
            return True
        current = current.__cause__ or current.__context__
    return False


def gathered(value: T) -> list[T]:
    """Every process's `value`, in their order; all of them have to call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def done_by_all(work: Callable[[], T]) -> list[T]:
    """What `work` gives in every process, in their order; all of them have to call it.

    A DudeError of one is raised in all. They would wait for it otherwise, in the next thing that they do together.
    """
    found: T | DudeError
    try:
        found = work()
    except DudeError as error:
        if count() == 1:
            raise
        found = error
    every = gathered(found)
    for each in every:
        if isinstance(each, DudeError):
            raise each
    return every  # type: ignore[return-value]  # those that are no errors


def from_first(value: T) -> T:
    """The first process's `value`, in all of them."""
    return gathered(value)[0]


@contextmanager
def joined() -> Iterator[None]:
    """Within: the processes can talk, over gloo, each with a device of its own; for work that shares no tensors."""
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_before_others() -> Iterator[None]:
    """Within: the first process alone, then all others; for what the first one writes and the others read."""
    if not is_first():
        from_first(None)
    yield
    if is_first():
        from_first(None)


def summed(tensor: Any) -> Any:
    """The sum of every process's tensor, in place and in all of them."""
    if count() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor
