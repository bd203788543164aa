"""DudeModel: what PEFT's `get_peft_model`, `save_pretrained` and `load_adapter` call for a DudeConfig."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from dude_peft.artifact.base_settings import base_settings
from dude_peft.artifact.form import OUT_PROJECTION
from dude_peft.artifact.manifest import BaseRecord
from dude_peft.artifact.stacks import from_disk, to_disk
from dude_peft.artifact.stock import EXTRA_A0, LayerTensors, layer_tensors, stock_names
from dude_peft.core.finite import first_not_finite, is_finite
from dude_peft.core.magnitude import row_norm
from dude_peft.doors import read_json
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.methods import Delta
from dude_peft.methods.start import Start, check_finite
from dude_peft.parents import fits, require
from dude_peft.show import a_, quoted, shown
from dude_peft.task_types import SCORES
from dude_peft.tuner import frozen
from dude_peft.tuner.all_linear import choose, packed_layers
from dude_peft.tuner.attention import DudeAttention, DudeProjection, projections_of, why_no_attention
from dude_peft.tuner.beside import prints_beside
from dude_peft.tuner.config import DudeConfig, closest
from dude_peft.tuner.experts import DudeExperts, layers_in
from dude_peft.tuner.heads import (
    embedding_modules,
    enter_head,
    newly_initialised,
    trained_whole,
    usual_heads,
    warn_of_drawn,
)
from dude_peft.tuner.layer import FROZEN, TRAINED, DudeLinear, check_rank
from dude_peft.tuner.mapped import DudeConv, DudeEmbedding
from dude_peft.tuner.maps import is_map
from dude_peft.tuner.patterns import check_patterns, exactly
from dude_peft.tuner.stack_targets import check_stacks, patterns_of_stacks, stacks_of
from dude_peft.tuner.stacks import Stack
from dude_peft.tuner.starts import compute_starts
from dude_peft.tuner.stock_loading import warn_if_refused
from dude_peft.tuner.tied import DudeTiedHead, sharing, why_not_tied
from dude_peft.tuner.together import Together
from dude_peft.tuner.weighted import plan_sum

# Modules whose children are named after adapters.
_BY_ADAPTER = (*TRAINED, *FROZEN, "modules_to_save")
_PEFT_PREFIX = "base_model.model."
_FSDP_PREFIX = "_fsdp_wrapped_module."
# Names inside an adapted layer. PEFT takes every module whose name ends in an entry of modules_to_save.
_INSIDE = ("base_layer", "lora_dropout", *TRAINED, "lora_f")
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
                f"adapter_name {shown(adapter_name)!r}: the name becomes a folder name; use up to 64 letters, digits, "
                "'_' and '-'"
            )
        if hasattr(nn.ModuleDict(), adapter_name):  # 'train', 'keys': torch keeps modules beside its own attributes
            raise ConfigError(f"adapter_name '{adapter_name}' is an attribute of torch's modules; choose another one")
        config: Any = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        if config._loading is None:
            enter_head(model, config)
            warn_of_drawn(model, config)
        if config.modules_to_save is not None:
            config.modules_to_save = _told_apart(config.modules_to_save, model, list(self.peft_config))
        try:
            self._prepare_adapter_config(config, self.get_model_config(model))
        except ValueError as error:
            if config.target_parameters:
                raise ConfigError(
                    f"target_modules is not set, and PEFT has no default for {type(model).__name__}; set it to [] to "
                    "adapt target_parameters alone"
                ) from error
            raise ConfigError(
                f"target_modules is not set, and PEFT has no default for {type(model).__name__}; 'all-linear' adapts "
                "every linear layer"
            ) from error
        stacks = _stacks(model, config)
        check_patterns(vars(config), [*(name for name, _ in model.named_modules() if name), *stacks])
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = {*(config.target_modules or ()), *packed_layers(model)}
            self._leave_out(model, config)
        self.__dict__.setdefault("_together", Together())
        self._tied = self._ties(model, config)
        self._meta, self._starts = low_cpu_mem_usage or config._is_sent, dict[str, tuple[Start, ...]]()
        if state_dict is None:
            targets = [*self._check_targets(model, config, stacks), *stacks.items()]
            if config._loading is None and not self._meta:
                self._starts = compute_starts(targets, config)
        elif stacks:
            raise ConfigError(
                "target_parameters and a state_dict do not go together; load the adapter with load_adapter"
            )
        with self._places_of(model), patterns_of_stacks(config, stacks):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self._tie(model)
        self._starts.clear()
        for wrapper in self._wrappers() if config.modules_to_save else ():
            wrapper.training = wrapper.original_module.training
        if config.bias != "none" and config._loading is None:
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            if not any("bias" in name for name in trained):
                warnings.warn(f"bias: {config.bias} trains nothing here, for these layers have no bias", stacklevel=2)

    @override
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and trainable but in inference mode; all others wait.

        Args:
            adapter_name: one name or several; none at all leaves the base model.
            inference_mode: whether the active ones stay frozen.

        Raises:
            ConfigError: there is no such adapter, or two of them train the same module whole.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        self._check_one_each(names)
        if names:
            super().set_adapter(adapter_name, inference_mode)
        else:  # of which PEFT's own has no idea where modules are trained whole
            self._activate([])

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where no other one is active, the first of the rest by name becomes active, as a whole.

        What the others train stays as it was.

        Raises:
            ConfigError: there is no such adapter, or it is merged.
        """
        self._check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise ConfigError(f"adapter '{adapter_name}' is merged; call unmerge_adapter() before you delete it")
        active = [name for name in self.active_adapters if name != adapter_name]
        fallback = [] if active else sorted(set(self.peft_config) - {adapter_name})[:1]
        if fallback and adapter_name in self.active_adapters:
            warnings.warn(f"adapter '{adapter_name}' was active; '{fallback[0]}' is now", stacklevel=2)
            active = fallback
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._activate(active)
        for layer in self._layers():
            layer.delete_adapter(adapter_name)
        for wrapper in self._wrappers():
            wrapper.delete_adapter(adapter_name, new_active_adapters=None)
        del self.peft_config[adapter_name]
        self._activate(active)
        _restore_requires_grad(trained)
        if active and active == fallback:
            self.set_requires_grad(fallback, not self.peft_config[fallback[0]].inference_mode)

    @override
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base layers; those that are active beside them stay applied.

        Args:
            adapter_names: None means the active ones.
            safe_merge: PEFT's flag; NaN and Inf are always refused.

        Raises:
            ConfigError: there is no such adapter, or a base weight is quantised.
            NumericsError: a merged weight overflows its dtype. Nothing is merged then.
        """
        if isinstance(adapter_names, list):
            self._check_known(adapter_names)
        before = [(layer, layer.merged_adapters) for layer in self._layers()]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, names in before:
                layer.keep_merged(names)
            raise

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a combination of others: of what they do to the weights, `W'_i - W0`.

        - "linear" and "cat": `W0 + sum_i w_i (W'_i - W0)`, exactly, for every method and any mixture of them. The new
          rank is the sum of theirs, twice r for methods with a frozen start. (PEFT's "linear" adds the factors up,
          which is another function.)
        - "svd": the same sum, the best there is of rank `svd_rank`.
        - "ties", "dare_linear", "dare_ties", "magnitude_prune", with or without "_svd": PEFT's, on the entries of
          `W'_i - W0` as `dude merge` has them, then the best of rank `svd_rank`.

        The new adapter is a DoRA where one of the others has a magnitude, else a LoRA. It is not active, and frozen.

        Args:
            adapters: names; they may have any ranks and layers.
            weights: w_i, negative ones too.
            adapter_name: name of the new one.
            combination_type: as above.
            svd_rank: None is the largest rank of `adapters` (twice r with a frozen start); all for linear and cat.
            density: share of the entries that is kept, for those that drop some.
            majority_sign_method: "total" or "frequency", for ties.

        Raises:
            ConfigError: a name, weight or rank that cannot be, or an adapter that trains modules or biases whole.
            NumericsError: the weights take a row to zero or to infinity.
        """
        self._check_known(adapters)
        configs: Any = self.peft_config
        if stacked := next((name for name in adapters if configs[name].target_parameters), None):
            raise ConfigError(
                f"adapter '{stacked}' has stacks of experts, which add_weighted_adapter cannot combine; use dude merge"
            )
        if adapter_name in self.peft_config:
            raise ConfigError(f"the model already has an adapter {quoted(adapter_name)}; choose another adapter_name")
        total = plan_sum(configs, adapters, weights, combination_type, svd_rank, density, majority_sign_method)
        layers = [layer for layer in self._layers() if any(name in layer.r for name in adapters)]
        with torch.no_grad():
            factors = [total.factors(layer) for layer in layers]
        ranks = {layer.layer_name: total.rank_in(layer) for layer in layers}
        r = max(ranks.values())
        own_ranks = {
            exactly(name): rank for name, rank in ranks.items() if rank != r and not name.endswith(OUT_PROJECTION)
        }
        configs[adapter_name] = replace(
            configs[adapters[0]],
            method="dora" if total.magnitude else "lora",
            r=r,
            lora_alpha=r,
            rank_pattern=own_ranks,
            alpha_pattern=own_ranks,
            target_modules=sorted(name for name in ranks if not name.endswith(OUT_PROJECTION)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        try:
            with torch.random.fork_rng(devices=[]):  # the start that is drawn is not used
                self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer, (A, B, dm) in zip(layers, factors, strict=True):
            layer.put_factors(adapter_name, A, B, dm)
        self.set_requires_grad(adapter_name, False)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As of transformers, where no adapter counts the tokens; of the present number there is nothing to do.

        Raises:
            ConfigError: an adapted or wholly trained module has a row for every token. Nothing was resized.
        """
        model: Any = self.model
        places = (model.get_input_embeddings(), model.get_output_embeddings())
        if not any(isinstance(place, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for place in places):
            resized: nn.Module = model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
            return resized
        embedding: nn.Module = places[0]
        if new_num_tokens in (None, len(embedding.weight)) and not args and not kwargs:  # type: ignore[arg-type]
            return embedding
        raise ConfigError(
            f"resize_token_embeddings({new_num_tokens}): the adapter has numbers for each of the present tokens; "
            "resize the model first, then call get_peft_model or load_adapter"
        )

    @override
    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        trained = [(p, p.requires_grad) for wrapper in self._wrappers() for p in wrapper.parameters()]
        super()._enable_adapter_layers(enabled)
        _restore_requires_grad(trained)  # PEFT's wrappers would make the active adapter's modules trainable

    def _layers(self) -> list[DudeLinear]:
        return [module for module in self.model.modules() if isinstance(module, DudeLinear)]

    def _wrappers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]

    def _activate(self, names: list[str]) -> None:
        """Make these adapters active, without a look at what is merged."""
        for wrapper in self._wrappers():
            wrapper.set_adapter([name for name in names if name in wrapper._adapters])
        for layer in self._layers():
            layer.set_adapter(names)
        self.active_adapter = names

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise ConfigError(f"there is no adapter {quoted(name)}; {closest(name, self.peft_config)}")

    def _check_one_each(self, names: Sequence[str]) -> None:
        """Refuse two adapters at a time that train the same module whole: one copy of it can be in use."""
        if len(set(names)) < 2:
            return
        for place, wrapper in self.model.named_modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                own = [name for name in dict.fromkeys(names) if name in wrapper._adapters]
                if len(own) > 1:
                    raise ConfigError(
                        f"adapters '{own[0]}' and '{own[1]}' both train '{place}' in full, so only one of them can be "
                        "active; choose one"
                    )

    def _leave_out(self, model: nn.Module, config: DudeConfig) -> None:
        """Of all linear layers keep those that all-linear means, and say once which are left out."""
        # Nothing that is trained whole, or was drawn by chance and is saved with no adapter.
        other = trained_whole(model, config) | set(newly_initialised(model))
        names = sorted(set(config.target_modules or ()) - other)
        found = [name for name in names if self._check_target_module_exists(config, name)]
        # PEFT compares layers_to_transform with suffixes alone, and these are whole names.
        wanted = [(name, frozen.base_of(model.get_submodule(name))) for name in found if _is_wanted_layer(name, config)]
        kept, left_out = choose(model, wanted, config)
        config.target_modules = kept  # type: ignore[assignment]  # as PEFT has it, a set
        if left_out:
            warnings.warn(left_out, stacklevel=2)

    def _check_targets(
        self, model: nn.Module, config: DudeConfig, stacks: Mapping[str, Stack]
    ) -> list[tuple[str, nn.Module | Stack]]:
        names = [name for name, _ in model.named_modules() if name]
        _check_layers(config, names)
        if not isinstance(config.target_modules, str):
            for wanted in sorted(config.target_modules or ()):
                if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                    raise ConfigError(_unknown_target(wanted, model, names))
        targets = [
            (name, module)
            for name, module in model.named_modules()
            if name and name not in self._tied and self._is_target(config, name)
        ]
        if not targets and (config.target_modules or not stacks):
            raise ConfigError(_no_target(config, model, names))
        for name, module in targets:
            layer = frozen.base_of(module)
            if isinstance(module, DudeTiedHead):
                raise ConfigError(
                    f"target '{name}' follows the embedding, which another adapter changes; name the embedding itself"
                )
            if isinstance(layer, nn.MultiheadAttention):
                _check_attention(name, layer, config)
                continue
            if reason := frozen.why_not(layer):
                place, _, last = name.rpartition(".")
                remedy = f"adapt linear layers, and train others in full with modules_to_save=[{last!r}]"
                if isinstance(layer, NonDynamicallyQuantizableLinear):
                    remedy = f"name the attention itself, '{place}'"
                raise ConfigError(f"target '{name}' {reason}; {remedy}")
            if is_map(layer) and not config.spec.ranked:
                raise ConfigError(
                    f"target '{name}' is {a_(type(layer).__name__)}, which method {config.method!r} does not adapt; "
                    "choose a method with a rank, or leave the layer out"
                )
        parts = [part for name, module in targets for part in _parts_of(name, module).items()]
        for name, part in parts:
            frozen_part = part.target() if isinstance(part, DudeLinear) else part
            check_rank(config.spec, name, frozen.shape_of(frozen_part), config.rank_and_alpha(name)[0])
            weight = frozen.plain_weight(frozen_part)
            if config._loading is None and weight is not None and weight.device.type != "meta":
                check_finite(name, weight)
        _check_saved_modules(config, names)
        _check_output_layer(model, targets)
        whole = trained_whole(model, config)
        check_stacks(stacks, config, whole)
        if both := next((name for name in (*dict(targets), *self._tied) if name in whole), None):
            raise ConfigError(
                f"'{both}' is in target_modules and, by its ending, in modules_to_save={config.modules_to_save}, where "
                "PEFT compares the endings of names; leave it out of one, or write longer names"
            )
        return parts

    def _is_target(self, config: DudeConfig, name: str) -> bool:
        return not set(_INSIDE) & set(name.split(".")) and bool(self._check_target_module_exists(config, name))

    def _ties(self, model: nn.Module, config: DudeConfig) -> dict[str, str]:
        """Layers that share the weight of a target embedding, with its name; the configuration is told of them."""
        found: dict[str, str] = {}
        asked = config.ensure_weight_tying
        for name, module in model.named_modules():
            if not isinstance(frozen.base_of(module), nn.Embedding) or set(_INSIDE) & set(name.split(".")):
                continue
            named = self._is_target(config, name)
            if not (named or asked):
                continue
            others = sharing(model, module)
            if not named and asked and any(self._is_target(config, other) for other in others):
                _add_target(config, name)
                named = True
            if named:
                _check_tied(name, others)
                found |= dict.fromkeys(others, name)
        if config._loading is not None and asked != bool(found):
            then, now = ("shared one weight", "are two") if asked else ("were two", "share one weight")
            raise ArtifactError(
                f"the adapter was trained where the embedding and the output layer {then}, and here they {now}; load "
                "the base model it was trained on"
            )
        if asked and not found:
            raise ConfigError(
                "ensure_weight_tying: no target is an embedding that shares its weight with an output layer; leave it "
                "out, or name the embedding in target_modules"
            )
        config.ensure_weight_tying = bool(found)
        return found

    def _tie(self, model: nn.Module) -> None:
        """Put a layer of ours into the place of every output layer that follows an embedding."""
        for name, source in self._tied.items():
            embedding, target = model.get_submodule(source), model.get_submodule(name)
            if isinstance(embedding, DudeEmbedding) and not isinstance(target, DudeTiedHead):
                layer = DudeTiedHead(target, embedding)
                layer.train(target.training)
                self._replace_module(model, "", layer, target)

    @override
    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        # PEFT warns of tied layers here, which ours keep tied, or untie where the output layer alone is a target.
        pass

    @override
    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        names = list(_stacks(model, peft_config))
        for name in names:
            place, _, parameter_name = name.rpartition(".")
            outer = model.get_submodule(place)
            layer = next((one for one in layers_in(outer) if one.parameter_name == parameter_name), None)
            if layer is None:
                layer = DudeExperts(outer, name, parameter_name)
                self._put_in_place(layer, adapter_name, peft_config)
                self._replace_module(model, "", layer, outer)
                self._places[id(layer)] = self._places[id(outer)]
            else:
                layer.add(adapter_name, peft_config, meta=self._meta, starts=self._starts.pop(name, None))
        return names

    def _put_in_place(self, layer: DudeLinear, adapter_name: str, config: DudeConfig) -> None:
        """A new layer's first adapter, and the state that the layer under it is in."""
        layer.join(self._together)
        layer.set_adapter(self.active_adapters)
        layer.add(adapter_name, config, meta=self._meta, starts=self._starts.pop(layer.layer_name, None))
        if not layer.base_layer.training:
            layer.eval()
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # PEFT's rule: an adapter added beside an active one waits

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
        if current_key in self._tied:
            return  # it follows its embedding
        if isinstance(target, DudeLinear):
            for layer in _layers_of(target):
                starts = self._starts.pop(layer.layer_name, None)
                layer.add(adapter_name, peft_config, meta=self._meta, starts=starts)
            return
        layer = _layer_for(target, current_key)
        for each in _layers_of(layer):
            self._put_in_place(each, adapter_name, peft_config)
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
    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """The plain model. Everything is merged, or taken out, before the first layer goes; a refusal changes nothing.

        PEFT's own would leave merged adapters in what `unload` calls the base model, with the modules that the active
        adapter trained whole, and would take those whatever adapters are merged.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        layers = self._layers()
        if merge:
            self._check_one_each(wanted)
            self.merge_adapter(adapter_names, safe_merge)
        elif any(layer.merged for layer in layers):
            warnings.warn(
                "unload() returns the base model without the merged adapters; use merge_and_unload() to keep them",
                stacklevel=3,
            )
            self.unmerge_adapter()
        for wrapper in self._wrappers():
            wrapper.set_adapter([name for name in wanted if merge and name in wrapper._adapters])
        with self._places_of(self.model):
            for layer in layers:  # PEFT's own looks for each by its name, and into all of its modules
                if not isinstance(layer, DudeProjection):
                    self._replace_module(self.model, "", layer.get_base_layer(), layer)
            unloaded: Any = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=[])
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
    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT's own lists all parameters by name several times; here the base model's are frozen in one walk.
        for parameter in _frozen_parameters(model):
            parameter.requires_grad = False
        configs: Any = self.peft_config
        if any(configs[name].bias != "none" for name in self.active_adapters):
            super()._mark_only_adapters_as_trainable(model)

    @override
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Ours are float32 or better from the start; without autocast PEFT keeps trained tensors in the base's dtype.
        if autocast_adapter_dtype:
            return
        for layer in self.modules():
            if isinstance(layer, DudeLinear):
                dtype = frozen.compute_dtype(layer.target())
                for group in (getattr(layer, name) for name in TRAINED):
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
        """Stock tensors of every layer, by their names in the file; refuses NaN and Inf, whoever saves.

        The file says rank and alpha alone, so a scaling that was set by hand is folded into B and B0.
        """
        _put_back(model, adapter_name, state_dict, unwanted_adapter_names)
        tensors: dict[str, Tensor] = {}
        base = {}
        for module_name, layer in _adapted_layers(model, adapter_name):
            own = layer.own_scaling[adapter_name]
            state = _from_state_dict(config, layer, module_name, adapter_name, state_dict)
            state = _scaled(state, layer.scaling[adapter_name] / own, config)
            for name, tensor in layer.form.written(to_disk(state, own)).items():
                tensors[f"{layer.place(module_name)}.{name}"] = tensor
            base[layer.layer_name] = layer.base_fingerprint()
        _refuse_not_finite(tensors, state_dict, adapter_name)
        base_model = _base_model(model)
        config._beside = prints_beside(base_model, config._beside)
        beside = {name: seen for name, (_, seen) in config._beside.items()}
        scores = bool(usual_heads(config)) and config.task_type == SCORES
        settings = base_settings(getattr(base_model, "config", None), scores=scores)
        config._base = BaseRecord(base, beside, settings, _quantization_of(model))
        config._left_out = tuple(_needless(model, config))
        if config.is_stock:
            warn_if_refused(base_model, config.stock(), base)
        tensors.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return tensors

    @classmethod
    @override
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # No key has one. PEFT's own would make `lm_head` of the `lm_head.weight` of an adapter named "weight".
        return key

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
        places: dict[DudeLinear, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, DudeLinear) and adapter_name in module.r:
                places.setdefault(module, []).append(name)
        for layer, names in places.items():
            place, form = layer.place(names[0].removeprefix(_FSDP_PREFIX)), layer.form
            keys = {name: f"{place}.{form.name(name)}" for name in stock_names(spec)}
            found = {name: remaining.pop(key) for name, key in keys.items() if key in remaining}
            missing += [key for name, key in keys.items() if name not in found]
            if len(found) < len(keys):
                continue
            where = place.removeprefix(_PEFT_PREFIX)
            state = from_disk(form.read(found), spec, layer.r[adapter_name], layer.shape, where)
            if config._loading is None:
                _check_same_base(layer, state)
            for module_name in names:
                for name, tensor in state.kept.items():
                    loaded[_state_key(module_name, name, adapter_name, spec.delta)] = tensor
        extra = _foreign(remaining, model, config) if remaining else []
        if missing or extra:
            raise ArtifactError(_names_message(missing, extra))
        if remaining:
            _check_whole(remaining, model)
        config._loading = None
        for layer in places:
            layer.scaling[adapter_name] = layer.own_scaling[adapter_name]  # that of the file, which has it folded in
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


def _restore_requires_grad(before: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in before:
        if parameter.is_leaf:  # FSDP's views are not
            parameter.requires_grad_(requires_grad)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module of the model, by id -> the modules that hold it, and under which name."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def _layer_for(target: nn.Module, name: str) -> DudeLinear:
    """The layer of ours that goes in the place of a frozen one."""
    if isinstance(target, nn.MultiheadAttention):
        return DudeAttention(target, name)
    kind = DudeEmbedding if isinstance(target, nn.Embedding) else DudeConv if is_map(target) else DudeLinear
    return kind(target, name)


def _layers_of(layer: DudeLinear) -> list[DudeLinear]:
    """The layer itself, and the one inside an attention."""
    return [layer, layer.out_projection] if isinstance(layer, DudeAttention) else [layer]


def _parts_of(name: str, module: nn.Module) -> dict[str, nn.Module | Stack]:
    """What an adapter of a target changes, by the names of the layers."""
    return projections_of(name, module) if isinstance(frozen.base_of(module), nn.MultiheadAttention) else {name: module}


def _frozen_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the base model, under adapted layers too, without what adapters train whole."""
    waiting = [model]
    while waiting:
        module = frozen.base_of(waiting.pop())
        if not isinstance(module, AuxiliaryTrainingWrapper):
            yield from (parameter for parameter in module._parameters.values() if parameter is not None)
            waiting += (child for child in module._modules.values() if child is not None)


def _adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, DudeLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, DudeLinear) and adapter_name in module.r:
            yield name.removeprefix(_FSDP_PREFIX), module


def _check_same_base(layer: DudeLinear, state: LayerTensors) -> None:
    """Loading over an adapter that is there (Trainer's resume) brings no fingerprint: the row norms stand in for it."""
    with layer.unmerged():
        weight = frozen.plain_weight(layer.target())
    if state.m0 is None or weight is None or weight.is_meta:
        return
    if not torch.allclose(row_norm(weight).cpu(), state.m0.cpu().double(), rtol=1e-5, atol=0):
        raise ArtifactError(
            f"the adapter was trained on different base weights: the row norms of '{layer.layer_name}' differ; load "
            "the base model it was trained on"
        )


def _state_key(module_name: str, name: str, adapter_name: str, delta: Delta | None) -> str:
    """Where a state dict has what a layer keeps under `name`."""
    for group, names in (("lora_t", delta.trained), ("lora_f", delta.frozen)) if delta is not None else ():
        if name in names:
            return f"{module_name}.{group}.{adapter_name}.{name}"
    return f"{module_name}.lora_{name}.{adapter_name}" + (".weight" if f"lora_{name}" in TRAINED else "")


def _from_state_dict(
    config: DudeConfig, layer: DudeLinear, module_name: str, adapter_name: str, state: Mapping[str, Tensor]
) -> LayerTensors:
    """The layer's state as the given state dict has it (gathered from shards, say)."""
    found, delta = {}, config.spec.delta
    for name, tensor in layer.kept(adapter_name).items():
        found[name] = state.get(_state_key(module_name, name, adapter_name, delta), tensor).detach()
    if delta is not None:  # on the CPU, where a product has all digits of its dtype
        found = {name: tensor.cpu() for name, tensor in found.items()}
    return layer_tensors(delta, found)


def _refuse_not_finite(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], adapter_name: str) -> None:
    """Raises NumericsError before a file is written that no loader would take."""
    whole = ((name, tensor) for name, tensor in state.items() if f".modules_to_save.{adapter_name}." in name)
    found = first_not_finite([*tensors.items(), *whole])
    if found is not None:
        raise NumericsError(
            f"adapter tensor {quoted(found.removeprefix(_PEFT_PREFIX), 200)} holds NaN or Inf and is not saved; "
            "training diverged: lower the learning rate, and continue from an earlier checkpoint"
        )


