"""Learning from rewards (GRPO): the loss of a batch of the model's own answers, and what a line tells of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import GrpoSection
from dude_peft.data.labels import IGNORE
from dude_peft.measure.token_logps import token_logps
from dude_peft.model.outputs import kept_logits
from dude_peft.training.group_losses import Answers, losses, total
from dude_peft.training.judged_loss import JudgedLoss

_OF_TOKENS = ("kl", "entropy", "clip_ratio/region_mean")
_OF_STEPS = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio")


class RewardedLoss(JudgedLoss):
    """The loss of a step's answers, as Trainer's `compute_loss_func`; `group_losses` has the formulas.

    What it needs beside the log-probabilities, `rollouts.Rollouts` has put into the micro-batch.
    """

    def __init__(self, settings: GrpoSection) -> None:
        """`settings`: of the objective."""
        self._settings = settings
        names = [reward.title for reward in settings.rewards]
        self._of_steps = (*_OF_STEPS, *(f"rewards/{name}/{what}" for what in ("mean", "std") for name in names))
        self.width = 2 + len(_OF_TOKENS) + len(self._of_steps)
        self._beside: dict[str, Tensor] = {}

    def look(self, model: Any, inputs: dict[str, Any]) -> None:
        """Takes advantages and log-probabilities out, and asks for the logits of judged tokens alone."""
        self._beside = {name: inputs.pop(name) for name in ("advantages", "old", "base") if name in inputs}
        inputs |= kept_logits(inputs)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; `num_items_in_batch` counts answers."""
        logps, entropies, judged = token_logps(outputs["logits"], labels, self._settings.temperature)
        answers = Answers(logps, judged, **self._beside)
        each, clipped, kl = losses(answers, self._settings)
        sums = [judged.sum(), kl.sum(), entropies.sum(), clipped.sum()]
        self._add(0, torch.stack([value.float() for value in sums]))
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch
        return total(each, judged, rows, judged.sum() if self.tokens is None else self.tokens, self._settings)

    def note(self, found: Mapping[str, float], device: Any) -> None:
        """What the answers of a step, just made, are like, by the names in the metrics."""
        values = [1.0, *(found[name] for name in self._of_steps)]
        self._add(1 + len(_OF_TOKENS), torch.tensor(values, dtype=torch.float32, device=device))

    def _add(self, begin: int, values: Tensor) -> None:
        sums = values.new_zeros(self.width)
        sums[begin : begin + len(values)] = values
        self.add(sums)

    def averages(self, totals: list[float]) -> dict[str, float]:
        """Means over tokens, and over steps that made answers."""
        tokens, *of_tokens = totals[: 1 + len(_OF_TOKENS)]
        steps, *of_steps = totals[1 + len(_OF_TOKENS) :]
        found = {name: value / max(tokens, 1) for name, value in zip(_OF_TOKENS, of_tokens, strict=True)}
        if self._settings.beta == 0:
            del found["kl"]
        if self._settings.num_iterations == 1:
            del found["clip_ratio/region_mean"]
        if steps:
            found |= {name: value / steps for name, value in zip(self._of_steps, of_steps, strict=True)}
        return found

    def count(self, batches: Sequence[Mapping[str, Any]]) -> list[int]:
        """Answers of some micro-batches, and their judged tokens."""
        tokens = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        return [sum(len(batch["rows"]) for batch in batches), tokens]
