"""Whether a model is the one that an adapter was trained on, as a function: every weight and setting that counts.

The one place that tells it of a model in memory; `exporting/merge.py` asks the same of a checkpoint on the disk. A base
that is wider than the adapter's (float32 for a run in bfloat16) is another function, and is told apart.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dude_peft.artifact.base_settings import base_settings, other_settings
from dude_peft.artifact.fingerprint import TensorPrint, fingerprint, same_values
from dude_peft.artifact.manifest import BaseRecord
from dude_peft.core.threads import single_threaded_pool
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.methods.start import check_finite
from dude_peft.show import shown
from dude_peft.tuner import frozen
from dude_peft.tuner.beside import relied_on
from dude_peft.tuner.heads import newly_initialised
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.named import targets_named
from dude_peft.tuner.offloaded import is_offloaded, stored
from dude_peft.tuner.stacks import Stack

_Fault = tuple[str, str]
"""What is wrong, behind the adapter's name, and what to do."""
_REMEDY = "load the base model it was trained on, or pass allow_base_mismatch=True"


class OtherBaseError(ArtifactError):
    """The model is not the one that an adapter was trained on."""

    def __init__(self, fault: str, remedy: str) -> None:
        """`remedy` is what to do in Python; a command has its own (`with_remedy`)."""
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault


@contextmanager
def with_remedy(remedy: str) -> Iterator[None]:
    """Within: another base model is refused with the remedy of the command that loads the adapter."""
    try:
        yield
    except OtherBaseError as error:
        raise ArtifactError(f"{error.fault}; {remedy}") from error


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
    with checked_base(base, recorded, path, allow_mismatch):
        pass


@contextmanager
def checked_base(base: nn.Module, recorded: BaseRecord, path: str, allow_mismatch: bool = False) -> Iterator[None]:
    """`check_base`, while the block runs: layers and shapes before it, values and settings at its end.

    The weights are read by other threads, once each. The block may adapt a plain model, but must leave its weights.
    """
    targets = targets_named(base, recorded.layers)
    _check_shapes(base, targets, recorded.layers, path)
    with single_threaded_pool(len(recorded.layers) + len(recorded.beside)) as pool:  # hashing lets other threads run
        beside = _Beside(base, recorded, path, pool)  # first: an embedding's hash asks little of the interpreter
        checks = (_Weights(targets, recorded, pool), _Settings(base, recorded), beside)
        yield
        for check in checks:
            found = check.fault()
            if found is None:
                continue
            fault, remedy = found
            if not allow_mismatch:
                raise OtherBaseError(f"adapter '{path}' {fault}", remedy)
            warnings.warn(f"adapter '{path}' {fault}; outputs will differ from those in training", stacklevel=5)


def settings_fault(config: Any, recorded: BaseRecord) -> str:
    """In what a model's configuration differs from that of the training, as the end of "adapter 'x' ..."; or empty."""
    now = base_settings(config)
    other = [] if recorded.settings is None or now is None else other_settings(recorded.settings, now)
    more = f" and {len(other) - 1} more" if len(other) > 1 else ""
    return f"was trained on a base model with another configuration ({other[0]}{more})" if other else ""


def _check_shapes(
    base: nn.Module, targets: Mapping[str, frozen.Frozen], recorded: Mapping[str, TensorPrint], path: str
) -> None:
    absent = [name for name in recorded if name not in targets]
    if absent:
        raise OtherBaseError(
            f"adapter '{path}' adapts {len(absent)} layers that {type(base).__name__} does not have (first: "
            f"'{absent[0]}')",
            "load it on the base model it was trained on",
        )
    for name, expected in recorded.items():
        layer: Any = _base_layer(targets[name])
        linear = not isinstance(layer, Stack) and not frozen.is_map(layer)
        if is_offloaded(layer.module if isinstance(layer, Stack) else layer) and not linear:
            raise ConfigError(
                f"adapter '{path}': the weights of '{shown(name, 200)}' are not in memory (offloaded by device_map), "
                "which works for linear layers alone; load the model without offloading, or merge the adapter with "
                "`dude merge`"
            )
        shape = tuple(layer.weight.shape) if frozen.plain_weight(layer) is not None else frozen.shape_of(layer)
        if sorted(shape) != sorted(expected["shape"]):
            raise OtherBaseError(
                f"adapter '{path}': layer '{name}' has shape {list(shape)} here, but {expected['shape']} in training",
                "load it on the base model it was trained on",
            )


