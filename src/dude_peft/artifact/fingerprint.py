"""Fingerprint of the base weights that an adapter was trained on: a hash of the values, tensor by tensor.

It does not depend on file names, on shards, or on a dtype that holds the same values: a weight in another dtype is cast
to the recorded one, and matches if that loses nothing and the hash agrees (a bfloat16 checkpoint loaded in float32 is
the same base; a float32 checkpoint rounded to bfloat16 is not).

The hash is XXH3 with 128 bits, at the speed of memory: a base model is gigabytes, read whenever an adapter is loaded,
and the question is whether it is the wrong one, not whether somebody forged it (who can choose the base model needs no
collision). An adapter's own tensors, which are small and travel, carry sha256.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable
from typing import Any, TypedDict

import torch
import xxhash
from torch import Tensor


class TensorPrint(TypedDict):
    """Fingerprint of one base weight."""

    dtype: str
    shape: list[int]
    xxh3_128: str


def is_print(found: Any) -> bool:
    """Whether something out of a file has the form of a fingerprint."""
    return (
        isinstance(found, dict)
        and set(found) == set(TensorPrint.__annotations__)
        and isinstance(found["dtype"], str)
        and isinstance(found["shape"], list)
        and all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in found["shape"])
        and isinstance(found["xxh3_128"], str)
    )


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """Hexadecimal sha256 of the values of some tensors, row-major, one after the other."""
    return _digest(hashlib.sha256(), tensors)


def xxh3_of(tensors: Iterable[Tensor]) -> str:
    """Hexadecimal XXH3 (128 bits) of the values of some tensors, row-major, one after the other."""
    return _digest(xxhash.xxh3_128(), tensors)


def fingerprint(weight: Tensor) -> TensorPrint:
    """Fingerprint of one weight as it is stored."""
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "xxh3_128": xxh3_of([weight]),
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
    return xxh3_of([weight]) == recorded["xxh3_128"]


def memory_of(values: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, as a buffer that is valid while the tensor lives.

    By address: a NumPy array of the memory would keep FSDP from ever letting go of it.
    """
    return (ctypes.c_ubyte * values.nbytes).from_address(values.data_ptr())


def _digest(digest: Any, tensors: Iterable[Tensor]) -> str:
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(memory_of(values))
    return str(digest.hexdigest())
