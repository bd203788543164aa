"""The adapted linear layer as one differentiable function, in deviations from the frozen layer's own output.

    y = g * (base + s ((x A^T) dB^T + (x dA^T) B0^T)) + bias,     base = x W0^T,  A = A0 + dA

`base_out` comes from the frozen layer, called once, as it is, so any layer that maps rows works: dense, quantised,
sharded, hooked. Of a plain frozen nn.Linear the product is taken inside instead (`FrozenProduct`), by the same call
with the same bits: the change is then added where the product lies, and in the backward both parts of the input's
gradient are one sum, which saves a pass over memory in each direction.

The two low-rank products are stacked, L = [dB, B0] (out, 2r) and R = [A; dA] (2r, in), and the sum is formed in float32
with one rounding at the end (`rounding.py`). Where nothing changed, g = 1 and the change is 0, the bits of `base_out`
come out as they went in.

What was traded off: the hand-written backward keeps x, u = x R^T and the output y, where plain autograd would keep
several (tokens, out) temporaries, and casts the float32 factors inside. The gain's gradient is sum_t dy * v with
v = y / g; a gain of exactly zero never comes here (`magnitude.py`). Mostly y is kept anyway, by the activation function
or the attention behind the layer, and costs nothing. A copy of v is kept instead
- of a layer with a bias, which would have to be taken out of y again, at the cost of its digits;
- in float16, whose range y can leave downwards where v does not;
- in float32, where the caller says that nobody else keeps y: as bfloat16, which is half the memory. Each term of the
  gain's gradient is rounded by up to 2^-9, and no other gradient; over 1,024 tokens of noise the sum moves by about
  1e-3 of its size (`tests/test_linear.py` bounds it). Below 512 tokens, where the memory is small, every digit stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dude_peft.core.compose import compose, spread

# From this many tokens on a float32 layer may keep its product in half the memory.
_COMPACT_TOKENS = 512


class FrozenProduct(NamedTuple):
    """The frozen layer's output, not computed yet: `linear(x, weight, bias)` of a plain layer."""

    x: Tensor
    """(*, in) the layer's input, in the weight's dtype."""
    weight: Tensor
    """(out, in) W0; it gets no gradient."""


