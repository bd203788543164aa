"""Learning to score (a reward model): the loss of a batch of better and worse conversations, each with its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dude_peft.config.schema import RewardModelSection
from dude_peft.training.judged_loss import JudgedLoss

NAMES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
"""What a run writes of its pairs beside the loss, under the names that other objectives have; means over pairs."""


def score_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None, settings: RewardModelSection) -> Tensor:
    """The loss of each pair, (pairs,), as TRL's RewardTrainer has it.

        -S(c - r - m) + k (c + r)^2

    c, r are the rewards of the better and the worse conversation, m is the margin of the row, k is
    center_rewards_coefficient, S the log of the sigmoid. Sources: Bradley-Terry, with a margin as in arXiv 2307.09288,
    equation 2, and arXiv 2312.09244, equation 2.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -logsigmoid(difference)
    if settings.center_rewards_coefficient is not None:
        losses = losses + settings.center_rewards_coefficient * (chosen + rejected) ** 2
    return losses


def score_means(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    """What NAMES has, of each pair."""
    return chosen, rejected, chosen > rejected, chosen - rejected


class ScoredLoss(JudgedLoss):
    """The mean of `score_losses` over a step's pairs, as Trainer's `compute_loss_func`.

    A batch holds all chosen conversations, then all rejected ones in the same order.
    """

    width = 1 + len(NAMES)

    def __init__(self, settings: RewardModelSection) -> None:
        """`settings`: of the objective."""
        self._settings = settings
        self._margin: Tensor | None = None

    def look(self, model: Any, inputs: dict[str, Any]) -> None:
        """Takes the margins out of a micro-batch."""
        self._margin = inputs.pop("margin", None)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; `num_items_in_batch` counts pairs."""
        chosen, rejected = outputs["logits"].squeeze(-1).float().chunk(2)
        each = score_losses(chosen, rejected, self._margin, self._settings)
        values = score_means(chosen.detach(), rejected.detach())
        # The number of pairs, and the sums of what NAMES has.
        self.add(torch.stack([torch.ones_like(chosen).sum().detach(), *(value.float().sum() for value in values)]))
        return each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)

    def averages(self, totals: list[float]) -> dict[str, float]:
        """What NAMES has; its means over pairs."""
        return {name: total / max(totals[0], 1.0) for name, total in zip(NAMES, totals[1:], strict=True)}

    def count(self, batches: Sequence[Mapping[str, Any]]) -> list[int]:
        """Pairs of some micro-batches; no cross-entropy counts."""
        return [sum(len(batch["rows"]) for batch in batches), 0]
