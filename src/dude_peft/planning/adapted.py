"""The adapted model of a run without its weights: every target, rank and trained tensor as the real run has them."""

from __future__ import annotations

from typing import Any

import peft
import torch

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.model.architecture import model_of
from dude_peft.model.load import dtype_of
from dude_peft.model.quantised import (
    asked_of,
    check_as_stored,
    check_plain,
    method_of,
    packed_config,
    quantization_of,
)
from dude_peft.planning.attention import set_attention_
from dude_peft.planning.liger import set_liger_
from dude_peft.planning.packed import countable, pack_
from dude_peft.show import shown
from dude_peft.tuner import DudeConfig
from dude_peft.tuner.foreign import adapt_empty


def adapted_model(config: RunConfig, settings: Any, where: str, *, sees: bool = False) -> Any:
    """The model under its adapter, all tensors on the meta device.

    Args:
        config: of the run.
        settings: of the model, from `train.model.load_settings`.
        where: from `train.model.locate`.
        sees: whether its batches have images.

    Raises:
        ConfigError: whatever the real run would refuse (targets, ranks, a model that is none), or a format of
            quantisation whose bytes are not known here.
    """
    if config.adapter.foreign:
        check_plain(config.model, settings, "adapter.method")
    quantization = _quantization(config, settings, dtype_of(config.model, settings, where))
    model = bare_model(config, settings, where)
    set_attention_(model, config, sees=sees)
    set_liger_(model, config)
    if config.adapter.peft is not None:
        return adapt_empty(model, config.adapter.peft)
    if quantization is not None:
        pack_(model, quantization)
    adapter = DudeConfig(**config.adapter.settings(), task_type=config.train.task_type)
    return peft.inject_adapter_in_model(adapter, model, low_cpu_mem_usage=True)


def bare_model(config: RunConfig, settings: Any, where: str) -> Any:
    """The model without an adapter, likewise, as it is before it is quantised; `adapted_model` says what is refused."""
    dtype = dtype_of(config.model, settings, where)
    if getattr(settings, "quantization_config", None) is not None:
        del settings.quantization_config  # else the model without weights would be no plain one
    if config.model.attn_implementation == "eager":  # the others keep no table of scores
        settings._attn_implementation = "eager"
    code, task_type = config.model.trust_remote_code, config.train.task_type
    model = model_of(settings, config.model.name_or_path, dtype, code, task_type=task_type)
    model.requires_grad_(False)
    return model


def _quantization(config: RunConfig, settings: Any, dtype: torch.dtype) -> dict[str, Any] | None:
    """In transformers' words, as it is stored or asked for."""
    check_as_stored(config.model, settings)
    found, asked = packed_config(settings), asked_of(config.model)
    if found is None and asked is not None:
        found = quantization_of(asked, dtype)["config"]
    if found is not None and not countable(found):
        raise ConfigError(
            f"model {shown(config.model.name_or_path, 300)}: dude plan cannot count the memory of "
            f"{shown(method_of(found))}; plan it with model.quantization: int8 from the unquantised model"
        )
    return found
