"""Learning from pairs: the loss of a batch of better and worse answers, the disabled adapter as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import DpoSection
from dude_peft.machine.processes import gathered
from dude_peft.measure.token_logps import row_logps
from dude_peft.training.pair_losses import Pairs, losses, rewards
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


class PreferenceLoss:
    """The mean loss of a step's pairs, as Trainer's `compute_loss_func`.

        L = 1/N sum_pairs loss(log q(chosen), log q(rejected), log p(chosen), log p(rejected))

    q is the tuned model, p the base model: the same model with its adapter disabled, without a gradient and without
    dropout. N is the number of pairs of the whole optimizer step, over all processes. A batch holds all chosen rows,
    then all rejected ones in the same order.
    """

    def __init__(self, settings: DpoSection) -> None:
        """`settings`: of the objective."""
        self._settings = settings
        self._base: Tensor | None = None
        self._sums: Tensor | None = None
        """Of the pairs since the last line: their number, and the sums of what NAMES has."""

    def look(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Computes the base's log-probabilities of a micro-batch, for the loss that is asked for next."""
        rows = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with torch.no_grad(), as_base(model):
            logits = model(**rows, use_cache=False).logits
        self._base, _ = row_logps(logits, inputs["labels"])

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; `num_items_in_batch` counts pairs."""
        logps, tokens = row_logps(outputs["logits"], labels)
        assert self._base is not None, "look comes first"
        pairs = Pairs(*logps.chunk(2), *tokens.chunk(2), *self._base.chunk(2))
        self._base = None
        each = losses(pairs, self._settings)
        self._note(pairs)
        return each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)

    def _note(self, pairs: Pairs) -> None:
        chosen, rejected = (reward.detach() for reward in rewards(pairs, self._settings))
        each = (chosen, rejected, chosen > rejected, chosen - rejected, pairs.chosen.detach(), pairs.rejected.detach())
        sums = torch.stack([torch.ones_like(chosen).sum(), *(value.float().sum() for value in each)])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self) -> dict[str, float]:
        """What NAMES has of all pairs since the last call, of all processes; every process has to call it."""
        found = [sum(part) for part in zip(*gathered(self.sums()), strict=True)]
        self._sums = None
        return {name: total / max(found[0], 1.0) for name, total in zip(NAMES, found[1:], strict=True)}

    def sums(self) -> list[float]:
        """What a checkpoint keeps of this process."""
        return [0.0] * (1 + len(NAMES)) if self._sums is None else [float(each) for each in self._sums.tolist()]

    def take_up(self, sums: list[float], device: Any) -> None:
        """Goes on from `sums`."""
        self._sums = torch.tensor(sums, dtype=torch.float32, device=device)
