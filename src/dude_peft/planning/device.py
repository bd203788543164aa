"""How much memory there is: as the user says, the GPU's, or what the machine has free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dude_peft.errors import ConfigError
from dude_peft.show import quoted

_SIZE = re.compile(r"((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)(?: (?=[KMGTB]))?([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """Where a run would train."""

    name: str
    memory: int
    """Bytes that a run can have."""
    gpu: bool
    here: bool
    """Whether it is in this machine, so that its speed can be measured."""


def device(memory: str | None) -> Device:
    """The device of a run: a GPU with `memory` ("80GiB"), or else the first of this machine, or its CPU.

    Raises:
        ConfigError: `memory` is no size.
    """
    if memory is not None:
        return Device(f"a GPU with {memory}", parse_size(memory), gpu=True, here=False)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, gpu=True, here=True)
    return Device("this machine's free memory", free_memory(), gpu=torch.accelerator.is_available(), here=True)


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "24 GB", "512MiB" or a plain number of bytes.

    Raises:
        ConfigError: it is none of these, or zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError(f"--device-memory {quoted(text)} is not a size; write it as 80GiB or 24GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def free_memory() -> int:
    """Bytes that a new process can have: of the machine, and of the container it may be in."""
    free = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no container, or none with a limit
        return int(free)
    return min(int(free), limit - used + (int(cache[1]) if cache else 0))
