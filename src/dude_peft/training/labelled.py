"""Learning from single answers with a label (KTO): the loss of a batch, the disabled adapter as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import KtoSection
from dude_peft.machine.processes import summed
from dude_peft.measure.token_logps import row_logps
from dude_peft.training.judged_loss import JudgedLoss, logps_of
from dude_peft.training.label_losses import averages, losses, summed_up
from dude_peft.tuner.untouched import as_base


class LabelledLoss(JudgedLoss):
    """The mean loss of a step's answers, as Trainer's `compute_loss_func`.

        L = 1/N sum_answers loss(log q - log p, label, kl),  kl = max(0, mean log q' - log p')

    q is the tuned model, p the base model: the same model with its adapter disabled, without a gradient and without
    dropout. q' and p' are those of a micro-batch's questions with other answers, of all processes, without a gradient.
    N is the number of answers of the whole optimizer step and all processes.
    """

    width = 8

    def __init__(self, settings: KtoSection) -> None:
        """`settings`: of the objective."""
        self._settings = settings
        self._base: Tensor | None = None
        self._wanted: Tensor | None = None
        self._kl: Tensor | None = None
        """None for a loss that needs none."""

    def look(self, model: Any, inputs: dict[str, Any]) -> None:
        """Notes the labels of a micro-batch, the base's log-probabilities and the estimate of KL."""
        self._wanted = inputs.pop("label")
        others = inputs.pop("mismatched", None)
        with torch.no_grad():
            with as_base(model):
                self._base = logps_of(model, inputs)
                base = None if others is None else logps_of(model, others)
            self._kl = None
            if base is not None:
                ratios = logps_of(model, others) - base
                total = summed(torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))]))
                self._kl = (total[0] / total[1]).clamp(min=0)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; `num_items_in_batch` counts answers."""
        assert self._base is not None
        assert self._wanted is not None
        found, _ = row_logps(outputs["logits"], labels)
        ratios, kl = found - self._base, 0.0 if self._kl is None else self._kl
        each = losses(ratios, self._wanted, kl, self._settings)
        self._note(ratios.detach(), found.detach())
        return each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)

    def _note(self, ratios: Tensor, logps: Tensor) -> None:
        assert self._wanted is not None
        sums = summed_up(ratios, logps, self._wanted, self._settings.beta).float()
        kl = sums.new_zeros(2) if self._kl is None else torch.stack([sums.new_ones(()), self._kl.float()])
        self.add(torch.cat([sums, kl]))

    def averages(self, totals: list[float]) -> dict[str, float]:
        """Means over answers, and `kl` over micro-batches."""
        kl = {"kl": totals[7] / totals[6]} if totals[6] else {}
        return kl | averages(totals[:6])

    def count(self, batches: Sequence[Mapping[str, Any]]) -> list[int]:
        """Answers of some micro-batches; no cross-entropy counts beside their loss."""
        return [sum(len(batch["rows"]) for batch in batches), 0]
