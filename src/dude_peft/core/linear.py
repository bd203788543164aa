"""The adapted linear layer as one differentiable function, in deviations from the frozen layer's own output.

    y = g * (base + s ((x A^T) dB^T + (x dA^T) B0^T)) + bias,     base = x W0^T,  A = A0 + dA

`base_out` comes from the frozen layer, called once, as it is, so any layer that maps rows works: dense, quantised,
sharded, hooked. Of a plain frozen nn.Linear the product is taken inside instead (`FrozenProduct`), by the same call
with the same bits: the change is then added where the product lies, and in the backward both parts of the input's
gradient are one sum, which saves a pass over memory in each direction.

Without a rank R is the identity, which no product is taken with: L is the whole change, and u is x.

The two low-rank products are stacked, L = [dB, B0] (out, 2r) and R = [A; dA] (2r, in), and the sum is formed in float32
with one rounding at the end (`rounding.py`). Where nothing changed, g = 1 and the change is 0, the bits of `base_out`
come out as they went in.

What was traded off: the hand-written backward keeps x, u = x R^T and the output y, where plain autograd would keep
several (tokens, out) temporaries, and casts the float32 factors inside. The gain's gradient is sum_t dy * v with
v = y / g; a gain of exactly zero never comes here (`magnitude.py`). Mostly y is kept anyway, by the activation function
or the attention behind the layer, and costs nothing. Code behind the layer may change y in place, as with any output;
the backward notices, and computes v again. A copy of v is kept instead
- of a layer with a bias, which would have to be taken out of y again, at the cost of its digits;
- in compiled code, which cannot tell whether its outputs were changed;
- in float16, whose range y can leave downwards where v does not;
- in float32, where the caller says that nobody else keeps y: as bfloat16, which is half the memory (COMPACT_TOKENS).
Without a graph nothing is kept at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dude_peft.core.compose import compose, spread
from dude_peft.core.precision import cast, no_autocast
from dude_peft.core.scratch import buffer, has_scratch

# From this many tokens on, a float32 layer that keeps a copy of v keeps it as bfloat16; None: always in full. No output
# feels it, and one gradient does, the magnitude's: each term dy * v of its sum over tokens is rounded by up to 2^-9,
# up or down. Over 1,024 tokens of noise the sum moves by about 1e-3 of its size (`tests/test_linear.py`).
COMPACT_TOKENS: int | None = 512
# Elements of x A^T up to which its other half is kept beside it: less than a copy costs.
_NOT_COPIED = 1 << 13
# Elements of L and R for which a buffer pays: fewer are quickly had, and more would stay for nothing.
_LEAST_BUFFERED, _MOST_BUFFERED = 1 << 15, 1 << 22

# A frozen layer without its bias, on (tokens, in) rows: what `base` was before the bias, for a second time.
FrozenRows = Callable[[Tensor], Tensor]


# The frozen layer's output, its input, its weight, and the input of the change: where the output is to be taken here,
# the first is None; where change and layer see the same, one of the inputs is.
_Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class FrozenProduct(NamedTuple):
    """The frozen layer's output, not computed yet: `linear(x, weight, bias)` of a plain layer."""

    x: Tensor
    """(*, in) the layer's input, in the weight's dtype."""
    weight: Tensor
    """(out, in) W0; it gets no gradient."""


def adapted_linear(
    base: Tensor | FrozenProduct,
    x: Tensor,
    dA: Tensor | None,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dm: Tensor | None = None,
    slope: Tensor | None = None,
    output_kept: bool = True,
    frozen_rows: FrozenRows | None = None,
    frozen_input: Tensor | None = None,
) -> Tensor:
    """Output of the adapted layer, `y = g * (base - bias + s x (dB A + B0 dA)^T) + bias`.

    Args:
        base: (*, out) what the frozen layer gave for its input, bias included; or the product, to be taken inside.
        x: (*, in) input of the change; the layer's input, or its dropped-out copy.
        dA: (r, in) trained deviation of A; None for the identity, where B (out, in) is the whole change.
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
        frozen_rows: the frozen layer without its bias, where `base` is its output; used only if code behind the layer
            changes the output in place (None: its backward then raises).
        frozen_input: (*, in) what the frozen layer saw, where `base` is its output and x is another tensor.

    Returns:
        (*, out) in base's dtype. Gradients reach base (or the product's x), x, dA, dB, bias, and gain or dm.

    Raises:
        RuntimeError: a backward with create_graph=True, or the output was changed in
            place, and there is no frozen_rows.

    Source: DuDe section 3, in the deviations of DESIGN section 2.
    """
    factors = (dA, dB, A0, B0, gain, bias, scaling)
    if isinstance(base, FrozenProduct):
        inputs: _Inputs = (None, base.x, base.weight, None if x is base.x else x)
    else:
        inputs = (base, frozen_input, None, x)
    if not torch.is_grad_enabled():
        return _forward(inputs, *factors, None)[0]
    y: Tensor = _AdaptedLinear.apply(*inputs, *factors, dm, slope, output_kept, frozen_rows)
    return y


