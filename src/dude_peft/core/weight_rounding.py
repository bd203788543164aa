"""The one rounding of merged weights: what `merge()`, `merge_and_unload()`, `dude merge` and every export write.

A trained gain differs from 1 by about 0.15 %, which is less than a bfloat16 tells apart: rounded to the nearest, most
merged weights would be the base weights again. So a threshold that depends on the entry's place alone is added to the
bits that are dropped (`rounding.py` has the idea). Over every column the changes then arrive on average, a value that
fits stays as it is, and the same weight gives the same bits through every door.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dude_peft.core.rounding import DROPPED_BITS


def round_weight(weight: Tensor, dtype: torch.dtype, first_row: int = 0) -> Tensor:
    """Round some rows of a merged weight to the dtype in which they are stored.

    Args:
        weight: (rows, in) float32 or float64.
        dtype: of the result; only bfloat16 and float16 are dithered.
        first_row: place of these rows in the whole (out, in) weight; the result's bits depend on it.

    Returns:
        (rows, in) in `dtype`, Inf where a value overflows it; `weight` stays as it is.
    """
    if dtype not in DROPPED_BITS:
        return weight.to(dtype)
    dropped = DROPPED_BITS[dtype]
    rows, columns = weight.shape
    threshold = _threshold(first_row, rows, columns, weight.device) >> (16 - dropped)
    # One NaN for all: a device's own may have all these bits set, and would become -0 by the sum.
    bits = torch.where(weight.isnan(), torch.nan, weight.to(torch.float32)).view(torch.int32)
    return bits.add_(threshold).bitwise_and_(-(1 << dropped)).view(torch.float32).to(dtype)


def _threshold(first_row: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) 16 bits: reversed_bits(row) xor scrambled(column), a van der Corput sequence down each column."""
    t = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=device) & 0xFFFF
    for mask, shift in ((0x5555, 1), (0x3333, 2), (0x0F0F, 4), (0x00FF, 8)):
        t = ((t & mask) << shift) | ((t >> shift) & mask)
    j = torch.arange(1, columns + 1, dtype=torch.int64, device=device)  # a multiplicative hash, products below 2^63
    h = (j * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    return t[:, None] ^ ((h ^ (h >> 13)) & 0xFFFF).to(torch.int32)
