"""Rounding to half precision that does not swallow small changes: dithered by a fixed pattern of the position.

A bfloat16 has 8 significant bits. Round a gain of 1.001 times a bfloat16 value to the nearest bfloat16, and nearly
always the value comes back: trained magnitudes, which differ from 1 by about 0.15 %, would do nothing at all. So the
one rounding at the end of the layer adds a threshold to the bits that are dropped, and then drops them:

    threshold(t, j) = reversed_bits(t) xor scrambled(j)          16 bits; t: row (token), j: output feature

- A value that fits half precision stays as it is, so the start of training is still the base model bit by bit.
- Down every column the thresholds are a digitally shifted van der Corput sequence: spread evenly over any run of
  tokens, so that a gain of 1 + 1e-4 arrives on average as 1 + 1e-4.
- The pattern depends on nothing but the position: recomputation under gradient checkpointing gives the same bits.

The price is a rounding error of rms 1/sqrt(3) instead of 1/sqrt(12) units in the last place, without bias.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_ROWS = 1 << 16  # the sequence of rows starts again after these
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def is_half(dtype: torch.dtype) -> bool:
    """Whether outputs of this dtype are rounded with a dither."""
    return dtype in DROPPED_BITS


def thresholds(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two halves of the pattern: (rows, 1) and (columns,) int32, to be combined by xor, below 2^dropped bits."""
    shift = 16 - DROPPED_BITS[dtype]
    if torch.compiler.is_compiling():
        t = torch.arange(rows, dtype=torch.int32, device=device) & (_ROWS - 1)
        return (_reversed_bits(t) >> shift)[:, None], _scrambled(columns, device) >> shift
    by_row, by_column = _row_table(device, shift), _column_table(columns, device, shift)
    if rows > _ROWS:
        by_row = by_row.repeat(-(-rows // _ROWS), 1)
    return by_row[:rows], by_column


def round_dithered_(v: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 v to half precision in place.

    Args:
        v: (rows, columns) float32.
        threshold: (rows, columns) int32, the xor of the two halves of `thresholds`.
        dtype: bfloat16 or float16.

    Returns:
        v, still float32, holding values that `dtype` represents exactly (float16: but for its subnormal range).
    """
    if v.device.type != "cpu":
        # A GPU's own NaN is 0x7fffffff, and adding a threshold to that gives -0.0. On a CPU none has all these bits.
        v = v.masked_fill_(v.isnan(), torch.nan)
    v.view(torch.int32).add_(threshold).bitwise_and_(-(1 << DROPPED_BITS[dtype]))
    return v


@functools.cache
def _row_table(device: torch.device, shift: int) -> Tensor:
    with unset_fake_temporarily():  # kept for all callers: it has values also where the first one has none
        return (_reversed_bits(torch.arange(_ROWS, dtype=torch.int32, device=device)) >> shift)[:, None]


@functools.lru_cache(maxsize=64)
def _column_table(columns: int, device: torch.device, shift: int) -> Tensor:
    with unset_fake_temporarily():
        return _scrambled(columns, device) >> shift


def _reversed_bits(t: Tensor) -> Tensor:
    """The 16 bits of t in reverse order: 0, 1/2, 1/4, 3/4, 1/8, ... in units of 2^16."""
    t = ((t & 0x5555) << 1) | ((t >> 1) & 0x5555)
    t = ((t & 0x3333) << 2) | ((t >> 2) & 0x3333)
    t = ((t & 0x0F0F) << 4) | ((t >> 4) & 0x0F0F)
    return ((t & 0x00FF) << 8) | ((t >> 8) & 0x00FF)


def _scrambled(columns: int, device: torch.device) -> Tensor:
    """16 bits for every column that look drawn at random (multiplicative hash; products stay below 2^63)."""
    j = torch.arange(1, columns + 1, dtype=torch.int64, device=device)
    h = (j * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    return ((h ^ (h >> 13)) & 0xFFFF).to(torch.int32)
