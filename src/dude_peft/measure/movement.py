"""How far the magnitude and the direction of every adapted layer have moved: DoRA's two quantities."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from typing_extensions import override

from dude_peft.parents import fits
from dude_peft.tuner.layer import DudeLinear


@torch.no_grad()
def movement(model: Any) -> dict[str, dict[str, float]]:
    """Mean change of every adapted layer's rows: `magnitude` = mean |m - m0| / m0, `direction` = mean 1 - cos(V, W0).

    Returns:
        layer name -> the two numbers; methods without a magnitude have `direction` alone.

    Source: DoRA section 3.2, made relative.
    """
    found: dict[str, dict[str, float]] = {}
    for layer in model.modules():
        if isinstance(layer, DudeLinear):
            for name in layer.r:
                numbers = {kind: float(rows.mean()) for kind, rows in layer.movement(name).items()}
                key = layer.layer_name if len(layer.r) == 1 else f"{layer.layer_name}:{name}"
                found[key] = {kind: round(number, 10) for kind, number in numbers.items()}
    return found


@fits()
class MovementCallback(TrainerCallback):
    """For any Trainer: logs the mean `movement` of all layers at every logging step, and keeps the last in `layers`.

        movement = dude_peft.MovementCallback()
        Trainer(model, arguments, train_dataset=rows, callbacks=[movement]).train()
        print(movement.layers)

    Source: DoRA section 3.2, made relative.
    """

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, float]] = {}

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.layers = movement(model)
        for kind in ("magnitude", "direction"):
            numbers = [each[kind] for each in self.layers.values() if kind in each]
            if numbers:
                logs[f"{kind}_movement"] = sum(numbers) / len(numbers)
