"""Where a run computes: what its record says, and what the last bits of its numbers depend on."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from dude_peft.version import __version__


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    names = ("torch", "transformers", "peft", "accelerate", "safetensors")
    found = {name: metadata.version(name) for name in names}
    return {"dude_peft": __version__, **found, "python": platform.python_version()}


def hardware(device: Any) -> dict[str, Any]:
    """The machine, and the device of a torch model on it."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def environment(device: Any, processes: int, strategy: str) -> dict[str, Any]:
    """What the last bits of a run depend on."""
    several = {"processes": processes, **({"strategy": strategy} if processes > 1 else {})}
    return {"versions": versions(), "hardware": hardware(device), **several}