class _Weights:
    """The adapted layers' own weights."""

    def __init__(self, targets: Mapping[str, frozen.Frozen], recorded: BaseRecord, pool: ThreadPoolExecutor) -> None:
        self._layers, self._modules = recorded.layers, targets
        held = pool.map(lambda name: _layer_holds(self._modules[name], self._layers[name]), self._layers)
        plain = all(frozen.plain_weight(_base_layer(module)) is not None for module in self._modules.values())
        # Packed layers write into themselves where they are tried, as they are when an adapter is put in.
        self._held = held if plain else list(held)

    def fault(self) -> _Fault | None:
        wrong = [name for name, holds in zip(self._layers, self._held, strict=True) if not holds]
        if not wrong:
            return None
        for name in wrong:  # what has the values of training has no others than numbers
            weight = frozen.plain_weight(_base_layer(self._modules[name]))
            if weight is not None and weight.ndim == 2:
                check_finite(name, weight)
        first = wrong[0]
        fault = f"was trained on different base weights: {len(wrong)} of {len(self._layers)} differ (first: '{first}')"
        weight = stored(_base_layer(self._modules[first]), "weight")
        if not _rounds_to(weight, self._layers[first]):
            return fault, _REMEDY
        dtype, here = self._layers[first]["dtype"], str(weight.dtype).removeprefix("torch.")
        return f"{fault}, rounded to {dtype}; the base is {here} here", f"load it with dtype=torch.{dtype}"


class _Settings:
    """What the model's configuration says of its function."""

    def __init__(self, base: nn.Module, recorded: BaseRecord) -> None:
        self._fault = settings_fault(getattr(base, "config", None), recorded)

    def fault(self) -> _Fault | None:
        return (self._fault, _REMEDY) if self._fault else None


class _Beside:
    """All other tensors that the model computes with."""

    def __init__(self, base: nn.Module, recorded: BaseRecord, path: str, pool: ThreadPoolExecutor) -> None:
        self._path, self._beside = path, recorded.beside
        held = {_plain_name(name): tensor for name, tensor in _tensors(base)}
        self._new = newly_initialised(base)
        self._unknown = [
            name for name in _not_comparable(base) if not {name, name.rpartition(".")[0]} & recorded.layers.keys()
        ]
        self._holds = pool.map(lambda name: name in held and _holds(held[name], self._beside[name]), self._beside)

    def fault(self) -> _Fault | None:
        other = [name for name, same in zip(self._beside, self._holds, strict=True) if not same]
        drawn = [name for name in other if name.rpartition(".")[0] in self._new]
        if drawn:
            warnings.warn(
                f"adapter '{self._path}': '{drawn[0]}' is neither in the adapter nor in the base model's checkpoint, "
                "so it has new random values; outputs that depend on it will differ from training",
                stacklevel=6,
            )
        if self._unknown:
            warnings.warn(
                f"adapter '{self._path}': {len(self._unknown)} weights of the base model are packed or sharded, so "
                f"they were not compared with those in training (first: '{shown(self._unknown[0], 200)}')",
                stacklevel=6,
            )
        wrong = [name for name in other if name not in drawn]
        if not wrong:
            return None
        return (
            f"relies on '{shown(wrong[0], 200)}', which differs here and was not saved with it ({len(wrong)} of "
            f"{len(self._beside)} such tensors)",
            "load it on the model it was trained on, or name it in modules_to_save",
        )


def _tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors by their names, tied ones by each; those that are offloaded come from where they are."""
    for prefix, module in base.named_modules(remove_duplicate=False):
        own = (*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            yield f"{prefix}.{name}" if prefix else name, stored(module, name) if tensor.is_meta else tensor


def _not_comparable(base: nn.Module) -> list[str]:
    return [
        name
        for name, tensor in relied_on(base)
        if isinstance(tensor, nn.Parameter) and not (frozen.is_plain(tensor) or tensor.is_meta or is_lazy(tensor))
    ]


def _plain_name(name: str) -> str:
    return re.sub(r"(\.base_layer)+\.", ".", name.replace(".original_module.", "."))


def _base_layer(module: frozen.Frozen) -> frozen.Frozen:
    return module.target() if isinstance(module, DudeLinear) else module


def _layer_holds(module: frozen.Frozen, expected: TensorPrint) -> bool:
    if isinstance(module, DudeLinear):
        if module.base_fingerprint() == expected:
            return True
        with module.unmerged():
            return frozen.holds(module.target(), expected)
    return frozen.holds(module, expected)


def _holds(tensor: Tensor, seen: TensorPrint) -> bool:
    return tensor.is_meta or not frozen.is_plain(tensor) or same_values(tensor, seen)


def _rounds_to(weight: Any, seen: TensorPrint) -> bool:
    dtype = getattr(torch, seen["dtype"], None)
    plain = isinstance(weight, Tensor) and frozen.is_plain(weight) and isinstance(dtype, torch.dtype)
    return plain and fingerprint(weight.detach().to(dtype)) == seen
