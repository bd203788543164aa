"""What is to be computed: the target layers of a model without weights, and where each one's weight lies.

The model is made on the meta device and adapted by the tuner itself, so that targets, patterns and refusals are those
of `get_peft_model`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from dude_peft.artifact.base_settings import base_settings
from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.header import DTYPES, StoredTensor
from dude_peft.artifact.stacks import layer_shapes
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.init.layer import LayerTask
from dude_peft.methods import Method
from dude_peft.model.architecture import empty_model, parameter_names
from dude_peft.model.layout import Layout, layout_of
from dude_peft.model.weights import WeightFiles, is_plain, print_of
from dude_peft.show import a_, shown
from dude_peft.tuner import DudeConfig, DudeLinear, frozen
from dude_peft.tuner.beside import relied_on
from dude_peft.tuner.stock_loading import warn_if_refused


@dataclass(frozen=True)
class Plan:
    """Everything `dude init` has to do."""

    config: DudeConfig
    """As the tuner resolved it on this model."""
    layers: list[LayerTask]
    adapter_bytes: int
    """Size of the tensors that will be written."""
    beside: dict[str, tuple[StoredTensor, torch.dtype, bool]]
    """Tensors of the base that the adapter relies on beside the adapted ones: the model's dtype of each, and whether
    it has to be finite. A buffer need not be: masks are made of infinities."""
    settings: dict[str, Any] | None
    """The model's, as `BaseRecord` has them."""

    def prints_beside(self) -> dict[str, TensorPrint]:
        """Fingerprints of `beside`, each tensor read once.

        Raises:
            NumericsError: NaN or Inf in an embedding, a norm, a head, or another parameter.
        """
        prints = {
            (stored, dtype, finite): print_of(stored, dtype, finite=finite)
            for stored, dtype, finite in dict.fromkeys(self.beside.values())
        }
        return {name: prints[place] for name, place in self.beside.items()}


def make_plan(
    model_name: str, folder: Path, checkpoint: WeightFiles, config: DudeConfig, dtype: str, seed: int
) -> Plan:
    """Plan of the adapter that `get_peft_model` would make.

    Args:
        model_name: recorded in the adapter as its base.
        folder: with config.json.
        checkpoint: its weights.
        config: configuration of the adapter.
        dtype: of the model: auto (config.json's, or the checkpoint's own), float32, bfloat16, float16.
        seed: of torch's generator, for methods with a random start.

    Raises:
        ConfigError: a model that cannot be adapted so.
        ArtifactError: a weight is missing, or its shape does not fit.
    """
    model = empty_model(model_name, folder, checkpoint.dtype, dtype)
    names_of, layout = parameter_names(model), layout_of(model, checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # What get_peft_model does, which has no way of its own to leave the tensors empty.
    config.base_model_name_or_path = model_name
    adapted: Any = peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    layers, size = [], 0
    torch.manual_seed(seed)
    for module in adapted.modules():
        if not isinstance(module, DudeLinear):
            continue
        base: Any = module.get_base_layer()
        if frozen.is_map(base):
            raise ConfigError(
                f"target '{module.layer_name}' is {a_(type(base).__name__)}, and dude init writes the start of linear "
                "layers alone; leave it out with --exclude-modules, or initialise in memory with get_peft_model"
            )
        if frozen.plain_weight(base) is None:
            raise ConfigError(
                f"target '{module.layer_name}' is {a_(type(base).__name__)}, which has no plain weight matrix; leave "
                "it out with --exclude-modules, or initialise in memory with get_peft_model"
            )
        stored = layout.find(f"{module.layer_name}.weight", names_of[id(base.weight)])
        if not is_plain(stored):
            raise ConfigError(
                f"tensor '{shown(stored.name)}' has dtype {shown(stored.dtype)}: the start cannot be computed from a "
                "quantised checkpoint; use the unquantised one"
            )
        if stored.shape != tuple(base.weight.shape):
            raise ArtifactError(
                f"tensor '{shown(stored.name)}' has shape {stored.shape}, but config.json needs "
                f"{tuple(base.weight.shape)}; they belong to different models"
            )
        (r,), (scaling,) = module.r.values(), module.scaling.values()
        state = ""
        if config.spec.draws:
            state = bytes(torch.get_rng_state().tolist()).hex()
            shape = torch.empty(module.out_features, module.in_features, device="meta")
            config.spec.begin(shape, r, scaling, config.split_options)  # moves the generator on
        dtype_name = str(base.weight.dtype).removeprefix("torch.")
        transposed = frozen.is_transposed(base)
        layers.append(LayerTask(module.layer_name, stored, dtype_name, transposed, r, scaling, state))
        size += saved_bytes(module, config.spec, r)
    _check_whole(model, shapes, names_of.values(), layout)
    if config.spec.ranked:
        warn_if_refused(model, config.stock(), [task.name for task in layers])
    beside = {}
    for name, tensor in relied_on(model):
        place = layout.whole(names_of.get(id(tensor), [name]))
        if place is not None and frozen.is_plain(tensor):
            beside[name] = place, tensor.dtype, isinstance(tensor, torch.nn.Parameter)
    return Plan(config, layers, size, beside, base_settings(model.config))


def _check_whole(
    model: Any, shapes: dict[str, tuple[int, ...]], parameters: Iterable[list[str]], layout: Layout
) -> None:
    """Refuse a checkpoint that `load_model` would: what is not adapted has to be there as well, and to fit."""
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    absent = []
    for names in parameters:
        stored, wanted = layout.whole(names), next(shapes[name] for name in names if name in shapes)
        if stored is not None and stored.shape != wanted:
            raise ArtifactError(
                f"tensor '{shown(stored.name)}' has shape {stored.shape}, but config.json needs {wanted}; they belong "
                "to different models"
            )
        if stored is not None and stored.dtype not in DTYPES:
            raise ConfigError(
                f"tensor '{shown(stored.name)}' has dtype {shown(stored.dtype)}, no float dtype; use the unquantised "
                "checkpoint"
            )
        made = any(name in layout.made for name in names)
        if stored is None and not made and not any(each.search(name) for each in optional for name in names):
            absent.append(names[0])
    if absent:
        raise ArtifactError(
            f"the checkpoint lacks {len(absent)} tensors of {type(model).__name__}, among them '{shown(absent[0])}'; "
            "use a complete causal language model"
        )


def saved_bytes(layer: DudeLinear, method: Method, r: int) -> int:
    """Size of the tensors that an adapter file holds of one layer."""
    numbers = sum(math.prod(shape) for shape in layer_shapes(method, r, layer.shape).values())
    base: Any = layer.target()
    return numbers * torch.promote_types(base.weight.dtype, torch.float32).itemsize
