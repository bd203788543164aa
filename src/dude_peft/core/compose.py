"""The two passes over (tokens, out) that an adapted layer adds to the frozen one, as plain torch operations.

    forward:    v = base + s u L^T,   y = g * v + (1 - g) * bias       one rounding at the end
    backward:   dv = g * dy,          dot = sum over tokens of dy * kept

On a CPU both run over blocks of rows that stay in the cache, so that what costs time is reading `base` and writing
`y` once, not the operations in between; nothing (tokens, out)-sized is made beside the results. Compiled code and
other devices take everything as one block and leave the fusing to the compiler. `kernels.py` has the same two passes
for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dude_peft.core.rounding import is_half, round_dithered_, thresholds

_BLOCK_ELEMENTS = 1 << 17  # of float32: half a MiB, which fits the level-2 cache of two cores with its neighbours


def compose(
    base: Tensor, u: Tensor, left: Tensor, gain: Tensor | None, bias: Tensor | None, scaling: float, keep: bool
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
        keep: also return v without its bias.

    Returns:
        (y, kept), both (tokens, out) in base's dtype; kept = v - bias, or None.
    """
    dtype, wide = base.dtype, torch.promote_types(base.dtype, torch.float32)
    half = is_half(dtype)
    left_t = left.to(wide).T
    g = None if gain is None else gain.to(wide)
    b = None if bias is None or g is None else bias.to(wide)
    shift = None if b is None or g is None else (1 - g) * b
    y = torch.empty_like(base)
    kept = torch.empty_like(base) if keep else None
    by_row, by_column = thresholds(base.shape[0], base.shape[1], base.device, dtype) if half else (y, y)
    for rows in _blocks(base):
        if half:
            v = torch.addmm(base[rows].to(wide), u[rows].to(wide), left_t, alpha=scaling)
        else:
            v = torch.addmm(base[rows], u[rows].to(wide), left_t, alpha=scaling, out=y[rows])
        if kept is not None:
            kept[rows] = v if b is None else v - b
        if g is not None:
            v.mul_(g)
        if shift is not None:
            v.add_(shift)
        if half:
            y[rows] = round_dithered_(v, by_row[rows], by_column, dtype)
    return y, kept


def spread(dy: Tensor, gain: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradient before the gain, and what the gain's own gradient needs.

        dv = g * dy,    dot = sum over tokens of dy * kept

    Args:
        dy: (tokens, out) gradient of y.
        gain: (out,) g.
        kept: (tokens, out) what `compose` kept, or y itself; None if no gradient of the gain is wanted.

    Returns:
        (dv, dot): (tokens, out) in dy's dtype, and (out,) in float32 or better, or None. The sum's order is fixed.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    g = gain.to(wide)
    dv = torch.empty_like(dy)
    dot = None if kept is None else torch.zeros(dy.shape[1], dtype=wide, device=dy.device)
    for rows in _blocks(dy):
        d = dy[rows].to(wide)
        if kept is not None and dot is not None:
            dot.add_((d * kept[rows]).sum(dim=0))
        dv[rows] = d * g
    return dv, dot


def _blocks(matrix: Tensor) -> Iterator[slice]:
    count = matrix.shape[0]
    whole = matrix.device.type != "cpu" or torch.compiler.is_compiling()
    size = count if whole else max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, count, max(1, size)):
        yield slice(start, start + size)
