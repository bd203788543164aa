"""Losses of a run beside the models' own: their logits' cross-entropy, and a mixture that stays the base elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from dude_peft.data.labels import IGNORE
from dude_peft.machine.processes import count
from dude_peft.measure.divergence import target_loss
from dude_peft.tuner.untouched import as_base


class CausalLoss:
    """The shifted cross-entropy of a model's logits, as Trainer's `compute_loss_func`, where its own loss is another.

        L = 1/N sum_t -log q_t[label_t]  +  c/P R

    N is the number of trained tokens of the whole optimizer step, over all processes. R is the loss of a mixture of
    experts' router, a mean over one micro-batch; P is how many of these the step has, c the weight that it gets.
    """

    def __init__(self, router: float = 0.0) -> None:
        """`router`: c; 0 for a model without one."""
        self.router = router
        self.parts = 1
        """P; set before each call."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The micro-batch's part of the step's loss."""
        logits = outputs["logits"]
        loss: Tensor = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)
        return loss + self.router / self.parts * outputs["aux_loss"] if self.router else loss


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
