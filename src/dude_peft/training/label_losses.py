"""The loss of an answer with a label from its log-probabilities: formulas alone, under TRL's names."""

from __future__ import annotations

import torch
from torch import Tensor

from dude_peft.config.schema import KtoSection

REWARDS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def kl_of(ratios: Tensor) -> Tensor:
    """max(0, mean log q/p) over answers to other questions: the estimate of KL(q || p), arXiv 2402.01306, 4.1.

    Args:
        ratios: (answers,) log q - log p, without a gradient.
    """
    return ratios.mean().clamp(min=0)


def losses(ratios: Tensor, wanted: Tensor, kl: Tensor | float, settings: KtoSection) -> Tensor:
    """The loss of each answer, whose mean training lowers.

        wanted    w_d (1 - sigmoid(beta (ratio - kl)))
        unwanted  w_u (1 - sigmoid(beta (kl - ratio)))

    KTO, arXiv 2402.01306, equation 7; with kl = 0, APO-zero (arXiv 2408.06266, equation 7) of single answers.

    Args:
        ratios: (answers,) log q - log p: q the tuned model, p the base model.
        wanted: (answers,) the labels.
        kl: `kl_of`; not used by apo_zero_unpaired.
        settings: of the objective.
    """
    against = kl if settings.loss_type == "kto" else 0.0
    one = torch.ones_like(ratios)  # numbers alone would be float32
    sign = torch.where(wanted, one, -one)
    weight = torch.where(wanted, settings.desirable_weight * one, settings.undesirable_weight * one)
    return weight * torch.sigmoid(-sign * settings.beta * (ratios - against))


def summed_up(ratios: Tensor, logps: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """(6,): numbers of wanted and unwanted answers, then the sums of what REWARDS has."""
    parts = [(value * mask).sum() for value in (beta * ratios, logps) for mask in (wanted, ~wanted)]
    return torch.stack([wanted.sum().to(parts[0].dtype), (~wanted).sum().to(parts[0].dtype), *parts])


def averages(totals: list[float]) -> dict[str, float]:
    """Means of what REWARDS has and `rewards/margins`, from `summed_up`; without those of no answer, as TRL has it."""
    counts = totals[:2] * 2
    parts = zip(REWARDS, totals[2:6], counts, strict=True)
    found = {name: total / count for name, total, count in parts if count}
    if all(name in found for name in REWARDS[:2]):
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
