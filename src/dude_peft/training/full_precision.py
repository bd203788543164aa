"""`adapter.init_from`: the start on a quantised base, with the factors of the full-precision weights.

Rounding blurs the principal directions of a weight. So the factors are taken from the checkpoint as it was before,
one layer at a time. The adapter still starts at the base that is loaded: `V = Q(W0) + s (B A - B0 A0)` is Q(W0) as long
as nothing is trained, and the magnitude starts at the row norms of Q(W0).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.init.layer import LayerTask
from dude_peft.init.plan import make_plan
from dude_peft.init.run import checkpoint_folder
from dude_peft.model.quantised import asked_of, stored_config
from dude_peft.model.weights import WeightFiles, open_weights
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL
from dude_peft.tuner import DudeConfig
from dude_peft.tuner.starts import started_from

_ANOTHER_MODEL = 0.5
"""Relative difference of a weight that no quantisation makes; 4 bits make about 0.1."""


def full_precision(config: RunConfig, settings: Any) -> FullPrecision:
    """The weights of `adapter.init_from`, where the base model is, or was, quantised.

    Args:
        config: a resolved run with `adapter.init_from`.
        settings: the base model's configuration, before it is loaded.

    Raises:
        ConfigError: it is not; or `adapter.init_from` is no checkpoint.
        ArtifactError: that checkpoint is damaged.
    """
    quantised = asked_of(config.model) is not None or stored_config(settings) is not None
    if not quantised and config.model.gguf_file is None:
        raise ConfigError(
            "adapter.init_from: the base model is not quantised, so its own weights are the full-precision ones; "
            "leave it out"
        )
    return FullPrecision(config)


class FullPrecision:
    """The weights of `adapter.init_from`, read when they are asked for.

    Raises ConfigError where this is no checkpoint; ArtifactError for a damaged one.
    """

    def __init__(self, config: RunConfig) -> None:
        """`config`: a resolved run with `adapter.init_from`."""
        assert config.adapter.init_from is not None
        self.name = config.adapter.init_from
        self._config = config
        self._folder: Path = checkpoint_folder(self.name)
        self._files: WeightFiles = open_weights(self._folder)
        self._layers: dict[str, LayerTask] = {}
        self._errors: dict[str, float] = {}

    @contextmanager
    def starts(self) -> Iterator[None]:
        """Within: the starts of a new adapter have the factors of these weights."""
        settings = DudeConfig(**self._config.adapter.settings(), task_type=CAUSAL)
        made = make_plan(self.name, self._folder, self._files, settings, "auto", seed=0)
        self._layers = {task.name: task for task in made.layers}
        with started_from(self._weight):
            yield

    def told(self) -> str:
        """How far the base's weights are from these, for people."""
        worst = max(self._errors, key=lambda layer: self._errors[layer])
        return (
            f"the factors are those of {shown(self.name, 300)}; the base's weights differ from its by "
            f"{100 * statistics.mean(self._errors.values()):.2f} % on average, at worst "
            f"{100 * self._errors[worst]:.2f} % ({shown(worst)})"
        )

    def _weight(self, layer: str, applied: Tensor) -> Tensor:
        """The layer's weight (out, in) in float32, compared with the one that is applied."""
        task = self._layers.get(layer)
        if task is None:
            raise ConfigError(f"adapter.init_from: {shown(self.name, 300)} has no layer '{shown(layer)}'; {_REMEDY}")
        full = task.read()[0].to(applied)
        if full.shape != applied.shape:
            raise ConfigError(
                f"adapter.init_from: '{shown(layer)}' of {shown(self.name, 300)} has shape {tuple(full.shape)}, the "
                f"base's {tuple(applied.shape)}; {_REMEDY}"
            )
        error = float(torch.linalg.norm(applied - full) / torch.linalg.norm(full).clamp_min(1e-30))
        if not error <= _ANOTHER_MODEL:
            raise ConfigError(
                f"adapter.init_from: '{shown(layer)}' of {shown(self.name, 300)} differs from the base's weight by "
                f"{100 * error:.0f} %, which is no rounding; {_REMEDY}"
            )
        self._errors[layer] = error
        return full


_REMEDY = "give the checkpoint that the base was quantised from"