def _scaled(state: LayerTensors, factor: float, config: DudeConfig) -> LayerTensors:
    """The state whose change `dB A + B0 dA` is `factor` times that of another."""
    if factor == 1:
        return state
    if state.trained is not None:
        raise ConfigError(
            f"the adapter's scaling was set by hand, and {config.method} has no factor to fold it into; call "
            "unscale_layer() before saving"
        )
    return state._replace(dB=state.dB * factor, B0=None if state.B0 is None else state.B0 * factor)


def _put_back(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], others: Sequence[str]) -> None:
    """Give back what PEFT took for another adapter's: all tensors with that one's name as a part of theirs.

    An adapter may be named "0", "weight" or "lm_head", as a layer, a parameter or a module is.
    """
    if not others:
        return
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        name = name.removeprefix(_FSDP_PREFIX)
        parts = name.split(".")
        if name in state_dict or not any(other in parts for other in others):
            continue
        owner = next((after for part, after in pairwise(parts) if part in _BY_ADAPTER), adapter_name)
        if owner != adapter_name:
            continue
        if frozen.is_sharded(tensor):
            other = next(other for other in others if other in parts)
            raise ConfigError(
                f"adapter '{other}' has the name of a part of '{name}', which is sharded, so both cannot be saved; "
                "rename one"
            )
        state_dict[name] = tensor.detach()


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _needless(model: nn.Module, config: DudeConfig) -> Iterator[str]:
    """Beginnings of the names of tensors that PEFT saves beside embeddings and biases, and no loader needs.

    The weight under an adapted layer is the base's, our own tensors are in the file in their stock form already, and so
    is the trained copy of a module.
    """
    untrained = "base_layer." if config.bias == "none" else "base_layer.weight"
    for name, module in model.named_modules():
        place = name if name.startswith(_PEFT_PREFIX) else f"{_PEFT_PREFIX}{name}"
        if isinstance(module, DudeTiedHead):
            yield f"{place}.{untrained}"
        elif isinstance(module, DudeLinear):
            inner = "base_layer.in_proj_" if isinstance(module, DudeAttention) else untrained
            yield from (f"{place}.{part}" for part in (inner, "lora_dA.", "lora_dB.", "lora_dm.", "lora_B0"))
            yield from (f"{place}.{part}.{adapter}." for part in ("lora_t", "lora_f") for adapter in module.r)
        elif isinstance(module, ModulesToSaveWrapper):
            yield from (f"{place}.{part}." for part in ("original_module", "modules_to_save"))


