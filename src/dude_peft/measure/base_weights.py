"""The base weights of the adapted layers of a model in memory, for those who would read them from its files again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dude_peft.tuner import frozen
from dude_peft.tuner.layer import DudeLinear

WeightOf: TypeAlias = Callable[[str], Tensor]
"""W0 (out, in) of an adapted layer, or (experts, out, in), in float32 on the CPU, by the layer's name."""


def base_weights(model: Any) -> WeightOf | None:
    """The base weights of an adapted model; None where one is quantised, split among processes, or not there."""
    layers = {layer.layer_name: layer for layer in model.modules() if isinstance(layer, DudeLinear)}
    bases: dict[str, frozen.Frozen] = {name: layer.target() for name, layer in layers.items()}
    for base in bases.values():
        weight = frozen.plain_weight(base)
        if weight is None or type(weight) is not Tensor or weight.is_meta:
            return None

    def weight_of(name: str) -> Tensor:
        weight = frozen.plain_weight(bases[name])
        assert weight is not None, "looked at above"
        return weight.to("cpu").to(torch.float32)

    return weight_of if bases else None
