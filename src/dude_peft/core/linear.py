"""The adapted linear layer as one differentiable function, in deviations from the frozen layer's own output.

    y = g * (base + s ((x A^T) dB^T + (x dA^T) B0^T)) + bias,     base = x W0^T,  A = A0 + dA

`base_out` comes from the frozen layer, called once, as it is, so any layer that maps rows works: dense, quantised,
sharded, hooked. The two low-rank products are stacked, L = [dB, B0] (out, 2r) and R = [A; dA] (2r, in), and the sum is
formed in float32 with one rounding at the end. Where nothing changed, g = 1 and the change is 0, the bits of
`base_out` come out as they went in.

What was traded off: a hand-written backward keeps x, u = x R^T and y (plain autograd would keep several (tokens, out)
temporaries), and pays for it with two special cases. Where |g| is tiny, y / g has lost the digits of the gain's
gradient, so these rows keep their pre-gain value. Where a half-precision bias may dwarf the product, the pre-bias
output is kept instead of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this |g| the quotient y / g is no longer trusted for the gradient of g.
_TINY_GAIN = 1e-2


def adapted_linear(
    base_out: Tensor,
    x: Tensor,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """Output of the adapted layer, `y = g * (base_out - bias + s x (dB A + B0 dA)^T) + bias`.

    Args:
        base_out: (*, out) what the frozen layer gave for its input, bias included.
        x: (*, in) input of the change; the layer's input, or its dropped-out copy.
        dA: (r, in) trained deviation of A.
        dB: (out, r) trained deviation of B.
        A0: (r, in) frozen start of A; None where the method has none (then dA is A itself).
        B0: (out, r) frozen start of B; None together with A0.
        gain: (out,) g in float32 or float64, differentiable; None for methods without a magnitude (g = 1).
        bias: (out,) the bias inside base_out; needed only with a gain.
        scaling: s.

    Returns:
        (*, out) in base_out's dtype. Gradients reach base_out, x, dA, dB, gain and bias;
        a second derivative is refused.

    Source: DuDe section 3, in the deviations of DESIGN section 2.
    """
    y: Tensor = _AdaptedLinear.apply(base_out, x, dA, dB, A0, B0, gain, bias, scaling)
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        dA: Tensor,
        dB: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        scaling: float,
    ) -> Tensor:
        with torch.autocast(base_out.device.type, enabled=False):
            compute, wide = base_out.dtype, torch.promote_types(base_out.dtype, torch.float32)
            left, right = _stack(dA, dB, A0, B0)
            base = base_out.reshape(-1, base_out.shape[-1])
            rows = x.reshape(-1, x.shape[-1]).to(compute)
            u = rows @ right.to(compute).T  # (tokens, 2r)
            v = torch.addmm(base.to(wide), u.to(wide), left.to(wide).T, alpha=scaling)  # (tokens, out)
            before_bias: Tensor | None = None
            tiny: Tensor | None = None
            v_tiny: Tensor | None = None
            if gain is None:
                y = v.to(compute)
            else:
                g = gain.to(wide)
                if ctx.needs_input_grad[6]:
                    tiny = torch.nonzero(g.abs() < _TINY_GAIN).flatten()
                    shift = 0 if bias is None else bias.to(wide)[tiny]
                    v_tiny = v[:, tiny] - shift
                v.mul_(g)
                if bias is not None:
                    if ctx.needs_input_grad[6] and compute != wide:
                        before_bias = (v - g * bias.to(wide)).to(compute)
                    v.add_((1 - g) * bias.to(wide))
                y = v.to(compute)
            y = y.view(base_out.shape)
        kept = before_bias if before_bias is not None else y
        needs_kept = gain is not None and ctx.needs_input_grad[6]
        ctx.save_for_backward(
            x,
            u,
            dA,
            dB,
            A0,
            B0,
            gain,
            bias,
            kept if needs_kept else None,
            tiny if needs_kept else None,
            v_tiny,
        )
        ctx.kept_has_bias = bias is not None and before_bias is None
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, dA, dB, A0, B0, gain, bias, kept, tiny, v_tiny = ctx.saved_tensors
        need_base, need_x, need_dA, need_dB, _, _, need_gain, need_bias, _ = ctx.needs_input_grad
        compute, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
        out = dy.shape[-1]
        dy_rows = dy.reshape(-1, out)
        dv = dy_rows if gain is None else (dy_rows.to(wide) * gain.to(wide)).to(compute)  # (tokens, out)
        grad_base = dv.view(dy.shape) if need_base else None
        grad_x = grad_dA = grad_dB = grad_gain = grad_bias = None
        r = dA.shape[0]
        left, right = _stack(dA, dB, A0, B0)
        if need_x or need_dA:
            w = dv @ left.to(compute)  # (tokens, 2r)
            if need_x:
                grad_x = (ctx.scaling * (w @ right.to(compute))).view(x.shape).to(x.dtype)
            if need_dA:
                through_B = w if B0 is None else w[:, :r] + w[:, r:]
                rows = x.reshape(-1, x.shape[-1]).to(compute)
                grad_dA = (through_B.T @ rows).to(dA.dtype).mul_(ctx.scaling)
        if need_dB:
            grad_dB = (dv.T @ u[:, :r]).to(dB.dtype).mul_(ctx.scaling)
        if need_gain:
            grad_gain = _grad_gain(dy_rows.to(wide), kept, gain, bias if ctx.kept_has_bias else None, tiny, v_tiny)
        if need_bias and bias is not None and gain is not None:
            # base_out carries the other part, g * dy, to the bias through the frozen layer.
            grad_bias = (dy_rows.to(wide).sum(dim=0) * (1 - gain.to(wide))).to(bias.dtype)
        return grad_base, grad_x, grad_dA, grad_dB, None, None, grad_gain, grad_bias, None


def _stack(dA: Tensor, dB: Tensor, A0: Tensor | None, B0: Tensor | None) -> tuple[Tensor, Tensor]:
    """L = [dB, B0] and R = [A0 + dA; dA]; dB and dA alone where there is no frozen start."""
    if A0 is None or B0 is None:
        return dB, dA
    return torch.cat([dB.to(B0.dtype), B0], dim=1), torch.cat([A0 + dA, dA.to(A0.dtype)])


def _grad_gain(dy: Tensor, kept: Tensor, gain: Tensor, bias: Tensor | None, tiny: Tensor, v_tiny: Tensor) -> Tensor:
    """sum_t dy * v for every row, with v = (y - bias) / g, and v itself where g is tiny."""
    kept = kept.reshape(dy.shape).to(dy.dtype)
    dot = (dy * kept).sum(dim=0)
    if bias is not None:
        dot = dot - bias.to(dy.dtype) * dy.sum(dim=0)
    g = gain.to(dy.dtype)
    grad = dot / torch.where(g.abs() < _TINY_GAIN, 1.0, g)
    if tiny.numel():
        grad = grad.index_copy(0, tiny, (dy[:, tiny] * v_tiny).sum(dim=0))
    return grad.to(gain.dtype)
