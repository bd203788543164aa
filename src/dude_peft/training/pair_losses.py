"""The loss of a pair of answers from their log-probabilities: formulas alone, under TRL's names.

c, r     log q(chosen) - log p(chosen), log q(rejected) - log p(rejected): q the tuned model, p the base model
|c|, |r| numbers of judged tokens
S        log sigmoid
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dude_peft.config.schema import DpoSection


@dataclass(frozen=True)
class Pairs:
    """Of each pair of a batch what a loss is made of, (pairs,) each."""

    chosen: Tensor
    """log q of the better answer: the sum over its judged tokens, in nats."""
    rejected: Tensor
    chosen_tokens: Tensor
    """Number of judged tokens."""
    rejected_tokens: Tensor
    base_chosen: Tensor
    """log p of the better answer by the base model, without a gradient."""
    base_rejected: Tensor

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """C and r."""
        return self.chosen - self.base_chosen, self.rejected - self.base_rejected


def rewards(pairs: Pairs, settings: DpoSection) -> tuple[Tensor, Tensor]:
    """Beta c and beta r: how much likelier training made each answer."""
    c, r = pairs.ratios
    return settings.beta * c, settings.beta * r


def losses(pairs: Pairs, settings: DpoSection) -> Tensor:
    """The loss of each pair, (pairs,), by `settings.loss_type`; its mean is what training lowers."""
    return DPO[settings.loss_type](pairs, settings.beta, settings.label_smoothing or 0.0)


def _sigmoid(pairs: Pairs, beta: float, _: float) -> Tensor:
    """-S(beta (c - r)): DPO, arXiv 2305.18290, equation 7."""
    c, r = pairs.ratios
    return -logsigmoid(beta * (c - r))


def _sigmoid_norm(pairs: Pairs, beta: float, _: float) -> Tensor:
    """-S(beta (c / |c| - r / |r|)): DPO of means over tokens, arXiv 2411.15124, section 5.1."""
    c, r = pairs.ratios
    return -logsigmoid(beta * (c / pairs.chosen_tokens - r / pairs.rejected_tokens))


def _hinge(pairs: Pairs, beta: float, _: float) -> Tensor:
    """max(0, 1 - beta (c - r)): SLiC, arXiv 2305.10425, on DPO's rewards."""
    c, r = pairs.ratios
    return torch.relu(1 - beta * (c - r))


def _ipo(pairs: Pairs, beta: float, _: float) -> Tensor:
    """(c / |c| - r / |r| - 1 / (2 beta))^2: IPO, arXiv 2310.12036, equation 17, of means over tokens as TRL has it."""
    c, r = pairs.ratios
    return (c / pairs.chosen_tokens - r / pairs.rejected_tokens - 1 / (2 * beta)) ** 2


def _robust(pairs: Pairs, beta: float, epsilon: float) -> Tensor:
    """(-(1 - e) S(beta (c - r)) + e S(-beta (c - r))) / (1 - 2 e): robust DPO, arXiv 2403.00409."""
    c, r = pairs.ratios
    margin = beta * (c - r)
    return (-(1 - epsilon) * logsigmoid(margin) + epsilon * logsigmoid(-margin)) / (1 - 2 * epsilon)


def _exo_pair(pairs: Pairs, beta: float, epsilon: float) -> Tensor:
    """KL((s, 1 - s) || (1 - e, e)), s = sigmoid(beta (c - r)): EXO, arXiv 2402.00856, equation 16."""
    c, r = pairs.ratios
    margin = beta * (c - r)
    e = torch.tensor(epsilon, dtype=margin.dtype, device=margin.device)
    better = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-e))
    return better + (-margin).sigmoid() * (logsigmoid(-margin) - torch.log(e))


def _nca_pair(pairs: Pairs, beta: float, _: float) -> Tensor:
    """-S(beta c) - S(-beta c) / 2 - S(-beta r) / 2: NCA, arXiv 2402.05369."""
    c, r = pairs.ratios
    return -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)


def _bco_pair(pairs: Pairs, beta: float, _: float) -> Tensor:
    """-S(beta c) - S(-beta r): BCO, arXiv 2404.04656, without its running mean, as TRL has it."""
    c, r = pairs.ratios
    return -logsigmoid(beta * c) - logsigmoid(-beta * r)


def _sppo_hard(pairs: Pairs, beta: float, _: float) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: SPPO, arXiv 2405.00675, of a certain preference."""
    c, r = pairs.ratios
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def _apo_zero(pairs: Pairs, beta: float, _: float) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta r): APO-zero, arXiv 2408.06266, equation 7."""
    c, r = pairs.ratios
    return 1 - (beta * c).sigmoid() + (beta * r).sigmoid()


def _apo_down(pairs: Pairs, beta: float, _: float) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta (c - r)): APO-down, arXiv 2408.06266, equation 8."""
    c, r = pairs.ratios
    return (beta * c).sigmoid() + 1 - (beta * (c - r)).sigmoid()


DPO: dict[str, Callable[[Pairs, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""By `loss_type`."""