def _forward(
    inputs: _Inputs,
    dA: Tensor | None,
    dB: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, u, kept): the output in its own shape, x R^T, and v without its bias in the dtype `keep`, if asked for."""
    base_out, x, weight, x_change = inputs
    fused = base_out is None
    if base_out is None:
        assert x is not None
        assert weight is not None
        base_out = torch.nn.functional.linear(x, weight, bias)
    seen = x if x_change is None else x_change  # what the change sees
    assert seen is not None
    compute = base_out.dtype
    with no_autocast(base_out.device.type):
        left, right = _stack(dA, dB, A0, B0, compute)
        base = _rows(base_out)
        u = cast(_rows(seen), compute)
        if right is not None:
            u = torch.nn.functional.linear(u, right)  # (tokens, 2r)
        y, kept = compose(base, u, left, gain, bias, scaling, keep, fused)
        # A view could not be changed in place by the code behind the layer. torch's product with a bias may be one,
        # and compiled code cannot ask.
        whole = y is base and base_out.is_contiguous() and not torch.compiler.is_compiling()
        if whole and not base_out._is_view():
            return base_out, u, kept  # whose memory y is
        return torch.ops.aten._unsafe_view.default(y, base_out.shape), u, kept


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor | None,
        x: Tensor | None,
        weight: Tensor | None,
        x_change: Tensor | None,
        dA: Tensor | None,
        dB: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        dm: Tensor | None,
        slope: Tensor | None,
        output_kept: bool,
        frozen_rows: FrozenRows | None,
    ) -> Tensor:
        seen = x if x_change is None else x_change
        assert seen is not None
        compute = base_out.dtype if base_out is not None else seen.dtype
        needs_kept = gain is not None and (ctx.needs_input_grad[8] or ctx.needs_input_grad[11])
        long = COMPACT_TOKENS is not None and seen.numel() >= COMPACT_TOKENS * seen.shape[-1]
        compact = compute == torch.float32 and long
        # Of compiled code nobody can tell whether its outputs are changed in place behind it.
        wanted = bias is not None or compute == torch.float16 or torch.compiler.is_compiling()
        wanted = wanted or (compact and not output_kept)
        keep_v = needs_kept and wanted
        keep = (torch.bfloat16 if compact else compute) if keep_v else None
        inputs = (base_out, x, weight, x_change)
        y, u, kept = _forward(inputs, dA, dB, A0, B0, gain, bias, scaling, keep)
        if B0 is not None and dA is not None:
            u = u[:, : dA.shape[0]]  # x A^T is all that the backward reads
            u = u if u.numel() <= _NOT_COPIED else u.contiguous()
        ctx.changes = source = None
        if needs_kept and kept is None:
            kept, ctx.changes = _watched(y)
            source = x  # its siblings see it too, so that keeping it mostly costs nothing
        ctx.save_for_backward(seen, weight, u, dA, dB, A0, B0, gain, bias, kept, slope, source)
        ctx.kept_is_v = keep_v
        ctx.scaling = scaling
        ctx.one_input = x_change is None
        ctx.frozen_rows = frozen_rows
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "an adapted layer has no second derivative, so create_graph=True does not work; merge the adapter, "
                "or use stock PEFT"
            )
        with torch.no_grad():
            return _AdaptedLinear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight, u, dA, dB, A0, B0, gain, bias, kept, slope, source = ctx.saved_tensors
        need_base, need_x, _, need_change, need_dA, need_dB, _, _, need_gain, need_bias, _, need_dm, *_ = (
            ctx.needs_input_grad
        )
        compute, scaling = u.dtype, ctx.scaling
        need_change = need_change or (need_x and ctx.one_input)
        with no_autocast(dy.device.type):
            left, right = _stack(dA, dB, A0, B0, compute)
            dy_rows = _rows(dy)
            grad_x = grad_change = grad_dA = grad_dB = grad_gain = grad_bias = grad_dm = None
            kept_is_v = ctx.kept_is_v
            if ctx.changes is not None and ctx.changes():
                source = seen if source is None else source
                kept, kept_is_v = _product_again(source, seen, weight, left, right, scaling, ctx.frozen_rows), True
            kept_rows = None if kept is None else _rows(kept)
            dv, dot, w = spread(dy_rows, gain, kept_rows, left if need_change or need_dA else None, not need_base)
            grad_base = dv.view(dy.shape) if need_base else None
            if need_x and weight is not None:
                grad_x = dv @ weight
            if w is not None:
                if grad_x is not None and ctx.one_input:
                    more = (w,) if right is None else (w, right)
                    grad_x = (grad_x.add_ if right is None else grad_x.addmm_)(*more, alpha=scaling)
                elif need_change:
                    change = (w if right is None else w @ right).mul_(scaling)
                    grad_change = cast(change.view(seen.shape), seen.dtype)
                if need_dA:
                    r = dA.shape[0]
                    through_B = w if B0 is None else w.view(-1, 2, r).sum(dim=1)
                    grad_dA = _product(through_B.T, cast(_rows(seen), compute), dA, scaling)
            if grad_x is not None and seen.ndim != 2:
                grad_x = grad_x.view(seen.shape)
            if need_dB:
                grad_dB = _product(dv.T, u, dB, scaling)
            if dot is not None:
                dg = dot if kept_is_v else dot / cast(gain, dot.dtype)
                grad_gain = cast(dg, gain.dtype) if need_gain else None
                grad_dm = cast(dg * cast(slope, dg.dtype), gain.dtype) if need_dm else None
            if need_bias and bias is not None and (gain is not None or weight is not None):
                wide = torch.promote_types(compute, torch.float32)
                grad_bias = dy_rows.to(wide).sum(dim=0)
                if weight is None:  # base_out carries the other part, g * dy, to the bias through the frozen layer
                    grad_bias = grad_bias * (1 - gain.to(wide))
                grad_bias = grad_bias.to(bias.dtype)
        factors = (grad_dA, grad_dB, None, None, grad_gain, grad_bias, None, grad_dm, *[None] * 4)
        return grad_base, grad_x, None, grad_change, *factors


def _watched(y: Tensor) -> tuple[Tensor, Callable[[], bool] | None]:
    """The output's values for the backward, and whether they have been changed in place since.

    Saved as it is, a changed output would be an error of autograd. The alias to be saved has a count of changes of its
    own; the empty tensor shares the output's count, and none of its memory, which checkpointing lets go of.
    """
    if isinstance(y, FakeTensor):
        return y.data, None
    count = y.detach()
    count.data = count.new_empty(0)
    before = count._version
    return y.data, lambda: count._version != before


def _product_again(
    source: Tensor,
    seen: Tensor,
    weight: Tensor | None,
    left: Tensor,
    right: Tensor | None,
    scaling: float,
    frozen_rows: FrozenRows | None,
) -> Tensor:
    """The product v without its bias, (tokens, out): for an output that is not there any more."""
    rows, change_rows = (cast(_rows(t), left.dtype) for t in (source, seen))
    if weight is not None:
        base = rows @ weight.T
    elif frozen_rows is None:
        raise RuntimeError("the output of an adapted layer was changed in place, but its product is needed again")
    else:
        base = frozen_rows(rows).to(left.dtype)
    u = change_rows if right is None else change_rows @ right.T
    return base.addmm_(u, left.T, alpha=scaling)


def _stack(
    dA: Tensor | None, dB: Tensor, A0: Tensor | None, B0: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """L = [dB, B0] and R = [A0 + dA; dA]; dB and dA alone where there is no frozen start; no R for the identity."""
    if dA is None:
        return cast(dB, dtype), None
    if A0 is None or B0 is None:
        return cast(dB, dtype), cast(dA, dtype)
    left = right = None
    (out, r), in_ = dB.shape, dA.shape[1]
    if _LEAST_BUFFERED <= 2 * r * max(out, in_) <= _MOST_BUFFERED and dA.dtype == dB.dtype == dtype and has_scratch(dB):
        # Whoever called is done with them before the next layer's turn.
        left, right = buffer((out, 2 * r), dtype, "L"), buffer((2 * r, in_), dtype, "R")
    return cast(torch.cat([dB, B0], dim=1, out=left), dtype), cast(torch.cat([A0 + dA, dA], out=right), dtype)


def _product(left: Tensor, right: Tensor, factor: Tensor, scaling: float) -> Tensor:
    """`s left right`, the gradient of a factor, in its shape and dtype."""
    if left.dtype == factor.dtype:
        return torch.addmm(factor, left, right, beta=0, alpha=scaling)  # the factor itself is not read
    return cast(left @ right, factor.dtype).mul_(scaling)


def _rows(tensor: Tensor) -> Tensor:
    """(*, n) as (tokens, n)."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
