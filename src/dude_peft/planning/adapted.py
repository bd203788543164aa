"""The adapted model of a run without its weights: every target, rank and trained tensor as the real run has them."""

from __future__ import annotations

from typing import Any

import peft

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.model.architecture import model_of
from dude_peft.model.load import dtype_of
from dude_peft.show import shown
from dude_peft.tuner import DudeConfig


def adapted_model(config: RunConfig, settings: Any, where: str) -> Any:
    """The model under its adapter, all tensors on the meta device.

    Args:
        config: of the run.
        settings: of the model, from `train.model.load_settings`.
        where: from `train.model.locate`.

    Raises:
        ConfigError: whatever the real run would refuse (targets, ranks, a model that is none), or a quantised model.
    """
    if getattr(settings, "quantization_config", None) is not None:
        raise ConfigError(
            f"model {shown(config.model.name_or_path, 300)} is quantised, and dude plan cannot count its memory; plan "
            "the unquantised model, which needs more"
        )
    model = model_of(
        settings, config.model.name_or_path, dtype_of(config.model, settings, where), config.model.trust_remote_code
    )
    model.requires_grad_(False)
    adapter = DudeConfig(**config.adapter.model_dump(exclude={"start"}), task_type="CAUSAL_LM")
    return peft.inject_adapter_in_model(adapter, model, low_cpu_mem_usage=True)