def _foreign(names: Iterable[str], model: nn.Module, config: DudeConfig) -> list[str]:
    """Tensors that are no adapter tensors and do not belong beside them either.

    Modules that are trained whole and biases do, and embeddings, which PEFT saves by itself where they were resized.
    """
    embeddings = embedding_modules(_base_model(model))
    beside = tuple(
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AuxiliaryTrainingWrapper) or module in embeddings
    )
    trained_biases = (".bias",) if config.bias != "none" else ()
    return [name for name in names if not name.startswith(beside) and not name.endswith(trained_biases)]


def _check_whole(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse tensors for whole parameters that do not fit, are not finite, or would change the base of others."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    alone = len(getattr(model, "peft_config", {})) < 2
    for name, tensor in tensors.items():
        where, there = quoted(name.removeprefix(_PEFT_PREFIX), 200), held.get(name)
        if there is None:
            continue
        if there.shape != tensor.shape:
            raise ArtifactError(
                f"adapter tensor {where} is {list(tensor.shape)}, the model's {list(there.shape)}: load it on a model "
                f"of the same sizes (num_labels; for added tokens call model.resize_token_embeddings({len(tensor)}))"
            )
        if not is_finite(tensor):
            raise NumericsError(f"tensor {where} holds NaN or Inf; training diverged, use an earlier checkpoint")
        own = alone or there.is_meta or ".modules_to_save." in name
        if not own and not torch.equal(tensor.to(there), there):
            raise ArtifactError(
                f"the adapter's {where} differs from the model's, which its other adapters use; load it on a separate "
                "model"
            )


def _names_message(missing: list[str], extra: list[str]) -> str:
    parts = []
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            parts.append(f"{len(names)} {what} (first: {', '.join(names[:5])})")
    hint = "save the adapter again, and load it with the configuration it was saved with"
    if any(name.rpartition(".")[2] == EXTRA_A0 for name in missing):
        hint = "a stock PEFT adapter has no DuDe start; load it with peft.PeftModel"
    return f"adapter tensors do not fit the model: {', '.join(parts)}; {hint}"


def _unknown_target(wanted: str, model: nn.Module, names: list[str]) -> str:
    parameters = [(n, p) for n, p in model.named_parameters() if n == wanted or n.endswith(f".{wanted}")]
    if parameters:
        name, parameter = parameters[0]
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        remedy = "name stacks of experts in target_parameters"
        if owner == "MultiheadAttention":
            remedy = "name the attention itself"
        elif parameter.ndim != 3:
            remedy = "leave it out, or train its module whole with modules_to_save"
        return f"target_modules: '{wanted}' is a parameter of {owner} ('{name}'), not a linear layer; {remedy}"
    hint = closest(wanted, _last_parts(names))
    return f"target_modules: {quoted(wanted)} is not a module of {type(model).__name__}; {hint}"


def _no_target(config: DudeConfig, model: nn.Module, names: list[str]) -> str:
    wanted, kind = config.target_modules, type(model).__name__
    if not wanted:  # all-linear, or PEFT's choice for this model
        return (
            f"no linear layer of {kind} is left to adapt after exclude_modules, modules_to_save and "
            "layers_to_transform; exclude fewer layers"
        )
    if isinstance(wanted, str) and wanted in _last_parts(names):
        return (
            f"target_modules='{wanted}' is a regular expression for whole names, and matches none of {kind}'s; write "
            f"['{wanted}'] for all modules with that ending"
        )
    return (
        f"target_modules={_shown(wanted)} matches no layer of {kind} after exclude_modules, modules_to_save and "
        "layers_to_transform; 'all-linear' adapts every linear layer"
    )


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


def _stacks(model: nn.Module, config: DudeConfig) -> dict[str, Stack]:
    """The stacks of experts that are targets, by their names."""
    found = stacks_of(model, config.target_parameters or ())
    wanted = {name: stack for name, stack in found.items() if _is_wanted_layer(name, config)}
    if found and not wanted:
        raise ConfigError(
            f"layers_to_transform={config.layers_to_transform!r} leaves no stack of target_parameters "
            f"(first: {quoted(next(iter(found)), 200)}); name layers that have experts"
        )
    return wanted


def _check_layers(config: DudeConfig, names: list[str]) -> None:
    there = {index for name in names if (index := _layer_index(name, config)) is not None}
    if missing := sorted(_wanted_layers(config) - there):
        known = f"it has {min(there)} to {max(there)}" if there else "it has no numbered list of layers"
        raise ConfigError(f"layers_to_transform: the model has no layer {missing[0]}; {known}")


def _check_saved_modules(config: DudeConfig, names: list[str]) -> None:
    """PEFT warns of a rank_pattern that matches nothing, but would train nothing here without a word."""
    usual = usual_heads(config)  # PEFT enters them all, and a model has one
    for wanted in config.modules_to_save or ():
        if wanted not in usual and not any(name.endswith(wanted) for name in names):
            hint = closest(wanted, _last_parts(names))
            raise ConfigError(f"modules_to_save: {quoted(wanted)} is not a module of the model; {hint}")


def _check_output_layer(model: Any, targets: list[tuple[str, nn.Module]]) -> None:
    """An adapted output layer is saved as a change of the base model's, so it has to be in the base model's files."""
    embeddings = embedding_modules(model)
    adapted = next((name for name, module in targets if module in embeddings), None)
    config = Path(getattr(model, "name_or_path", "") or ".") / "config.json"
    if adapted is None or not config.is_file():
        return
    before = read_json(config).get("vocab_size")
    now = model.config.get_text_config().vocab_size
    if before is not None and before != now:
        raise ConfigError(
            f"target '{adapted}' was resized from {before} to {now} tokens, but no file has the new rows; save and "
            "reload the resized model, then adapt it, or train the layer in full with modules_to_save"
        )


def _check_attention(name: str, attention: nn.MultiheadAttention, config: DudeConfig) -> None:
    reason = why_no_attention(attention)
    if reason is None and not config.spec.ranked:
        reason = f"is a MultiheadAttention, which method {config.method!r} does not adapt"
    if reason is not None:
        raise ConfigError(f"target '{name}' {reason}; leave it out, or choose another method")
    for key, usual in (("lora_dropout", 0), ("bias", "none")):
        if (value := getattr(config, key)) != usual:
            raise ConfigError(
                f"{key}={value!r} has no meaning for '{name}', a MultiheadAttention; leave one of them out"
            )


def _add_target(config: DudeConfig, name: str) -> None:
    """Make a layer a target, as PEFT does with the embedding of a tied output layer."""
    if isinstance(config.target_modules, str):
        config.target_modules = rf"(?:{config.target_modules}|{re.escape(name)})"
    else:
        config.target_modules = {*(config.target_modules or ()), name}  # type: ignore[assignment]


def _check_tied(name: str, others: Mapping[str, nn.Module]) -> None:
    for other, layer in others.items():
        if reason := why_not_tied(layer):
            raise ConfigError(
                f"target '{name}' shares its weight with '{other}' (tied embeddings), which {reason}: they "
                "cannot be adapted as one; load the model with tie_word_embeddings=False, or train both whole with "
                f"modules_to_save=[{name.rpartition('.')[2]!r}, {other.rpartition('.')[2]!r}]"
            )


def _told_apart(wanted: Iterable[str], model: nn.Module, adapters: Iterable[str]) -> list[str]:
    """Names for modules_to_save that PEFT cannot take for a part of an adapted layer, as "layer" for `base_layer`.

    PEFT takes every module whose name ends in one of these, after the layers have been adapted.
    """
    inside = [*_INSIDE, *(f".{name}" for name in adapters)]
    told = []
    for name in wanted:
        if not any(part.endswith(name) for part in inside):
            told.append(name)
            continue
        full = [place for place, _ in model.named_modules() if place.endswith(name) and not _is_inside(place)]
        if any(part.endswith(place) for place in full for part in inside):
            raise ConfigError(
                f"modules_to_save: PEFT cannot tell {quoted(name)} from a part of an adapted layer or an adapter's "
                f"name; rename the module or the adapter"
            )
        told += full or [name]
    return told


def _is_inside(place: str) -> bool:
    """Whether a module is a part of an adapted layer, or a copy that an adapter trains."""
    parts = place.split(".")
    return any(part in parts for part in (*_INSIDE, "original_module", "modules_to_save"))


def _shown(targets: Any) -> str:
    return shown(repr(targets) if isinstance(targets, str) else repr(sorted(targets or ())), 200)
