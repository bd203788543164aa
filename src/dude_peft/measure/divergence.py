"""The loss of every judged token as a distance from its target distribution, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**24
"""Wide numbers (float32) held at a time, of each of the two distributions: 64 MiB."""


def target_loss(logits: Tensor, places: Tensor, labels: Tensor, base: Tensor) -> Tensor:
    """Sum over tokens of KL(target || softmax(logits)), differentiable by `logits` alone.

        first M - K tokens:  target = the label              loss = -log q[label]                (cross-entropy)
        last K tokens:       target = p = softmax(base)      loss = sum_v p[v] (log p[v] - log q[v])
        gradient of each:    q - target

    Both directions go through the tokens in chunks; of the whole, only the gradient is allocated, in the logits' dtype.

    Args:
        logits: (N, V), q = softmax of a row.
        places: (M,) rows of `logits` that are judged, none twice.
        labels: (M,) ids; those of the last K tokens are not looked at.
        base: (K, V) logits of the model that the last K tokens are compared with; K may be 0.

    Returns:
        A scalar in nats, float32, or float64 for such logits.
    """
    found: Tensor = _TargetLoss.apply(logits, places, labels, base)  # type: ignore[no-untyped-call]
    return found


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of each row, P = softmax(p) and Q = softmax(q): (K, V) -> (K,), in nats.

    What P rules out adds nothing. Wherever a direction is recorded, its name is kl_P_Q, as in kl_base_tuned.
    """
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    # Where p = 0 the term is 0 times something infinite; NaN shall stay NaN.
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, labels: Tensor, base: Tensor) -> Tensor:
        ctx.save_for_backward(logits, places, labels, base)
        total = torch.zeros((), dtype=_wide(logits), device=logits.device)
        for chunk, targets in _chunks(logits, places, labels, base):
            rows = logits[chunk]
            if targets.ndim == 1:
                total -= _log_softmax(rows).gather(1, targets[:, None]).sum()
            else:
                total += divergence(targets, rows).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        logits, places, labels, base = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for chunk, targets in _chunks(logits, places, labels, base):
            part = _log_softmax(logits[chunk]).exp_()
            if targets.ndim == 1:
                part.scatter_add_(1, targets[:, None], torch.full_like(part[:, :1], -1.0))
            else:
                part -= _log_softmax(targets).exp_()
            gradient[chunk] = (part * outer[0]).to(gradient.dtype)
        return gradient, None, None, None


def _chunks(logits: Tensor, places: Tensor, labels: Tensor, base: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(rows of the logits, their targets: labels or the base's logits), a bounded number of tokens each."""
    size = max(1, _CHUNK // logits.shape[1])
    learned = len(places) - len(base)
    return [
        *zip(places[:learned].split(size), labels[:learned].split(size), strict=True),  # type: ignore[no-untyped-call]
        *zip(places[learned:].split(size), base.split(size), strict=True),  # type: ignore[no-untyped-call]
    ]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(_wide(logits)).log_softmax(-1)
