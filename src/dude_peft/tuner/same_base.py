"""Whether a model is the one that an adapter was trained on, as a function: every weight and setting that counts.

The one place that tells it of a model in memory; `export/merge.py` asks the same of a checkpoint on the disk. A base
that is wider than the adapter's (float32 for a run in bfloat16) is another function, and is told apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dude_peft.artifact.base_settings import base_settings, other_settings
from dude_peft.artifact.fingerprint import TensorPrint, fingerprint, same_values
from dude_peft.artifact.manifest import BaseRecord
from dude_peft.core.threads import single_threaded_pool
from dude_peft.errors import ArtifactError
from dude_peft.show import shown
from dude_peft.tuner import frozen
from dude_peft.tuner.beside import relied_on
from dude_peft.tuner.heads import newly_initialised
from dude_peft.tuner.layer import DudeLinear

_Fault = tuple[str, str]
"""What is wrong, behind the adapter's name, and what to do."""
_REMEDY = "load the base model it was trained on, or pass allow_base_mismatch=True"


def check_base(base: nn.Module, recorded: BaseRecord, path: str, allow_mismatch: bool = False) -> None:
    """Compare a model in memory with the one that an adapter was trained on.

    Args:
        base: the base model, adapted or not.
        recorded: from the adapter's manifest; what an older one does not tell is not compared.
        path: of the adapter, for messages.
        allow_mismatch: warn of other values and settings instead of refusing them.

    Raises:
        ArtifactError: layers, shapes, values or settings are others.
    """
    _check_shapes(base, recorded.layers, path)
    for find in (_other_weights, _other_settings, _other_tensors):
        found = find(base, recorded, path)
        if found is None:
            continue
        fault, remedy = found
        if not allow_mismatch:
            raise ArtifactError(f"adapter '{path}' {fault}; {remedy}")
        warnings.warn(f"adapter '{path}' {fault}; outputs will not be those of training", stacklevel=3)


def settings_fault(config: Any, recorded: BaseRecord) -> str:
    """In what a model's configuration differs from that of the training, as the end of "adapter 'x' ..."; or empty."""
    now = base_settings(config)
    other = [] if recorded.settings is None or now is None else other_settings(recorded.settings, now)
    more = f" and {len(other) - 1} more" if len(other) > 1 else ""
    return f"was trained on a base model with another configuration ({other[0]}{more})" if other else ""


def _check_shapes(base: nn.Module, recorded: Mapping[str, TensorPrint], path: str) -> None:
    modules = dict(base.named_modules())
    absent = [name for name in recorded if name not in modules or not frozen.is_supported(_base_layer(modules[name]))]
    if absent:
        raise ArtifactError(
            f"adapter '{path}' adapts {len(absent)} layers that {type(base).__name__} has not (first: '{absent[0]}'); "
            f"load it on the base model it was trained on"
        )
    for name, expected in recorded.items():
        shape = frozen.layer_shape(_base_layer(modules[name]))
        if sorted(shape) != sorted(expected["shape"]):
            raise ArtifactError(
                f"adapter '{path}': layer '{name}' is {list(shape)} here and was {expected['shape']} in training; "
                f"load it on the base model it was trained on"
            )


def _other_weights(base: nn.Module, recorded: BaseRecord, path: str) -> _Fault | None:
    modules, layers = dict(base.named_modules()), recorded.layers
    with single_threaded_pool(len(layers)) as pool:  # hashing lets other threads run
        held = pool.map(lambda name: _layer_holds(modules[name], layers[name]), layers)
        wrong = [name for name, holds in zip(layers, held, strict=True) if not holds]
    if not wrong:
        return None
    first = wrong[0]
    fault = f"was trained on other base weights: {len(wrong)} of {len(layers)} differ (first: '{first}')"
    weight: Any = getattr(_base_layer(modules[first]), "weight", None)
    if not _rounds_to(weight, layers[first]):
        return fault, _REMEDY
    dtype, here = layers[first]["dtype"], str(weight.dtype).removeprefix("torch.")
    return f"{fault}, rounded to {dtype}; the base is {here} here", f"load it with dtype=torch.{dtype}"


def _other_settings(base: nn.Module, recorded: BaseRecord, path: str) -> _Fault | None:
    fault = settings_fault(getattr(base, "config", None), recorded)
    return (fault, _REMEDY) if fault else None


def _other_tensors(base: nn.Module, recorded: BaseRecord, path: str) -> _Fault | None:
    held: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    held = {_plain_name(name): tensor for name, tensor in held.items()}
    beside = recorded.beside
    with single_threaded_pool(len(beside)) as pool:
        holds = pool.map(lambda name: name in held and _holds(held[name], beside[name]), beside)
        other = [name for name, same in zip(beside, holds, strict=True) if not same]
    new = newly_initialised(base)
    drawn = [name for name in other if name.rpartition(".")[0] in new]
    if drawn:
        warnings.warn(
            f"adapter '{path}': '{drawn[0]}' is neither saved with it nor in the base model's checkpoint, and was "
            "drawn anew; outputs that depend on it are not those of training",
            stacklevel=4,
        )
    if unknown := [name for name in _not_comparable(base) if name.rpartition(".")[0] not in recorded.layers]:
        warnings.warn(
            f"adapter '{path}': {len(unknown)} weights of the base are packed or sharded, and are not compared with "
            f"those of the training (first: '{shown(unknown[0], 200)}')",
            stacklevel=4,
        )
    wrong = [name for name in other if name not in drawn]
    if not wrong:
        return None
    return (
        f"relies on '{shown(wrong[0], 200)}', which is another one here, and was not saved with it ({len(wrong)} of "
        f"{len(beside)} such tensors)",
        "load it on the model it was trained on, or name it in modules_to_save",
    )


def _not_comparable(base: nn.Module) -> list[str]:
    return [
        name
        for name, tensor in relied_on(base)
        if isinstance(tensor, nn.Parameter) and not (frozen.is_plain(tensor) or tensor.is_meta or is_lazy(tensor))
    ]


def _plain_name(name: str) -> str:
    return name.replace(".original_module.", ".").replace(".base_layer.", ".")


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, DudeLinear) else module


def _layer_holds(module: nn.Module, expected: TensorPrint) -> bool:
    if isinstance(module, DudeLinear):
        if module.base_fingerprint() == expected:
            return True
        with module.unmerged():
            return frozen.holds(module.get_base_layer(), expected)
    return frozen.holds(module, expected)


def _holds(tensor: Tensor, seen: TensorPrint) -> bool:
    return tensor.is_meta or not frozen.is_plain(tensor) or same_values(tensor, seen)


def _rounds_to(weight: Any, seen: TensorPrint) -> bool:
    dtype = getattr(torch, seen["dtype"], None)
    plain = isinstance(weight, Tensor) and frozen.is_plain(weight) and isinstance(dtype, torch.dtype)
    return plain and fingerprint(weight.detach().to(dtype)) == seen
