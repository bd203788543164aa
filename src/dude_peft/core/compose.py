"""The two passes over (tokens, out) that an adapted layer adds to the frozen one, as plain torch operations.

    forward:    v = base + s u L^T,   y = g * v + (1 - g) * bias       one rounding at the end
    backward:   dv = g * dy,          dot = sum over tokens of dy * kept

On a CPU both run over blocks of rows that stay in the cache, so that what costs time is reading `base` and writing
`y` once, not the operations in between; nothing (tokens, out)-sized is made beside the results. Compiled code and
other devices take everything as one block and leave the fusing to the compiler. `kernels.py` has the same two passes
for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dude_peft.core.rounding import is_half, round_dithered_, thresholds

_BLOCK_ELEMENTS = 1 << 19  # of float32: 2 MiB; smaller blocks cost more in waking threads than the cache gives back


def compose(
    base: Tensor,
    u: Tensor,
    left: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: torch.dtype | None,
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

    Returns:
        (y, kept), both (tokens, out): y in base's dtype; kept = v - bias, or None.
    """
    dtype, wide = base.dtype, torch.promote_types(base.dtype, torch.float32)
    half = is_half(dtype)
    left_t = left.to(wide).T
    u = u.to(wide)
    g = None if gain is None else gain.to(wide)
    b = None if bias is None or g is None else bias.to(wide)
    shift = None if b is None or g is None else (1 - g) * b
    y = torch.empty_like(base)
    kept = None if keep is None else torch.empty_like(base, dtype=keep)
    by_row, by_column = thresholds(base.shape[0], base.shape[1], base.device, dtype) if half else (y, y)
    scratch, pattern = _scratch(base, wide), _scratch(base, torch.int32)
    for rows in _blocks(base):
        v = scratch(rows).copy_(base[rows]) if half else y[rows].copy_(base[rows])
        v.addmm_(u[rows], left_t, alpha=scaling)
        if kept is not None:
            kept[rows] = v if b is None else v - b
        if g is not None:
            v.mul_(g)
        if shift is not None:
            v.add_(shift)
        if half:
            threshold = torch.bitwise_xor(by_row[rows], by_column, out=pattern(rows))
            y[rows] = round_dithered_(v, threshold, dtype)
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
    scratch, products = _scratch(dy, wide), _scratch(dy, wide)
    for rows in _blocks(dy):
        d = scratch(rows).copy_(dy[rows])
        if kept is not None and dot is not None:
            dot.add_(products(rows).copy_(kept[rows]).mul_(d).sum(dim=0))
        dv[rows] = d.mul_(g)
    return dv, dot


def _block_rows(matrix: Tensor) -> int:
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, matrix.shape[0])
    return min(max(1, matrix.shape[0]), max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1])))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    size = _block_rows(matrix)
    for start in range(0, matrix.shape[0], size):
        yield slice(start, min(start + size, matrix.shape[0]))


def _scratch(matrix: Tensor, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """One buffer of a block's size, used again by every block: fresh memory costs more than what is done in it."""
    buffer: Tensor | None = None

    def block(rows: slice) -> Tensor:
        nonlocal buffer
        if buffer is None:
            buffer = torch.empty(_block_rows(matrix), matrix.shape[1], dtype=dtype, device=matrix.device)
        return buffer[: rows.stop - rows.start]

    return block
