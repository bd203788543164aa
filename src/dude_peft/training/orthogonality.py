"""`train.orthogonality`: the penalty of PEGO, its gradient added right before each optimizer step.

It depends on the weights alone, not on rows. So it is computed once a step and not once a micro-batch, each process
adds the same to gradients that are already shared, and autocast has no part in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dude_peft.tuner.layer import DudeLinear


class Orthogonality:
    """The penalty `weight (sum_i ||W0 D_i^T||^2 + sum_{i<j} ||D_i D_j^T||^2)`, summed over all adapted layers."""

    def __init__(self, model: Any, weight: float, groups: int) -> None:
        """Sets it up.

        Args:
            model: with one adapter, of a method with factors A and B.
            weight: of the penalty beside the loss.
            groups: groups of pairs in each layer.
        """
        self._layers = [layer for layer in model.modules() if isinstance(layer, DudeLinear)]
        self._weight, self._groups = weight, groups

    def pull(self) -> dict[str, Tensor]:
        """Adds the penalty's gradient to that of the loss; the two sums come back, without their weight.

        Not by `backward`, whose hooks would send gradients to other processes once more.
        """
        sums: dict[str, Tensor] = {}
        for layer in self._layers:
            for adapter in layer.r:
                factors: list[Any] = [layer.lora_dA[adapter], layer.lora_dB[adapter]]
                trained = [factor.weight for factor in factors]
                base, between = layer.orthogonality(adapter, self._groups)
                slopes = torch.autograd.grad(self._weight * (base + between), trained)
                for parameter, slope in zip(trained, slopes, strict=True):
                    parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
                for name, value in (("orthogonality_base", base), ("orthogonality_groups", between)):
                    sums[name] = sums.get(name, 0) + value.detach()
        return sums
