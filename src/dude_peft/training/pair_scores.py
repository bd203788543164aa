"""What a model knows of held-out pairs: their loss, and how often the better answer is preferred."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import OrpoSection, Paired
from dude_peft.data.batches import Company
from dude_peft.data.labels import IGNORE
from dude_peft.data.token_set import TokenSet
from dude_peft.measure.shares import measured
from dude_peft.measure.token_logps import row_logps
from dude_peft.training.pair_losses import Pairs, logps, losses, rewards
from dude_peft.training.preference import NAMES
from dude_peft.tuner.untouched import as_base


@dataclass(frozen=True)
class PairScores:
    """Of each held-out pair, or answer with a label, in order."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    """Judged tokens of both answers, or of the one."""
    means: dict[str, float]
    """What `preference.NAMES` has, and `logps/accuracies`: the share whose better answer is likelier by itself."""
    right: int
    """Pairs whose better answer has the larger reward; answers whose reward is on their label's side of beta kl."""

    @property
    def mean(self) -> float:
        """The loss; every pair or answer counts the same."""
        return math.fsum(self.losses) / max(len(self.losses), 1)


@dataclass
class PairMeter:
    """Measures held-out pairs; what the base model makes of them is computed once."""

    examples: TokenSet
    settings: Paired
    pad_id: int
    batch_size: int
    company: Company = "any"
    spread: bool = False
    """Whether each process of the run measures a part of them."""
    _base: Tensor | None = field(default=None, init=False)

    def scores(self, model: Any, advance: Callable[[int], None] = lambda pairs: None) -> PairScores:
        """What `model` makes of them; it is in evaluation mode afterwards."""
        model.eval()
        if self._base is None and self.settings.has_base:
            with as_base(model):
                self._base, _, _ = self._measured(model)
        found, tokens, imitation = self._measured(model)
        advance(len(self.examples))
        parts = (found, tokens) if self._base is None else (found, tokens, self._base)
        pairs = Pairs(*(each for values in parts for each in (values[0::2], values[1::2])))
        chosen, rejected = rewards(pairs, self.settings)
        values = (chosen, rejected, chosen > rejected, chosen - rejected, *logps(pairs, self.settings))
        means = {name: float(value.double().mean()) for name, value in zip(NAMES, values, strict=True)}
        means["logps/accuracies"] = float((pairs.chosen > pairs.rejected).double().mean())
        return PairScores(
            tuple((losses(pairs, self.settings) + imitation).tolist()),
            tuple((pairs.chosen_tokens + pairs.rejected_tokens).long().tolist()),
            means,
            int((chosen > rejected).sum()),
        )

    @torch.no_grad()  # not inference_mode: the first forward of a sharded model makes the buffers that training writes
    def _measured(self, model: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and numbers of judged tokens, of chosen and rejected in turn, (2 pairs,) float64.

        And what the cross-entropy of the chosen rows adds to the loss of each pair, (pairs,): its mean is that over all
        of their tokens.
        """
        rows = [
            {"input_ids": example[f"{side}input_ids"], "labels": example[f"{side}labels"]}
            for example in self.examples
            for side in ("", "rejected_")
        ]

        def numbers_of(batch: dict[str, Tensor]) -> Tensor:
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits
            found = both = row_logps(logits, labels)
            if isinstance(self.settings, OrpoSection):
                both = row_logps(logits, batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE))
            return torch.stack([each.double() for each in (*found, *both)])

        how: dict[str, Any] = {"company": self.company, "spread": self.spread, "device": model.device}
        found = measured(rows, numbers_of, 4, pad_id=self.pad_id, batch_size=self.batch_size, **how)
        logps, tokens, negative, counted = found
        nll = -negative
        total = counted[0::2].sum().clamp(min=1)
        return logps, tokens, self.settings.nll * nll[0::2] * (len(rows) // 2) / total
