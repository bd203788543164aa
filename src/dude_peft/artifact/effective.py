"""The weight that a trained layer amounts to, from its tensors and the base weight alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dude_peft.artifact.stacks import experts_of
from dude_peft.artifact.stock import LayerTensors
from dude_peft.core.magnitude import gain, norm_change, rows_product
from dude_peft.core.weight_rounding import round_weight

_BLOCK_ELEMENTS = 1 << 22  # of float32: 16 MiB

Change = tuple[float, LayerTensors, float]
"""Of one adapter on one layer: its weight w, its state, its scaling s."""


def effective_weight(W0: Tensor, layer: LayerTensors, scaling: float, g: Tensor | None = None) -> Tensor:
    """Effective weight `W' = g V`, `V = W0 + s (dB A + B0 dA)`; without a rank `V = W0 + s dB`.

    Every row follows from its own row of W0 and of the layer's tensors, so some rows at a time may be given.

    Args:
        W0: (out, in) base weight in float32 or float64.
        layer: state of the layer, its (out, ...) tensors for the same rows.
        scaling: s.
        g: (out,) gain, where it is known; else it is computed.

    Returns:
        (out, in) in W0's dtype, a tensor of its own.

    Source: DuDe section 3, in the deviations of DESIGN section 2.
    """
    if g is None:
        g = layer_gain(W0, layer, scaling)
    if layer.dA is None:
        return torch.add(W0, layer.dB.to(W0), alpha=scaling)
    A = layer.dA if layer.A0 is None else layer.A0 + layer.dA
    V = torch.addmm(W0, layer.dB.to(W0), A.to(W0), alpha=scaling)
    if layer.B0 is not None:
        V.addmm_(layer.B0.to(W0), layer.dA.to(W0), alpha=scaling)
    if g is None:
        return V
    return V * g.to(W0)[:, None] if V.requires_grad else V.mul_(g.to(W0)[:, None])


def layer_gain(W0: Tensor, layer: LayerTensors, scaling: float, norm_gradient: str = "detached") -> Tensor | None:
    """Gain g = m / ||V|| of every row, (out,) in float32 or better; None for methods without a magnitude."""
    if layer.m0 is None:
        return None
    assert layer.dA is not None
    dA = layer.dA.to(torch.promote_types(layer.dA.dtype, torch.float32))
    start = None if layer.A0 is None else rows_product(W0, layer.A0)
    q = norm_change(rows_product(W0, dA), start, dA, layer.dB.to(dA.dtype), layer.A0, layer.B0, scaling)
    return gain(layer.m0, layer.magnitude_change(), q, norm_gradient)


def combined_weight(
    W0: Tensor, changes: Sequence[Change], combine: Callable[[list[Tensor], list[float]], Tensor] | None = None
) -> Tensor:
    """Weight of several adapters at once, `W0 + sum_i w_i (W'_i - W0)`.

    Args:
        W0: (out, in) base weight in float32 or float64, or some rows of it.
        changes: of every adapter, for the same rows.
        combine: makes one change of several in another way than by the sum; it may write into them.

    Returns:
        (out, in) in W0's dtype, a tensor of its own. Memory calls for blocks of `rows_at_once` rows; everybody who
        takes these gets the same bits.
    """
    if not changes:
        return W0.clone()
    if len(changes) == 1 and changes[0][0] == 1 and combine is None:
        return effective_weight(W0, *changes[0][1:])
    deltas = [effective_weight(W0, layer, scaling).sub_(W0) for _, layer, scaling in changes]
    return W0 + (combine or weighted_sum)(deltas, [weight for weight, _, _ in changes])


def merged_weight(
    weight: Tensor, changes: Sequence[Change], dtype: torch.dtype | None, *, whole: bool, first_row: int = 0
) -> Tensor:
    """`combined_weight` of a whole weight, some rows at a time, rounded once; the bits are those of `dude merge`.

    Args:
        weight: (out, in) base weight in any float dtype; or a stack (experts, out, in), whose experts are taken one by
            one.
        changes: of every adapter.
        dtype: of the result; None leaves it in float32 or better.
        whole: take all rows at once, as of a weight that is stored as (in, out).
        first_row: place of the first row in the stack.

    Returns:
        As `weight`, a tensor of its own.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    out, in_ = weight.shape[-2:]
    merged = torch.empty(weight.shape, dtype=dtype or wide, device=weight.device)
    if weight.ndim == 3:
        states = [experts_of(layer) for _, layer, _ in changes]
        for e, matrix in enumerate(weight):
            own = [(w, state[e], s) for (w, _, s), state in zip(changes, states, strict=True)]
            merged[e] = merged_weight(matrix, own, dtype, whole=whole, first_row=e * out)
        return merged
    count = out if whole else rows_at_once(in_)
    for start in range(0, out, count):
        rows = slice(start, min(start + count, out))
        # A copy also where it is wide already: a product's bits depend on how its arguments lie in memory.
        W0 = weight[rows].to(wide, copy=True, memory_format=torch.contiguous_format)
        block = combined_weight(W0, [(w, rows_of(layer, rows), s) for w, layer, s in changes])
        merged[rows] = block if dtype is None else round_weight(block, dtype, first_row + start)
    return merged


def weighted_sum(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """`sum_i w_i deltas_i`, in the first one's memory."""
    total = deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def rows_at_once(columns: int) -> int:
    """How many rows of a weight are merged at a time; the bits of a product depend on it."""
    return max(1, _BLOCK_ELEMENTS // columns)


def rows_of(layer: LayerTensors, rows: slice) -> LayerTensors:
    """The same layer for some of its output rows: views, not copies."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    return LayerTensors(
        dA=layer.dA, dB=layer.dB[rows], A0=layer.A0, B0=cut(layer.B0), m0=cut(layer.m0), dm=cut(layer.dm)
    )
