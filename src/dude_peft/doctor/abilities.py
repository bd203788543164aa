"""What works here beyond plain training, and what each lacks; nothing heavy is imported to find out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from dude_peft.doctor.devices import Seen
from dude_peft.errors import DudeError
from dude_peft.installing import install


@dataclass(frozen=True)
class Ability:
    """One thing that some runs want."""

    name: str
    works: bool
    note: str
    """How it works here, or what is missing."""


def abilities(devices: Sequence[Seen]) -> list[Ability]:
    """All of them, in the order in which a run would need them."""
    kinds = {device.kind for device in devices}
    gpu = bool(kinds & {"cuda", "rocm"})
    return [
        _of_package("quantised bases (bitsandbytes)", "bitsandbytes", "bitsandbytes"),
        _of_package("quantised bases (torchao)", "torchao", "torchao"),
        _of_package("GGUF bases", "gguf", "gguf"),
        _of_package("hub data sets", "datasets", "datasets"),
        _of_package("rows with images", "PIL", "pillow"),
        _of_package("TRL's trainers", "trl", "trl"),
        _of_package("Liger's kernels", "liger_kernel", "liger-kernel"),
        _of_package("comparisons on a Ray cluster", "ray", "ray"),
        _deepspeed(gpu),
        _flash_attention(gpu),
        _llama_cpp(),
    ]


def _of_package(name: str, module: str, package: str) -> Ability:
    there = importlib.util.find_spec(module) is not None
    return Ability(name, there, "installed" if there else install(package))


def _deepspeed(gpu: bool) -> Ability:
    if importlib.util.find_spec("deepspeed") is None:
        return Ability("DeepSpeed", False, install("deepspeed"))
    return Ability("DeepSpeed", gpu, "installed" if gpu else "installed, but it needs a GPU")


def _flash_attention(gpu: bool) -> Ability:
    name = "packing with flash attention"
    if not gpu:
        return Ability(name, False, "needs a CUDA or ROCm GPU")
    there = importlib.util.find_spec("flash_attn") is not None
    return Ability(name, there, "installed" if there else install("flash-attn", option="--no-build-isolation"))


def _llama_cpp() -> Ability:
    from dude_peft.exporting.llama_tools import find_converter

    name = "export to llama.cpp"
    try:
        find_converter()
    except DudeError as error:
        return Ability(name, False, str(error))
    there = importlib.util.find_spec("llama_cpp") is not None
    return Ability(name, there, "converter found" if there else f"{install('llama-cpp-python')} adds a check")
