"""Learning from pairs: the loss of a batch of better and worse answers, the disabled adapter as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import OrpoSection, Paired
from dude_peft.data.labels import IGNORE
from dude_peft.measure.token_logps import row_logps
from dude_peft.model.outputs import kept_logits
from dude_peft.training.judged_loss import JudgedLoss, logps_of
from dude_peft.training.pair_losses import Pairs, logps, losses, rewards
from dude_peft.tuner.untouched import as_base

NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""What a run writes of its pairs beside the loss, in TRL's names; means over pairs."""


class PreferenceLoss(JudgedLoss):
    """The mean loss of a step's pairs, as Trainer's `compute_loss_func`.

        L = 1/N sum_pairs loss(log q(chosen), log q(rejected), log p(chosen), log p(rejected))
          + a/T sum_t -log q_t[chosen_t]

    q is the tuned model, p the base model: the same model with its adapter disabled, without a gradient and without
    dropout; objectives without a reference have no p. a is the weight of the chosen rows' cross-entropy, 0 for dpo: of
    their answers, for orpo of their questions too. N is the number of pairs, T that of these tokens, of the whole
    optimizer step and all processes. A batch holds all chosen rows, then all rejected ones in the same order.
    """

    def __init__(self, settings: Paired) -> None:
        """`settings`: of the objective."""
        self._settings = settings
        self.width = 1 + len(NAMES)
        self._base: Tensor | None = None
        self._labels: Tensor | None = None
        """Labels of the chosen rows whose cross-entropy counts; None where none does."""

    def look(self, model: Any, inputs: dict[str, Any]) -> None:
        """Notes what the loss that is asked for next needs of a micro-batch: of dpo, the base's log-probabilities."""
        inputs |= kept_logits(inputs)
        self._labels = imitated(inputs, self._settings)
        self._base = inputs.pop("base", None)
        if self._base is not None or not self._settings.has_base:
            return
        with torch.no_grad(), as_base(model):
            self._base = logps_of(model, inputs)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; `num_items_in_batch` counts pairs."""
        found, tokens = row_logps(outputs["logits"], labels)
        base = () if self._base is None else self._base.chunk(2)
        pairs = Pairs(*found.chunk(2), *tokens.chunk(2), *base)
        self._base = None
        each = losses(pairs, self._settings)
        self._note(pairs)
        loss = each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)
        if self._labels is not None:
            imitation, count = row_logps(outputs["logits"][: len(each)], self._labels)
            loss = loss - self._settings.nll * imitation.sum() / (count.sum() if self.tokens is None else self.tokens)
        return loss

    def _note(self, pairs: Pairs) -> None:
        chosen, rejected = (reward.detach() for reward in rewards(pairs, self._settings))
        each = (
            chosen,
            rejected,
            chosen > rejected,
            chosen - rejected,
            *map(torch.detach, logps(pairs, self._settings)),
        )
        # The number of pairs, and the sums of what NAMES has.
        self.add(torch.stack([torch.ones_like(chosen).sum(), *(value.float().sum() for value in each)]))

    def averages(self, totals: list[float]) -> dict[str, float]:
        """What NAMES has; its means over pairs."""
        return {name: total / max(totals[0], 1.0) for name, total in zip(NAMES, totals[1:], strict=True)}

    def count(self, batches: Sequence[Mapping[str, Any]]) -> list[int]:
        """Pairs of some micro-batches, and tokens of their chosen rows whose cross-entropy counts."""
        labels = [imitated(batch, self._settings) for batch in batches]
        tokens = sum(int((each[:, 1:] != IGNORE).sum()) for each in labels if each is not None)
        return [sum(len(batch["rows"]) for batch in batches), tokens]


def imitated(batch: Mapping[str, Any], settings: Paired) -> Tensor | None:
    """Labels of the chosen rows whose cross-entropy counts beside the loss of pairs; None where none does."""
    if not settings.nll:
        return None
    pairs = len(batch["labels"]) // 2
    if isinstance(settings, OrpoSection):  # the question too, as TRL has it
        ids: Tensor = batch["input_ids"][:pairs]
        return ids.masked_fill(batch["attention_mask"][:pairs] == 0, IGNORE)
    labels: Tensor = batch["labels"][:pairs]
    return labels