def adapted_linear(
    base: Tensor | FrozenProduct,
    x: Tensor,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dm: Tensor | None = None,
    slope: Tensor | None = None,
    output_kept: bool = True,
) -> Tensor:
    """Output of the adapted layer, `y = g * (base - bias + s x (dB A + B0 dA)^T) + bias`.

    Args:
        base: (*, out) what the frozen layer gave for its input, bias included; or the product, to be taken inside.
        x: (*, in) input of the change; the layer's input, or its dropped-out copy.
        dA: (r, in) trained deviation of A.
        dB: (out, r) trained deviation of B.
        A0: (r, in) frozen start of A; None where the method has none (then dA is A itself).
        B0: (out, r) frozen start of B; None together with A0.
        gain: (out,) g in float32 or float64, differentiable; None for methods without a magnitude (g = 1).
        bias: (out,) the bias inside base; needed with a gain, and with a product that is taken inside.
        scaling: s.
        dm: (out,) trained deviation of the magnitude, where `gain` is a value computed before and no function of it
            that autograd knows; its gradient is slope * (the gain's gradient).
        slope: (out,) dg/ddm, with dm.
        output_kept: whether the model keeps the output for its backward anyway; decides what this function keeps.

    Returns:
        (*, out) in base's dtype. Gradients reach base (or the product's x), x, dA, dB, bias, and gain or dm.

    Raises:
        RuntimeError: a second derivative is asked for (torch's once_differentiable).

    Source: DuDe section 3, in the deviations of DESIGN section 2.
    """
    factors = (dA, dB, A0, B0, gain, bias, scaling, dm, slope, output_kept)
    if isinstance(base, FrozenProduct):
        inputs: tuple[Tensor | None, ...] = (None, base.x, base.weight, None if x is base.x else x)
    else:
        inputs = (base, None, None, x)
    y: Tensor = _AdaptedLinear.apply(*inputs, *factors)
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor | None,
        x: Tensor | None,
        weight: Tensor | None,
        x_change: Tensor | None,
        dA: Tensor,
        dB: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        dm: Tensor | None,
        slope: Tensor | None,
        output_kept: bool,
    ) -> Tensor:
        fused = base_out is None
        if base_out is None:
            assert x is not None
            assert weight is not None
            base_out = torch.nn.functional.linear(x, weight, bias)
        seen = x if x_change is None else x_change  # what the change sees
        assert seen is not None
        compute = base_out.dtype
        needs_kept = gain is not None and (ctx.needs_input_grad[8] or ctx.needs_input_grad[11])
        compact = compute == torch.float32 and seen.numel() >= _COMPACT_TOKENS * seen.shape[-1]
        keep_v = needs_kept and (bias is not None or compute == torch.float16 or (compact and not output_kept))
        keep = (torch.bfloat16 if compact else compute) if keep_v else None
        with torch.autocast(base_out.device.type, enabled=False):
            left, right = _stack(dA, dB, A0, B0, compute)
            base = base_out.reshape(-1, base_out.shape[-1])
            u = seen.reshape(-1, seen.shape[-1]).to(compute) @ right.T  # (tokens, 2r)
            y, kept = compose(base, u, left, gain, bias, scaling, keep, fused)
            y = y.view(base_out.shape)
            if B0 is not None:
                u = u[:, : dA.shape[0]].contiguous()  # x A^T is all that the backward reads
        if needs_kept and kept is None:
            kept = y
        ctx.save_for_backward(seen, weight, u, dA, dB, A0, B0, gain, bias, kept, slope)
        ctx.kept_is_v = keep_v
        ctx.scaling = scaling
        ctx.one_input = x_change is None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, u, dA, dB, A0, B0, gain, bias, kept, slope = ctx.saved_tensors
        need_base, need_x, _, need_change, need_dA, need_dB, _, _, need_gain, need_bias, _, need_dm, _, _ = (
            ctx.needs_input_grad
        )
        r, compute, scaling = dA.shape[0], u.dtype, ctx.scaling
        need_change = need_change or (need_x and ctx.one_input)
        with torch.autocast(dy.device.type, enabled=False):
            left, right = _stack(dA, dB, A0, B0, compute)
            dy_rows = dy.reshape(-1, dy.shape[-1])
            grad_x = grad_change = grad_dA = grad_dB = grad_gain = grad_bias = grad_dm = None
            kept_rows = None if kept is None else kept.reshape(dy_rows.shape)
            dv, dot, w = spread(dy_rows, gain, kept_rows, left if need_change or need_dA else None, not need_base)
            grad_base = dv.view(dy.shape) if need_base else None
            if need_x and weight is not None:
                grad_x = dv @ weight
            if w is not None:
                w = w.mul_(scaling)  # (tokens, 2r)
                if grad_x is not None and ctx.one_input:
                    grad_x.addmm_(w, right)
                elif need_change:
                    grad_change = (w @ right).view(seen.shape).to(seen.dtype)
                if need_dA:
                    through_B = w if B0 is None else w[:, :r] + w[:, r:]
                    grad_dA = (through_B.T @ seen.reshape(-1, seen.shape[-1]).to(compute)).to(dA.dtype)
            if grad_x is not None:
                grad_x = grad_x.view(seen.shape)
            if need_dB:
                grad_dB = (dv.T @ u).to(dB.dtype).mul_(scaling)
            if dot is not None:
                dg = dot if ctx.kept_is_v else dot / gain.to(dot.dtype)
                grad_gain = dg.to(gain.dtype) if need_gain else None
                grad_dm = (dg * slope.to(dg.dtype)).to(gain.dtype) if need_dm else None
            if need_bias and bias is not None and (gain is not None or weight is not None):
                wide = torch.promote_types(compute, torch.float32)
                grad_bias = dy_rows.to(wide).sum(dim=0)
                if weight is None:  # base_out carries the other part, g * dy, to the bias through the frozen layer
                    grad_bias = grad_bias * (1 - gain.to(wide))
                grad_bias = grad_bias.to(bias.dtype)
        factors = (grad_dA, grad_dB, None, None, grad_gain, grad_bias, None, grad_dm, None, None)
        return grad_base, grad_x, None, grad_change, *factors


def _stack(dA: Tensor, dB: Tensor, A0: Tensor | None, B0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """L = [dB, B0] and R = [A0 + dA; dA]; dB and dA alone where there is no frozen start."""
    if A0 is None or B0 is None:
        return dB.to(dtype), dA.to(dtype)
    return torch.cat([dB.to(dtype), B0.to(dtype)], dim=1), torch.cat([(A0 + dA).to(dtype), dA.to(dtype)])
