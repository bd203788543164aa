"""The two passes over (tokens, out) that an adapted layer adds to the frozen one, as plain torch operations.

    forward:    v = base + s u L^T,   y = g * v + (1 - g) * bias       one rounding at the end
    backward:   dv = g * dy,          dot = sum over tokens of dy * kept,     w = dv L

On a CPU both run over blocks of rows that stay in the cache, so that what costs time is reading `base` and writing
`y` once, not the operations in between; nothing (tokens, out)-sized is made beside the results. On a GPU with Triton
`kernels.py` has the same two passes as one kernel each. Compiled code and other devices take everything as one block
and leave the fusing to the compiler.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dude_peft.core.precision import cast
from dude_peft.core.rounding import content_thresholds, is_half, round_dithered_
from dude_peft.core.scratch import scratch

_BLOCK_ELEMENTS = 1 << 19  # of float32: 2 MiB; smaller blocks cost more in waking threads than the cache gives back
_BUFFERED_ELEMENTS = 1 << 23  # a gradient up to this size may stay in a buffer between layers
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked for, not imported: that takes a second
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`kernels.py` where it runs on the tensor's device and dtype, else None: then torch's operations do the work."""
    if not tensor.is_cuda or not _HAS_TRITON or tensor.dtype not in _KERNEL_DTYPES:
        return None
    # Tensor cores with bfloat16 begin with Ampere; ROCm's devices call themselves "cuda" too, and all have them.
    if torch.version.hip is None and torch.cuda.get_device_properties(tensor.device).major < 8:
        return None
    from dude_peft.core import kernels

    return kernels


def compose(
    base: Tensor,
    u: Tensor,
    left: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: torch.dtype | None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output of the adapted layer from the frozen layer's.

        v = base + s u L^T,    y = g * v + (1 - g) * bias

    Args:
        base: (tokens, out) what the frozen layer gave, bias included.
        u: (tokens, k) = x R^T.
        left: (out, k) L.
        gain: (out,) g in float32 or better; None for 1.
        bias: (out,) the bias inside base; ignored without a gain.
        scaling: s.
        keep: dtype in which v without its bias is returned as well; None for not at all.
        overwrite: y may take base's place.

    Returns:
        (y, kept), both (tokens, out): y in base's dtype; kept = v - bias, or None.
    """
    kernels = kernels_for(base)
    if kernels is not None:
        return kernels.compose(base, u, left, gain, bias, scaling, keep)
    dtype, wide = base.dtype, torch.promote_types(base.dtype, torch.float32)
    half = is_half(dtype)
    left_t = cast(left, wide).T
    u = cast(u, wide)
    g = None if gain is None else cast(gain, wide)
    b = None if bias is None or g is None else cast(bias, wide)
    shift = None if b is None or g is None else (1 - g) * b
    y = base if overwrite else torch.empty_like(base)
    kept = None if keep is None else torch.empty_like(base, dtype=keep)
    for base_rows, u_rows, y_rows, kept_rows in _blocks(base, u, y, kept):
        v = scratch(base_rows, wide, "block") if half else y_rows
        if half or not overwrite:
            v.copy_(base_rows)
        threshold = None
        if half:
            threshold = content_thresholds(v, dtype, scratch(v, torch.int32, "threshold"))
        v.addmm_(u_rows, left_t, alpha=scaling)
        if kept_rows is not None:
            kept_rows.copy_(v if b is None else v - b)
        if g is not None:
            v.mul_(g)
        if shift is not None:
            v.add_(shift)
        if threshold is not None:
            y_rows.copy_(round_dithered_(v, threshold, dtype))
    return y, kept


def spread(
    dy: Tensor, gain: Tensor | None, kept: Tensor | None, left: Tensor | None, passing: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient before the gain, and what the gradients of the gain and of the low-rank factors need.

        dv = g * dy,    dot = sum over tokens of dy * kept,    w = dv L

    Args:
        dy: (tokens, out) gradient of y.
        gain: (out,) g; None for 1.
        kept: (tokens, out) what `compose` kept, or y itself; None if no gradient of the gain is wanted.
        left: (out, k) L in dy's dtype; None if w is not wanted.
        passing: dv is done with before the next layer's turn, and may lie in a buffer.

    Returns:
        (dv, dot, w): (tokens, out) in dy's dtype (dy itself without a gain), (out,) in float32 or better, or None, and
        (tokens, k) in dy's dtype, or None. The sums' order is fixed.
    """
    if gain is None:
        return dy, None, None if left is None else dy @ left
    kernels = kernels_for(dy)
    if kernels is not None:
        return kernels.spread(dy, gain, kept, left)
    wide = torch.promote_types(dy.dtype, torch.float32)
    g = cast(gain, wide)
    buffered = passing and dy.numel() <= _BUFFERED_ELEMENTS
    dv = scratch(dy, dy.dtype, "dv") if buffered else torch.empty_like(dy)
    dot: Tensor | None = None
    for dy_rows, kept_rows, dv_rows in _blocks(dy, kept, dv):
        d = dy_rows if dy.dtype == wide else scratch(dy_rows, wide, "block").copy_(dy_rows)
        if kept_rows is not None:
            products = scratch(d, wide, "products")
            if kept_rows.dtype == wide:
                torch.mul(d, kept_rows, out=products)
            else:
                products.copy_(kept_rows).mul_(d)
            part = products.sum(dim=0)
            dot = part if dot is None else dot.add_(part)
        if dy.dtype == wide:
            torch.mul(d, g, out=dv_rows)
        else:
            dv_rows.copy_(d.mul_(g))
    return dv, dot, None if left is None else dv @ left


def _blocks(matrix: Tensor, *others: Tensor | None) -> list[tuple[Any, ...]]:
    """The same rows of all of them, in blocks; all rows at once but on a CPU in eager mode."""
    tensors = (matrix, *others)
    rows, columns = matrix.shape
    size = max(1, _BLOCK_ELEMENTS // max(1, columns))
    if rows <= size or not matrix.is_cpu or torch.compiler.is_compiling():
        return [tensors]
    return [
        tuple(None if tensor is None else tensor[start : start + size] for tensor in tensors)
        for start in range(0, rows, size)
    ]
