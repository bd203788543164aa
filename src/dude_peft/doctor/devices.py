"""The devices of this machine: memory, bfloat16, and whether the Triton kernels run there."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from dude_peft.core.compose import kernels_for
from dude_peft.planning.device import free_memory


@dataclass(frozen=True)
class Seen:
    """One device."""

    name: str
    kind: str
    """cpu, cuda, rocm, xpu or mps."""
    memory: int | None
    """Bytes; of the CPU those that are free, None where the device does not tell."""
    bfloat16: bool
    kernels: bool
    """Whether our Triton kernels do the work there."""


def devices() -> list[Seen]:
    """The CPU, then the accelerators that torch sees."""
    name = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return [Seen(name, "cpu", free_memory(), bfloat16=True, kernels=False), *_accelerators()]


def _accelerators() -> list[Seen]:
    if torch.cuda.is_available():
        kind = "cuda" if torch.version.hip is None else "rocm"
        seen = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = kind == "rocm" or properties.major >= 8
            tensor = torch.empty(1, device=f"cuda:{index}")
            kernels = kernels_for(tensor) is not None
            seen.append(Seen(properties.name, kind, properties.total_memory, bf16, kernels))
        return seen
    if torch.xpu.is_available():
        indices = range(torch.xpu.device_count())
        found = [torch.xpu.get_device_properties(index) for index in indices]
        return [Seen(each.name, "xpu", each.total_memory, bfloat16=True, kernels=False) for each in found]
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        return [Seen("Apple GPU", "mps", memory, bfloat16=torch.backends.mps.is_macos_or_newer(14, 0), kernels=False)]
    return []
