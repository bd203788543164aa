"""What can be told of a run on a quantised base before its weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dude_peft.config.schema import AdapterSection
from dude_peft.errors import ConfigError
from dude_peft.machine import processes
from dude_peft.model.load import dtype_of, load_settings
from dude_peft.model.quantised import (
    asked_of,
    check_as_stored,
    check_plain,
    check_runs,
    method_of,
    packed_config,
    stored_config,
)
from dude_peft.show import shown
from dude_peft.training.context import RunContext
from dude_peft.training.strategy import check_packed

if TYPE_CHECKING:
    import torch


def check_quantisation(context: RunContext, asked: AdapterSection | None, where: str, device: torch.device) -> None:
    """Looks at the configuration of the base model alone.

    Args:
        context: of the run.
        asked: the adapter section with a budget, where the run has one.
        where: the model is, from `locate`.
        device: to compute on.

    Raises:
        ConfigError: it is quantised otherwise than the run says, cannot be split, placed or run here, or cannot carry
            that adapter; or `adapter.init_from` is no checkpoint.
        ArtifactError: its files, or those of `adapter.init_from`, are damaged.
    """
    config = context.config
    starts = config.adapter.init_from is not None and context.folder.earlier is None
    dequantised = config.model.gguf_file is not None  # whatever it is
    if dequantised and not starts:
        return
    settings = load_settings(config.model, where)
    if starts:
        from dude_peft.training.full_precision import full_precision

        full_precision(config, settings)
    if dequantised:
        return
    check_as_stored(config.model, settings)
    wanted, stored = asked_of(config.model), stored_config(settings)
    if wanted or stored:
        method = method_of(stored or {}) if wanted is None else wanted.method
        check_packed(context.strategy, processes.count(), method)
        if config.model.device_map is not None:
            raise ConfigError("model.device_map: a quantised base is on one device; leave it out")
    if stored and packed_config(settings) is None:
        dtype = str(dtype_of(config.model, settings, where)).removeprefix("torch.")
        context.display.say(f"note: the checkpoint stores {shown(method_of(stored))}, dequantised to {dtype}")
    if asked is not None or config.adapter.foreign:
        check_plain(config.model, settings, "adapter.method" if asked is None else "adapter.budget")
    if wanted is not None and stored is None:
        check_runs(wanted, dtype_of(config.model, settings, where), device)
