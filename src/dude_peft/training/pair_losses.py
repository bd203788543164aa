"""The loss of a pair of answers from their log-probabilities: formulas alone, under TRL's names.

c, r     log q(chosen) - log p(chosen), log q(rejected) - log p(rejected): q the tuned model, p the base model
|c|, |r| numbers of judged tokens
S        log sigmoid
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dude_peft.config.schema import CpoSection, DpoSection, OrpoSection, Paired


@dataclass(frozen=True)
class Pairs:
    """Of each pair of a batch what a loss is made of, (pairs,) each."""

    chosen: Tensor
    """log q of the better answer: the sum over its judged tokens, in nats."""
    rejected: Tensor
    chosen_tokens: Tensor
    """Number of judged tokens."""
    rejected_tokens: Tensor
    base_chosen: Tensor | None = None
    """log p of the better answer by the base model, without a gradient; None for objectives without a reference."""
    base_rejected: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """C and r."""
        assert self.base_chosen is not None
        assert self.base_rejected is not None
        return self.chosen - self.base_chosen, self.rejected - self.base_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log q of both answers, a token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def rewards(pairs: Pairs, settings: Paired) -> tuple[Tensor, Tensor]:
    """Beta c and beta r; without a reference, beta times what `logps` gives."""
    chosen, rejected = pairs.ratios if isinstance(settings, DpoSection) else logps(pairs, settings)
    return settings.beta * chosen, settings.beta * rejected


def logps(pairs: Pairs, settings: Paired) -> tuple[Tensor, Tensor]:
    """Log q of both answers as the objective compares them: sums, or means over tokens."""
    means = isinstance(settings, OrpoSection) or (
        isinstance(settings, CpoSection) and settings.loss_type in ("ipo", "simpo")
    )
    return pairs.means if means else (pairs.chosen, pairs.rejected)


def losses(pairs: Pairs, settings: Paired) -> Tensor:
    """The loss of each pair, (pairs,), whose mean training lowers, the chosen answer's cross-entropy not among it."""
    if isinstance(settings, OrpoSection):
        return _odds_ratio(pairs, settings.beta)
    if isinstance(settings, CpoSection):
        return _cpo(pairs, settings)
    return DPO[settings.loss_type](pairs, settings.beta, settings.label_smoothing or 0.0)


def _odds_ratio(pairs: Pairs, beta: float) -> Tensor:
    """-beta S(odds(c) - odds(r)), odds(x) = x - log(1 - e^x) of the means over tokens: ORPO, equations 4 and 7."""
    c, r = pairs.means
    return -beta * logsigmoid(c - _log1mexp(c) - r + _log1mexp(r))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact at both ends; where a probability is 1, as if it were the next number below."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


def _cpo(pairs: Pairs, settings: CpoSection) -> Tensor:
    """With m = log q(chosen) - log q(rejected), of sums or of means over tokens.

    sigmoid  -(1 - e) S(beta m) - e S(-beta m)           CPO, arXiv 2401.08417, equation 3
    simpo    the same of m - gamma / beta                SimPO, arXiv 2405.14734, equation 6
    hinge    max(0, 1 - beta m)
    ipo      (m - 1 / (2 beta))^2
    """
    chosen, rejected = logps(pairs, settings)
    margin, beta = chosen - rejected, settings.beta
    if settings.loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if settings.loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if settings.loss_type == "simpo":
        margin = margin - (0.5 if settings.simpo_gamma is None else settings.simpo_gamma) / beta
    epsilon = settings.label_smoothing or 0.0
    return -(1 - epsilon) * logsigmoid(beta * margin) - epsilon * logsigmoid(-beta * margin)


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
"""By `loss_type` of DpoSection."""
