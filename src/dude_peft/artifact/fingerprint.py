"""Fingerprint of the base weights that an adapter was trained on: sha256 of the values, tensor by tensor.

It does not depend on file names, on shards, or on a dtype that holds the same values: a weight in another dtype is cast
to the recorded one, and matches if that loses nothing and the hash agrees (a bfloat16 checkpoint loaded in float32 is
the same base; a float32 checkpoint rounded to bfloat16 is not).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor


class TensorPrint(TypedDict):
    """Fingerprint of one base weight."""

    dtype: str
    shape: list[int]
    sha256: str


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """Hexadecimal sha256 of the values of some tensors, row-major, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(weight: Tensor) -> TensorPrint:
    """Fingerprint of one weight as it is stored."""
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "sha256": sha256_of([weight]),
    }


def same_values(weight: Tensor, recorded: TensorPrint) -> bool:
    """Whether a weight holds the recorded values, in whatever float dtype."""
    if list(weight.shape) != recorded["shape"]:
        return False
    dtype = getattr(torch, recorded["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        return False
    weight = weight.detach()
    if weight.dtype != dtype:
        cast = weight.to(dtype)
        if not torch.equal(cast.to(weight.dtype), weight):
            return False
        weight = cast
    return sha256_of([weight]) == recorded["sha256"]
