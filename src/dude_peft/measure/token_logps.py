"""Log-probabilities of the judged tokens, one by one or summed over each row, in bounded memory, differentiable."""

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
    # Summed along a row of a rectangle: the order of the sum is always the same.
    each, _, judged = _by_place(logits, labels, 1.0, entropy=False)
    return each.sum(1), judged.sum(1)


def token_logps(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each judged token log q_t[label_t], q_t = softmax(logits_t-1 / temperature), and the entropy of q_t.

    Args:
        logits: (rows, tokens, V).
        labels: (rows, tokens), IGNORE where nothing is judged.
        temperature: what logits are divided by.

    Returns:
        (rows, tokens - 1) log-probabilities in nats; entropies, without a gradient; whether a token is judged. The
        first two are float32 or float64, as `row_logps` has it, and 0 where nothing is judged.
    """
    return _by_place(logits, labels, temperature, entropy=True)


def logps_at(logits: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """Of each place log q[label], q = softmax(logits[place]), (n,), as `row_logps` takes them and in its memory.

    Which tokens are judged is given here, not looked up, so that it runs where tensors have no values.

    Args:
        logits: (tokens, V).
        places: (n,), tokens that are judged.
        labels: (n,), what each is judged for.
    """
    return _logps(logits, places, labels, 1.0, entropy=False)[0]


def _logps(
    logits: Tensor, places: Tensor, labels: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        logits, places, labels, temperature, entropy
    )
    return found


def _by_place(logits: Tensor, labels: Tensor, temperature: float, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    judged = labels[:, 1:] != IGNORE
    row, token = judged.nonzero(as_tuple=True)
    places = row * labels.shape[1] + token
    logps, entropies = _logps(logits.flatten(0, 1), places, labels[row, token + 1], temperature, entropy=entropy)
    each = logps.new_zeros(judged.shape).index_put((row, token), logps)
    others = logps.new_zeros(judged.shape).index_put((row, token), entropies) if entropy else entropies
    return each, others, judged


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, labels: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, places, labels)
        ctx.temperature = temperature
        empty = logits.new_zeros(0, dtype=_wide(logits))
        logps, entropies = [empty], [empty]
        for chunk, wanted in _chunks(logits, places, labels):
            logq = _log_softmax(logits[chunk], temperature)
            logps.append(logq.gather(1, wanted[:, None])[:, 0])
            if entropy:  # of tokens that a model rules out by -inf, 0 log 0 is 0
                entropies.append(torch.special.entr(logq.exp()).sum(1))
        found = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, places, labels = ctx.saved_tensors
        gradient, begin = torch.zeros_like(logits), 0
        for chunk, wanted in _chunks(logits, places, labels):
            slope = outer[0][begin : begin + len(chunk), None] / ctx.temperature
            begin += len(chunk)
            part = _log_softmax(logits[chunk], ctx.temperature).exp_().mul_(-slope)
            part.scatter_add_(1, wanted[:, None], slope)
            gradient[chunk] = part.to(gradient.dtype)
        return gradient, None, None, None, None


def _chunks(logits: Tensor, places: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK // logits.shape[1])
    return [*zip(places.split(size), labels.split(size), strict=True)] if len(places) else []  # type: ignore[no-untyped-call]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(_wide(logits))
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)
