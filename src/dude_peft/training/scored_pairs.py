"""What a reward model makes of held-out pairs: their loss, and how often the better conversation has more reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import RewardModelSection
from dude_peft.data.batches import Company
from dude_peft.data.token_set import TokenSet
from dude_peft.measure.shares import measured
from dude_peft.model.outputs import scores_of
from dude_peft.training.pair_scores import PairScores
from dude_peft.training.scored import NAMES, score_losses, score_means


@dataclass
class ScoreMeter:
    """Measures held-out pairs."""

    examples: TokenSet
    settings: RewardModelSection
    pad_id: int
    batch_size: int
    """Conversations at once."""
    company: Company = "any"
    spread: bool = False
    """Whether each process of the run measures a part of them."""

    def scores(self, model: Any, advance: Callable[[int], None] = lambda pairs: None) -> PairScores:
        """What `model` makes of them; it is in evaluation mode afterwards."""
        model.eval()
        rewards, tokens = self._measured(model)
        advance(len(self.examples))
        chosen, rejected = rewards[0::2], rewards[1::2]
        margin = torch.from_numpy(self.examples.wanted_margins).double()
        means = zip(NAMES, score_means(chosen, rejected), strict=True)
        return PairScores(
            tuple(score_losses(chosen, rejected, margin, self.settings).tolist()),
            tuple(first + second for first, second in zip(tokens[0::2], tokens[1::2], strict=True)),
            {name: float(value.double().mean()) for name, value in means},
            int((chosen > rejected).sum()),
        )

    @torch.no_grad()  # not inference_mode: the first forward of a model makes the buffers that training writes
    def _measured(self, model: Any) -> tuple[Tensor, list[int]]:
        """Rewards, (2 pairs,) float64, and numbers of tokens, of chosen and rejected in turn."""
        rows = [
            {"input_ids": example[f"{side}input_ids"], "labels": example[f"{side}labels"]}
            for example in self.examples
            for side in ("", "rejected_")
        ]

        def scores(batch: dict[str, Tensor]) -> Tensor:
            del batch["labels"]
            return scores_of(model, batch)[None]

        how: dict[str, Any] = {"company": self.company, "spread": self.spread, "device": model.device}
        (found,) = measured(rows, scores, 1, pad_id=self.pad_id, batch_size=self.batch_size, **how)
        return found, [len(row["input_ids"]) for row in rows]
