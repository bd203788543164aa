"""Stacks of weights (experts, out, in): the effective weight of every expert at once, and its gradient.

    W'_e = g_e * (W0_e + s (dB_e A_e + B0_e dA_e)),    A = A0 + dA

A layer of experts picks rows of its input by itself, so the change cannot be added to an output as `linear.py` does it:
the effective stack is what its own code computes with. It is made in every forward, some experts at a time in float32,
with one dithered rounding (`weight_rounding.py`). Where nothing changed, the base weights come out bit by bit.

The backward is written by hand: of G = dL/dW' it takes three products with r columns and one sum over rows,

    ddB = s g (G A^T),    ddA = s (g (dB + B0))^T G,    dg = rowsum(G * W0) + s rowsum(dB * (G A^T) + B0 * (G dA^T)),

so nothing of a stack's size is kept beside W', which the layer's own products keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dude_peft.core.weight_rounding import round_weight

# Of float32: 64 MiB, or one expert where that is more.
_CHUNK_ELEMENTS = 1 << 24


def stack_product(W0: Tensor, rows: Tensor) -> Tensor:
    """Product `W0_e rows_e^T` of every expert, in the precision of `rows`.

    Args:
        W0: (experts, out, in) base weights, any floating dtype; they get no gradient.
        rows: (experts, k, in) float32 or float64.

    Returns:
        (experts, out, k) in the dtype of `rows`, differentiable in `rows`.
    """
    product: Tensor = _StackProduct.apply(W0.detach(), rows)
    return product


class _StackProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W0: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(W0)
        product = rows.new_empty(*W0.shape[:2], rows.shape[1])
        for at in _chunks(W0):
            product[at] = W0[at].to(rows.dtype) @ rows[at].mT
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (W0,) = ctx.saved_tensors
        total = grad.new_empty(W0.shape[0], grad.shape[2], W0.shape[2])
        for at in _chunks(W0):
            total[at] = grad[at].mT @ W0[at].to(grad.dtype)
        return None, total


def effective_stack(
    W0: Tensor,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    *,
    transposed: bool,
) -> Tensor:
    """Effective weights `W'_e = g_e (W0_e + s (dB_e A_e + B0_e dA_e))` of all experts, in W0's dtype.

    Args:
        W0: (experts, out, in) base weights; a view of what is stored; they get no gradient.
        dA: (experts, r, in) trained deviation of A; A itself without a frozen start.
        dB: (experts, out, r) trained deviation of B.
        A0: (experts, r, in) frozen start of A, or None.
        B0: (experts, out, r) frozen start of B, together with A0.
        gain: (experts, out) g, differentiable; None for methods without a magnitude.
        scaling: s.
        transposed: whether the result lies in memory as (experts, in, out).

    Returns:
        (experts, out, in), or (experts, in, out) where transposed; contiguous. Differentiable in dA, dB and gain.

    Source: DuDe section 3 for every expert, in the deviations of DESIGN section 2.
    """
    stack: Tensor = _EffectiveStack.apply(W0.detach(), dA, dB, A0, B0, gain, scaling, transposed)
    return stack


class _EffectiveStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W0: Tensor,
        dA: Tensor,
        dB: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        gain: Tensor | None,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(W0, dA, dB, A0, B0, gain)
        ctx.scaling, ctx.transposed = scaling, transposed
        experts, out, in_ = W0.shape
        wide = torch.promote_types(W0.dtype, torch.float32)
        stored = W0.new_empty(experts, in_, out) if transposed else W0.new_empty(experts, out, in_)
        made = stored.mT if transposed else stored
        for at in _chunks(W0):
            left, right = _factors(dA[at], dB[at], _cut(A0, at), _cut(B0, at), wide)
            V = torch.baddbmm(W0[at].to(wide), left, right, alpha=scaling)
            if gain is not None:
                V = V.mul_(gain[at].to(wide)[..., None])
            made[at] = round_weight(V.view(-1, in_), W0.dtype, at.start * out).view(V.shape)
        return stored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W0, dA, dB, A0, B0, gain = ctx.saved_tensors
        scaling = ctx.scaling
        G_all = grad.mT if ctx.transposed else grad
        wide = torch.promote_types(W0.dtype, torch.float32)
        grad_dA, grad_dB = torch.empty_like(dA), torch.empty_like(dB)
        grad_gain = None if gain is None else torch.empty_like(gain)
        with torch.autocast(grad.device.type, enabled=False):
            for at in _chunks(W0):
                G = G_all[at].to(wide)
                left, right = _factors(dA[at], dB[at], _cut(A0, at), _cut(B0, at), wide)
                through = G @ right.mT  # (chunk, out, r or 2r): G A^T, and G dA^T where there is a frozen start
                r = dA.shape[1]
                both = left if B0 is None else left[..., :r] + left[..., r:]
                g = None if gain is None else gain[at].to(wide)[..., None]
                grad_dB[at] = scaling * (through[..., :r] if g is None else g * through[..., :r])
                grad_dA[at] = scaling * ((both if g is None else g * both).mT @ G)
                if grad_gain is not None:
                    along = (left * through).sum(dim=-1)
                    grad_gain[at] = (G * W0[at].to(wide)).sum(dim=-1) + scaling * along
        return None, grad_dA, grad_dB, None, None, grad_gain, None, None


def _factors(dA: Tensor, dB: Tensor, A0: Tensor | None, B0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """L = [dB, B0] and R = [A0 + dA; dA] of some experts."""
    if A0 is None or B0 is None:
        return dB.to(dtype), dA.to(dtype)
    return torch.cat([dB.to(dtype), B0.to(dtype)], dim=2), torch.cat([(A0 + dA).to(dtype), dA.to(dtype)], dim=1)


def _cut(tensor: Tensor | None, at: slice) -> Tensor | None:
    return None if tensor is None else tensor[at]


def _chunks(W: Tensor) -> Iterator[slice]:
    """Some experts at a time."""
    experts, out, in_ = W.shape
    count = max(1, _CHUNK_ELEMENTS // max(1, out * in_))
    for start in range(0, experts, count):
        yield slice(start, min(start + count, experts))
