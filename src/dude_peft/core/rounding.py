"""Rounding to half precision that does not swallow small changes: dithered, so that they arrive on average.

A bfloat16 has 8 significant bits. Round a gain of 1.001 times a bfloat16 value to the nearest bfloat16, and nearly
always the value comes back: trained magnitudes, which differ from 1 by about 0.15 %, would do nothing at all. So the
one rounding at the end adds a threshold to the bits that are dropped, and then drops them:

    threshold = leading bits of odd * bits(base) + scrambled(j)     base: what the frozen layer gave; j: output feature

- A value that fits half precision stays as it is, so the start of training is still the base model bit by bit.
- An output's threshold follows from the frozen layer's output in the same place, not from the row: in decoding every
  token is row 0, and a prompt must give the same bits wherever it stands in a batch. It does not change with what is
  trained, so a small step of the adapter is a small step of the output. Recomputation gives the same bits.
- Merged weights have thresholds of their own (`weight_rounding.py`): by place, since equal entries are common there.

The price is a rounding error of rms 1/sqrt(3) instead of 1/sqrt(12) units in the last place, without bias. No unbiased
rounding has less: what rounding to the nearest saves in noise, it loses in the change that it does not deliver.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

# As int32. A bfloat16 is the upper half of a float32, so of this the lower half counts: 2^16 times the golden ratio,
# which spreads neighbouring values evenly.
_ODD = 0x9E379E37 - (1 << 32)
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def is_half(dtype: torch.dtype) -> bool:
    """Whether outputs of this dtype are rounded with a dither."""
    return dtype in DROPPED_BITS


def round_dithered_(v: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 v to half precision in place.

    Args:
        v: (rows, columns) float32.
        threshold: (rows, columns) int32, of `content_thresholds`.
        dtype: bfloat16 or float16.

    Returns:
        v, still float32, holding values that `dtype` represents exactly (float16: but for its subnormal range).
    """
    if v.device.type != "cpu":
        # A GPU's own NaN is 0x7fffffff, and adding a threshold to that gives -0.0. On a CPU none has all these bits.
        v = v.masked_fill_(v.isnan(), torch.nan)
    v.view(torch.int32).add_(threshold).bitwise_and_(-(1 << DROPPED_BITS[dtype]))
    return v


def content_thresholds(base: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    """Thresholds for the outputs of an adapted layer, from what the frozen layer gave.

    Args:
        base: (tokens, out) the frozen layer's output in float32.
        dtype: bfloat16 or float16, which the frozen layer gave.
        out: (tokens, out) int32, the memory for the answer.

    Returns:
        (tokens, out) int32, below 2^dropped bits.
    """
    bits, shift, half = base.view(torch.int32), 32 - DROPPED_BITS[dtype], 1 << (DROPPED_BITS[dtype] - 1)
    if torch.compiler.is_compiling():
        # In 64 bits, which do not overflow: a C++ compiler may assume that the 32 do not either.
        mixed = bits.to(torch.int64) * _ODD + _mixed(base.shape[1], base.device)
        return (((mixed >> shift) & (2 * half - 1)) ^ half).to(torch.int32)
    # int32 wraps. The leading bits come down with their sign, from -half to half - 1.
    mixed = torch.add(_content_table(base.shape[1], base.device), bits, alpha=_ODD, out=out)
    return mixed.bitwise_right_shift_(shift).add_(half)


@functools.lru_cache(maxsize=64)
def _content_table(columns: int, device: torch.device) -> Tensor:
    with unset_fake_temporarily(), torch.inference_mode(False):
        return _mixed(columns, device).to(torch.int32)


def _mixed(columns: int, device: torch.device) -> Tensor:
    """32 bits for every column, as a signed number (multiplicative hash; products stay below 2^63)."""
    j = torch.arange(1, columns + 1, dtype=torch.int64, device=device)
    h = (j * 0x9E3779B1) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    return h - ((h >> 31) << 32)
