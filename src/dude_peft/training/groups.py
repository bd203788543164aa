"""The optimizer's parameter groups: a learning rate for each of A, B and m."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dude_peft.config.schema import RATIOS, TrainSection

# The trained tensors of a layer by their name in the model; what is neither is modules_to_save or a bias.
_RATIOS = {f".lora_{tensor}.": key for key, tensor, _ in RATIOS}


def parameter_groups(model: nn.Module, section: TrainSection, decayed: set[str]) -> list[dict[str, Any]]:
    """Trained tensors in groups of one learning rate and one weight decay each, in the model's order.

    Rate of A, modules_to_save and biases: learning_rate; of B: times loraplus_lr_ratio; of m: times magnitude_lr_ratio.

    Args:
        model: its trained parameters are grouped.
        section: what the configuration says.
        decayed: names of the parameters that weight decay applies to.
    """
    rate = section.learning_rate
    assert rate is not None, "a resolved section has a rate"
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = rate * next((getattr(section, key) for part, key in _RATIOS.items() if part in name), 1.0)
            decay = section.weight_decay if name in decayed else 0.0
            groups.setdefault((own, decay), []).append(parameter)
    return [{"params": group, "lr": own, "weight_decay": decay} for (own, decay), group in groups.items()]
