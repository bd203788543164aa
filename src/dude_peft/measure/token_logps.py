"""Log-probabilities of the judged tokens, summed over each row, in bounded memory and differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dude_peft.data.labels import IGNORE

_CHUNK = 2**24
"""Wide numbers (float32) held at a time: 64 MiB."""


def row_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row sum_t log q_t[label_t] over its judged tokens, q_t = softmax(logits_t-1), and their number.

    Both directions go through the tokens in chunks; of the whole, only the gradient is allocated, in the logits' dtype.

    Args:
        logits: (rows, tokens, V).
        labels: (rows, tokens), IGNORE where nothing is judged.

    Returns:
        (rows,) sums in nats, float32, or float64 for such logits; (rows,) counts.
    """
    judged = labels[:, 1:] != IGNORE
    row, token = judged.nonzero(as_tuple=True)
    places = row * labels.shape[1] + token
    found: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), places, labels[row, token + 1]
    )
    # Summed along a row of a rectangle: the order of the sum is always the same.
    each = found.new_zeros(judged.shape).index_put((row, token), found)
    return each.sum(1), judged.sum(1)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, places, labels)
        parts = [
            _log_softmax(logits[chunk]).gather(1, wanted[:, None]) for chunk, wanted in _chunks(logits, places, labels)
        ]
        return torch.cat(parts)[:, 0] if parts else logits.new_zeros(0, dtype=_wide(logits))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        logits, places, labels = ctx.saved_tensors
        gradient, begin = torch.zeros_like(logits), 0
        for chunk, wanted in _chunks(logits, places, labels):
            slope = outer[0][begin : begin + len(chunk), None]
            begin += len(chunk)
            part = _log_softmax(logits[chunk]).exp_().mul_(-slope)
            part.scatter_add_(1, wanted[:, None], slope)
            gradient[chunk] = part.to(gradient.dtype)
        return gradient, None, None


def _chunks(logits: Tensor, places: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK // logits.shape[1])
    return [*zip(places.split(size), labels.split(size), strict=True)] if len(places) else []  # type: ignore[no-untyped-call]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(_wide(logits)).log_softmax(-1)
