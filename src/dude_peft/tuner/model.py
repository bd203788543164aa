"""DudeModel: what PEFT's `get_peft_model`, `save_pretrained` and `load_adapter` call for a DudeConfig."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
)
from torch import Tensor, nn
from typing_extensions import override

from dude_peft.artifact.stock import EXTRA_A0, LayerTensors, from_stock, stock_names, to_stock
from dude_peft.core.magnitude import row_norm
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.methods.start import Start, check_finite
from dude_peft.parents import fits, require
from dude_peft.show import quoted, shown
from dude_peft.tuner import frozen
from dude_peft.tuner.config import DudeConfig, closest
from dude_peft.tuner.layer import FROZEN, TRAINED, DudeLinear, check_rank
from dude_peft.tuner.patterns import check_pattern
from dude_peft.tuner.starts import compute_starts

_PEFT_PREFIX = "base_model.model."
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# No folder can have these names on Windows.
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}

require(PeftModel, "_enable_peft_forward_hooks")  # which asks the tuner for one


@fits(
    uses=(
        "prefix",
        "tuner_layer_cls",
        "target_module_mapping",
        "_check_new_adapter_config",
        "_prepare_adapter_config",
        "_check_target_module_exists",
        "_get_learnable_bias_state_dict",
    )
)
class DudeModel(BaseTuner):
    """The PEFT tuner: finds the target layers, wraps them, and speaks for them when adapters are saved and loaded."""

    prefix = "lora_"
    tuner_layer_cls = DudeLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @override
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, after every target has been checked, so that a refusal leaves the model as it was."""
        if not _NAME.fullmatch(adapter_name) or adapter_name.upper() in _DEVICES:
            raise ConfigError(
                f"adapter_name {shown(adapter_name)!r}: it names a folder where it is saved; use up to 64 letters, "
                "digits, '_' and '-'"
            )
        config: Any = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        try:
            self._prepare_adapter_config(config, self.get_model_config(model))
        except ValueError as error:
            raise ConfigError(
                f"target_modules is not set, and PEFT has no choice of its own for {type(model).__name__}; "
                "'all-linear' adapts every linear layer"
            ) from error
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            _maybe_include_all_linear_layers(config, model)
            # "all" means all that can be adapted: not the projection inside nn.MultiheadAttention, say.
            unfit = {name for name in config.target_modules if not _is_supported(model.get_submodule(name))}
            # PEFT compares layers_to_transform with suffixes alone, and these are whole names.
            config.target_modules = {n for n in set(config.target_modules) - unfit if _is_wanted_layer(n, config)}
        self._meta, self._starts = low_cpu_mem_usage, dict[str, Start]()
        if state_dict is None:
            targets = self._check_targets(model, config)
            if config._loading is None and not low_cpu_mem_usage:
                self._starts = compute_starts(targets, config)
        with self._places_of(model):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        self._starts.clear()

    def _check_targets(self, model: nn.Module, config: DudeConfig) -> list[tuple[str, nn.Module]]:
        names = [name for name, _ in model.named_modules() if name]
        for key in ("target_modules", "exclude_modules"):
            expression = getattr(config, key)
            if isinstance(expression, str):
                check_pattern(key, expression, names)
        for key in ("rank_pattern", "alpha_pattern"):
            for expression in getattr(config, key) or ():
                check_pattern(key, expression, names, around=r"(.*\.)?({})$")
        _check_layers(config, names)
        if not isinstance(config.target_modules, str):
            for wanted in sorted(config.target_modules or ()):
                if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                    raise ConfigError(_unknown_target(wanted, model, names))
        targets = [
            (name, module)
            for name, module in model.named_modules()
            if name and ".base_layer" not in name and self._check_target_module_exists(config, name)
        ]
        if not targets:
            raise ConfigError(
                f"target_modules={_shown(config.target_modules)} matches no layer of {type(model).__name__} after "
                f"exclude_modules, modules_to_save and layers_to_transform; 'all-linear' adapts every linear layer"
            )
        for name, module in targets:
            layer = _base_of(module)
            if not frozen.is_supported(layer):
                raise ConfigError(
                    f"target '{name}' is a {type(layer).__name__}, which is not a linear layer; adapt linear layers, "
                    f"and train others whole with modules_to_save=[{name.rpartition('.')[2]!r}]"
                )
            check_rank(name, frozen.layer_shape(layer), config.rank_and_alpha(name)[0])
            weight = frozen.plain_weight(layer)
            if weight is not None and weight.device.type != "meta":
                check_finite(name, weight)
        _check_saved_modules(config, names)
        return targets

    @override
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, DudeLinear):
            target.add(adapter_name, peft_config, meta=self._meta, start=self._starts.pop(current_key, None))
            return
        layer = DudeLinear(target, current_key)
        layer.set_adapter(self.active_adapters)
        layer.add(adapter_name, peft_config, meta=self._meta, start=self._starts.pop(current_key, None))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # PEFT's rule: an adapter added beside an active one waits
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _places_of(self, model: nn.Module) -> Iterator[None]:
        """Within: the places of all modules are looked up once; a search per layer takes longer than all else."""
        self._places = _places(model)
        try:
            yield
        finally:
            self._places = {}

    @override
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with self._places_of(self.model):
            unloaded: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        return unloaded

    @override
    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own wants a parameter `weight` of the base layer. Ours is made on its device, so a swap is all there
        # is, in every place where the layer object stands.
        for other, name in self._places[id(child)]:
            if other is not new_module:
                setattr(other, name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names (a different adapter for every row of a batch) is not supported by DuDe layers; "
                "run one batch per adapter with model.set_adapter(name)"
            )
        yield

    @override
    def _check_merge_allowed(self) -> None:
        # PEFT warns of tied embeddings here; our merge gives the layer a weight of its own and leaves the tied one.
        for layer in self.modules():
            if isinstance(layer, DudeLinear):
                layer.check_mergeable()

    @override
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Ours are float32 or better from the start; without autocast PEFT keeps trained tensors in the base's dtype.
        if autocast_adapter_dtype:
            return
        for layer in self.modules():
            if isinstance(layer, DudeLinear):
                dtype = frozen.compute_dtype(layer.get_base_layer())
                for group in (layer.lora_dA, layer.lora_dB, layer.lora_dm):
                    if adapter_name in group:
                        group[adapter_name].to(dtype)

    @classmethod
    @override
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Stock tensors of every layer, with the adapter's name in the keys as PEFT wants them here."""
        tensors: dict[str, Tensor] = {}
        base = {}
        for module_name, layer in _adapted_layers(model, adapter_name):
            state = _from_state_dict(layer, module_name, adapter_name, state_dict)
            for name, tensor in to_stock(state, layer.scaling[adapter_name]).items():
                tensors[f"{module_name}.{_with_adapter(name, adapter_name)}"] = tensor
            base[layer.layer_name] = layer.base_fingerprint()
        config._base = base
        config._quantization = _quantization_of(model)
        tensors.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return tensors

    @classmethod
    @override
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Deviations and starts from stock tensors; refuses what is missing, extra, mis-shaped or not finite."""
        spec = config.spec
        # Layers injected without a PeftModel have no prefix, their files have.
        prefixed = any(name.startswith(_PEFT_PREFIX) for name, _ in model.named_modules())
        prefix = "" if prefixed else _PEFT_PREFIX
        remaining = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
        loaded: dict[str, Tensor] = {}
        missing: list[str] = []
        places: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(name)
        for module_name, layer in _adapted_layers(model, adapter_name):
            keys = {name: f"{module_name}.{name}" for name in stock_names(spec.principal, spec.magnitude)}
            found = {name: remaining.pop(key) for name, key in keys.items() if key in remaining}
            missing += [key for name, key in keys.items() if name not in found]
            if len(found) < len(keys):
                continue
            state = from_stock(
                found,
                spec.principal,
                spec.magnitude,
                layer.r[adapter_name],
                (layer.out_features, layer.in_features),
                module_name.removeprefix(_PEFT_PREFIX),
            )
            if config._loading is None:
                _check_same_base(layer, state)
            for place in places[id(layer)]:
                for group, tensor in _named(state):
                    loaded[_state_key(place, group, adapter_name)] = tensor
        extra = _foreign(remaining, model, config)
        if missing or extra:
            raise ArtifactError(_names_message(missing, extra))
        config._loading = None
        return {**loaded, **remaining}


def _quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """How transformers quantised the model, so that the same base can be made again; None where it did not."""
    settings = getattr(model, "config", None)
    quantised = getattr(settings, "quantization_config", None)
    if quantised is None:
        return None
    config = quantised if isinstance(quantised, dict) else json.loads(quantised.to_json_string(use_diff=False))
    dtype = getattr(settings, "dtype", None) or getattr(model, "dtype", torch.float32)
    return {"config": config, "dtype": str(dtype).removeprefix("torch.")}


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module of the model, by id -> the modules that hold it, and under which name."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_supported(module: nn.Module) -> bool:
    return frozen.is_supported(_base_of(module))


def _adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, DudeLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, DudeLinear) and adapter_name in module.lora_dA:
            yield name.removeprefix("_fsdp_wrapped_module."), module


def _state_key(module_name: str, group: str, adapter_name: str) -> str:
    return f"{module_name}.{group}.{adapter_name}" + (".weight" if group in TRAINED else "")


def _check_same_base(layer: DudeLinear, state: LayerTensors) -> None:
    """Loading over an adapter that is there (Trainer's resume) brings no fingerprint: the row norms stand in for it."""
    with layer.unmerged():
        weight = frozen.plain_weight(layer.get_base_layer())
    if state.m0 is None or weight is None or weight.is_meta:
        return
    if not torch.allclose(row_norm(weight).cpu(), state.m0.cpu().double(), rtol=1e-5, atol=0):
        raise ArtifactError(
            f"the adapter was trained on other base weights: the row norms of '{layer.layer_name}' differ; load the "
            f"base model it was trained on"
        )


def _named(state: LayerTensors) -> Iterator[tuple[str, Tensor]]:
    for group in (*TRAINED, *FROZEN):
        tensor = getattr(state, group.removeprefix("lora_"))
        if tensor is not None:
            yield group, tensor


def _from_state_dict(
    layer: DudeLinear, module_name: str, adapter_name: str, state: Mapping[str, Tensor]
) -> LayerTensors:
    """The layer's state as the given state dict has it (gathered from shards, say)."""
    own = layer.tensors(adapter_name)
    found = {}
    for group, tensor in _named(own):
        found[group.removeprefix("lora_")] = state.get(_state_key(module_name, group, adapter_name), tensor).detach()
    return type(own)(**found)


def _with_adapter(name: str, adapter_name: str) -> str:
    """lora_A.weight -> lora_A.NAME.weight, lora_m0 -> lora_m0.NAME."""
    head, dot, tail = name.partition(".")
    return f"{head}.{adapter_name}{dot}{tail}"


def _foreign(names: Iterable[str], model: nn.Module, config: DudeConfig) -> list[str]:
    """Tensors that are no adapter tensors and do not belong beside them either, as modules_to_save and biases do."""
    wrappers = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    trained_biases = (".bias",) if config.bias != "none" else ()
    return [name for name in names if not name.startswith(wrappers) and not name.endswith(trained_biases)]


def _names_message(missing: list[str], extra: list[str]) -> str:
    parts = []
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            parts.append(f"{len(names)} {what} (first: {', '.join(names[:5])})")
    hint = "save the adapter again, and load it with the configuration it was saved with"
    if any(name.rpartition(".")[2] == EXTRA_A0 for name in missing):
        hint = "a stock PEFT adapter has no DuDe start, load it with peft.PeftModel"
    return f"adapter tensors do not fit the model: {', '.join(parts)}; {hint}"


def _unknown_target(wanted: str, model: nn.Module, names: list[str]) -> str:
    parameters = [n for n, _ in model.named_parameters() if n == wanted or n.endswith(f".{wanted}")]
    if parameters:
        owner = type(model.get_submodule(parameters[0].rpartition(".")[0])).__name__
        return (
            f"target_modules: '{wanted}' is a parameter of {owner} ('{parameters[0]}'), not a linear layer; expert "
            f"tensors are not supported, adapt the attention and dense layers instead"
        )
    return f"target_modules: '{wanted}' is no module of {type(model).__name__}; {closest(wanted, _last_parts(names))}"


def _last_parts(names: list[str]) -> list[str]:
    return sorted({part for name in names if not (part := name.rpartition(".")[2]).isdigit()})


def _layer_index(name: str, config: DudeConfig) -> int | None:
    """Place in the model's list of layers, found as PEFT finds it; None for a module outside of it."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name):
            return int(match["index"])
    return None


def _wanted_layers(config: DudeConfig) -> set[int]:
    layers = config.layers_to_transform
    return set() if layers is None else {layers} if isinstance(layers, int) else set(layers)


def _is_wanted_layer(name: str, config: DudeConfig) -> bool:
    wanted = _wanted_layers(config)
    return not wanted or _layer_index(name, config) in wanted


def _check_layers(config: DudeConfig, names: list[str]) -> None:
    there = {index for name in names if (index := _layer_index(name, config)) is not None}
    if missing := sorted(_wanted_layers(config) - there):
        known = f"it has {min(there)} to {max(there)}" if there else "no module of it lies in a numbered list"
        raise ConfigError(f"layers_to_transform: the model has no layer {missing[0]}; {known}")


def _check_saved_modules(config: DudeConfig, names: list[str]) -> None:
    """PEFT warns of a rank_pattern that matches nothing, but would train nothing here without a word."""
    for wanted in config.modules_to_save or ():
        if not any(name.endswith(wanted) for name in names):
            hint = closest(wanted, _last_parts(names))
            raise ConfigError(f"modules_to_save: {quoted(wanted)} is no module of the model; {hint}")


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets or ()))
