"""The adapters of a comparison on the model without its weights: what it cannot have is told before any run."""

from __future__ import annotations

import warnings

import peft

from dude_peft.comparison.cells import Grid
from dude_peft.errors import ConfigError
from dude_peft.model.load import load_settings, locate
from dude_peft.planning.adapted import bare_model
from dude_peft.show import shown
from dude_peft.tuner import DudeConfig


def check_adapters(grid: Grid) -> None:
    """Raises ConfigError where a method's layers or ranks do not fit the model; an adapter of a file is not tried."""
    where, tried = locate(grid.run.model), set()
    for each in grid.contestants:
        for settings in grid.combinations:
            config = next(grid.tuning(each, [(each.rates[0], settings)])).config
            adapter = config.adapter.model_copy(update={"svd_seed": 0})
            if adapter.foreign or adapter.budget is not None or adapter.start is not None or repr(adapter) in tried:
                continue
            tried.add(repr(adapter))
            model = bare_model(config, load_settings(config.model, where), where)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the run says them
                    wanted = DudeConfig(**adapter.settings(), task_type=config.train.task_type)
                    peft.inject_adapter_in_model(wanted, model, low_cpu_mem_usage=True)
            except ConfigError as error:
                raise ConfigError(f"key 'methods': {shown(each.name)}: {error}") from error
