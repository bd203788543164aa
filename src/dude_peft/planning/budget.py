"""`adapter.budget` before a run: what shapes and weights decide is decided as the run will, and the rest is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.artifact.header import StoredTensor
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.model.architecture import parameter_names
from dude_peft.model.layout import layout_of
from dude_peft.model.quantised import check_plain
from dude_peft.model.weights import is_plain, open_weights, read_weight
from dude_peft.planning.adapted import bare_model
from dude_peft.training.budget import Spent, Worths, shapes_of, spend, targets
from dude_peft.training.calibration import leading, spectrum_worths
from dude_peft.tuner import DudeConfig, frozen


def planned(config: RunConfig, settings: Any, where: str, warn: Callable[[str], None]) -> Spent:
    """The budget of a run as ranks, without its rows and with one weight at a time in memory.

    Args:
        config: the resolved run.
        settings: of the model; is written into.
        where: from `locate`.
        warn: hears where the ranks are only like those of the run.

    Raises:
        ConfigError: what the run would refuse.
        ArtifactError: a weight is missing or damaged.
    """
    section = config.adapter
    assert section.budget is not None
    check_plain(config.model, settings, "adapter.budget")
    model = bare_model(config, settings, where)
    layers = targets(model, section, config.train.task_type)
    worths: Worths = _even
    if section.budget.by == "spectrum":
        try:
            worths = _spectrum(model, layers, Path(where), section.settings())
        except ConfigError:  # no safetensors
            warn("adapter.budget: spectrum needs the weights as safetensors here; nearly equal ranks are planned with")
    elif section.budget.by != "uniform":
        warn(
            f"adapter.budget: {section.budget.by} needs the model's weights and {section.budget.calibration_rows} "
            "training rows, so the run decides the ranks; nearly equal ranks are planned with"
        )
    return spend(section, model.num_parameters(), shapes_of(layers), worths)


def _even(ranks: Mapping[str, int]) -> dict[str, list[float]]:
    """Each next rank is worth less, the same in all layers."""
    return {name: [-1 / (1 + r) for r in range(most + 1)] for name, most in ranks.items()}


def _spectrum(model: Any, layers: Mapping[str, nn.Module], folder: Path, settings: dict[str, Any]) -> Worths:
    """What ranks are worth by the weights of a checkpoint."""
    checkpoint, names_of = open_weights(folder), parameter_names(model)
    layout = layout_of(model, checkpoint)
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, layer in layers.items():
        parameter: Any = layer.weight
        stored = layout.find(f"{name}.weight", names_of[id(parameter)])
        if not is_plain(stored):
            raise ConfigError(f"tensor '{stored.name}' is quantised; plan with the unquantised checkpoint")
        weights[name] = _reader(stored, parameter.dtype, transposed=frozen.is_transposed(layer))
    options = DudeConfig(**settings).split_options
    return lambda ranks: spectrum_worths(leading(weights, ranks, options))


def _reader(stored: StoredTensor, dtype: torch.dtype, *, transposed: bool) -> Callable[[], Tensor]:
    def read() -> Tensor:
        weight, _ = read_weight(stored, dtype)
        return weight.T if transposed else weight

    return read
