"""The loss of groups of answers from their rewards and log-probabilities: formulas alone, under TRL's names.

r        exp(log q - log q'): q the tuned model, q' the one that answered
a        advantage of an answer: its reward against its group's
p        the base model
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dude_peft.config.schema import GrpoSection

_SMALLEST = 1e-4
"""Added to standard deviations."""


def advantages(rewards: Tensor, settings: GrpoSection) -> Tensor:
    """(R - mean of the group) / (s + 1e-4), s the standard deviation of the group or of the batch; (answers,).

    Args:
        rewards: (answers,), groups one behind the other.
        settings: of the objective.
    """
    groups = rewards.view(-1, settings.num_generations)
    centred = (groups - groups.mean(1, keepdim=True)).flatten()
    if settings.scale_rewards == "none":
        return centred
    batch = settings.scale_rewards == "batch"
    spread = rewards.std() if batch else groups.std(1).repeat_interleave(settings.num_generations)
    return centred / (spread + _SMALLEST)


@dataclass(frozen=True)
class Answers:
    """Of the answers of a micro-batch what a loss is made of, (rows, tokens) each but the advantages."""

    logps: Tensor
    """log q of each token, 0 where nothing is judged."""
    judged: Tensor
    advantages: Tensor
    """(rows,)"""
    old: Tensor | None = None
    """log q' of each token; None where the model is the one that answered."""
    base: Tensor | None = None
    """log p of each token; None where KL does not count."""

    @property
    def kl(self) -> Tensor:
        """P / q - log(p / q) - 1, an estimate of KL(q || p) that is never negative: DeepSeekMath, equation 4."""
        assert self.base is not None
        gap = self.base - self.logps
        return gap.exp() - gap - 1


def losses(answers: Answers, settings: GrpoSection) -> tuple[Tensor, Tensor, Tensor]:
    """-min(r a, clip(r) a) + beta KL of each token, whether it is clipped, and its KL; (rows, tokens) each.

    GRPO, arXiv 2402.03300, equation 3; with ratios of whole answers GSPO, arXiv 2507.18071, equation 5. A clipped token
    is one of which nothing is learned but its KL. The KL is r (p / q - log(p / q) - 1), whose gradient is then without
    bias (DeepSeek-V3.2, arXiv 2512.02556), or that without r; 0 where there is no base.
    """
    mask = answers.judged.to(answers.logps.dtype)
    ratio = answers.logps - (answers.logps.detach() if answers.old is None else answers.old)
    if settings.importance_sampling_level == "sequence":
        ratio = (ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = ratio.exp()
    wanted = answers.advantages[:, None]
    low, high = 1 - settings.epsilon, 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)
    each = -torch.min(ratio * wanted, ratio.clamp(low, high) * wanted)
    clipped = ((ratio < low) & (wanted < 0)) | ((ratio > high) & (wanted > 0))
    if answers.base is None:
        kl = torch.zeros_like(each)
    else:
        kl = answers.kl * ratio if settings.use_bias_correction_kl else answers.kl
        each = each + settings.beta * kl
    return each * mask, (clipped * mask).bool(), kl.detach() * mask


def total(each: Tensor, judged: Tensor, rows: Tensor | int, tokens: Tensor | int, settings: GrpoSection) -> Tensor:
    """A micro-batch's part of the step's loss, whose gradient is the step's.

    Args:
        each: loss of each token, (rows, tokens).
        judged: which of them count.
        rows: answers of the whole step.
        tokens: judged tokens of the whole step.
        settings: of the objective.
    """
    if settings.loss_type == "dapo":  # arXiv 2503.14476, equation 8
        return each.sum() / max(tokens, 1)
    if settings.loss_type == "dr_grpo":  # arXiv 2503.20783, section 3.2
        return each.sum() / (rows * settings.max_completion_length)
    if settings.loss_type == "bnpo":
        return each.sum() / judged.sum().clamp(min=1) * len(each) / rows
    return (each.sum(1) / judged.sum(1).clamp(min=1)).sum() / rows
