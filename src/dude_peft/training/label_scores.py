"""What a model knows of held-out answers with a label: their loss, and how many it judges as their labels do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dude_peft.config.schema import KtoSection
from dude_peft.data.batches import Company, Example
from dude_peft.data.mismatched import mismatched
from dude_peft.data.token_set import TokenSet
from dude_peft.measure.shares import measured
from dude_peft.measure.token_logps import row_logps
from dude_peft.training.label_losses import averages, kl_of, losses, summed_up
from dude_peft.training.pair_scores import PairScores
from dude_peft.tuner.untouched import as_base


@dataclass
class LabelMeter:
    """Measures held-out answers with a label; what the base model makes of them is computed once.

    KL is estimated once, of all rows: each question with the answer of the row before it. So a score does not depend on
    the size of batches.
    """

    examples: TokenSet
    settings: KtoSection
    pad_id: int
    batch_size: int
    max_length: int
    company: Company = "any"
    spread: bool = False
    """Whether each process of the run measures a part of them."""
    _base: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def scores(self, model: Any, advance: Callable[[int], None] = lambda rows: None) -> PairScores:
        """What `model` makes of them; it is in evaluation mode afterwards."""
        model.eval()
        if self._base is None:
            with as_base(model):
                self._base, _ = self._measured(model)
        (found, others), tokens = self._measured(model)
        advance(len(self.examples))
        beta, wanted = self.settings.beta, torch.from_numpy(self.examples.labels)
        ratios = found - self._base[0]
        kl = kl_of(others - self._base[1]) if len(others) else ratios.new_zeros(())
        means = {"kl": float(kl)} if len(others) else {}
        right = torch.where(wanted, ratios > kl, ratios < kl)
        means |= averages(summed_up(ratios, found, wanted, beta).tolist())
        means["rewards/accuracies"] = float(right.double().mean())
        each = losses(ratios, wanted, kl, self.settings)
        return PairScores(tuple(each.tolist()), tuple(tokens.long().tolist()), means, int(right.sum()))

    @torch.no_grad()  # not inference_mode: the first forward of a sharded model makes the buffers that training writes
    def _measured(self, model: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Log-probabilities of the answers, and of mismatched ones where these are needed; numbers of judged tokens."""
        rows: list[Example] = list(self.examples)
        found, tokens = self._logps(model, rows)
        if self.settings.loss_type != "kto":
            return (found, found[:0]), tokens
        others, _ = self._logps(model, mismatched(rows, [rows[-1], *rows[:-1]], self.max_length))
        return (found, others), tokens

    def _logps(self, model: Any, rows: list[Any]) -> tuple[Tensor, Tensor]:
        def logps_of(batch: dict[str, Tensor]) -> Tensor:
            labels = batch.pop("labels")
            return torch.stack([each.double() for each in row_logps(model(**batch, use_cache=False).logits, labels)])

        how: dict[str, Any] = {"company": self.company, "spread": self.spread, "device": model.device}
        logps, tokens = measured(rows, logps_of, 2, pad_id=self.pad_id, batch_size=self.batch_size, **how)
        return logps, tokens
