"""Mixture of losses (MoL): learn the domain, stay the base model elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dude_peft.core.divergence import target_loss
from dude_peft.data.labels import IGNORE
from dude_peft.train.processes import count
from dude_peft.tuner.untouched import as_base


class MixtureOfLosses:
    """Cross-entropy on domain rows plus KL to the base model on general rows, as Trainer's `compute_loss_func`.

        L = 1/N ( sum_{t in domain} -log q_t[label_t]  +  sum_{t in general} KL(p_t || q_t) )

    q_t is the tuned model's distribution at token t, p_t the base model's: the same model with its adapter disabled,
    without a gradient. N is the number of judged tokens of the whole optimizer step, of both kinds and all processes:
    the trained tokens of domain rows, every token but the first of general rows. Source: arXiv 2505.12043.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """`dtype`: in which the base's logits are kept; autocast computes them in bfloat16 and hands out float32."""
        self._dtype = dtype
        self._base: Tensor | None = None

    def look(self, model: Any, inputs: Mapping[str, Any], general: Mapping[str, Tensor] | None) -> None:
        """Computes the base's logits of a micro-batch's general rows, for the loss that is asked for next.

        Args:
            model: the adapted model, wrapped or not.
            inputs: the micro-batch.
            general: its general rows alone, in order; None where it has none.
        """
        if general is None and count() == 1:
            self._base = None
            return
        if general is None:  # where processes share the weights, a forward of one is a forward of all
            general = {name: tensor[:1, :1] for name, tensor in inputs.items()}
            general["labels"] = torch.full_like(general["labels"], IGNORE)
        rows = {name: tensor for name, tensor in general.items() if name != "labels"}
        with torch.no_grad(), as_base(model):
            logits = model(**rows, use_cache=False).logits
        places, _ = judged(general["labels"])
        self._base = logits.flatten(0, 1)[places].to(self._dtype or logits.dtype)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss; general rows have to stand behind the domain's."""
        logits = outputs["logits"].flatten(0, 1)
        places, targets = judged(labels)
        base = logits.new_empty(0, logits.shape[1]) if self._base is None else self._base
        self._base = None
        total = max(len(places), 1) if num_items_in_batch is None else num_items_in_batch
        return target_loss(logits, places, targets, base) / total


def judged(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the logits of judged tokens are, and the tokens.

    Args:
        labels: (rows, tokens), IGNORE where nothing is judged.

    Returns:
        (M,) indices into logits flattened to (rows * tokens, V), those of the token before; (M,) labels. In order.
    """
    row, token = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return row * labels.shape[1] + token, labels[row, token + 1]
