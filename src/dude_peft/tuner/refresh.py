"""When a cached gain is out of date, and how compiled code asks for it.

The gain of a layer follows from its trained tensors, which change in optimizer steps, by loading, by averaging, by
`parameter.data = ...`. No count of torch's tells all of that: fused AdamW, the Trainer's default, does not raise
`Tensor._version`, and neither does anything done to `parameter.data`. So where the tensors lie in the CPU's memory they
are asked themselves: a hash of their bytes (xxh3, some 10 GB a second) costs a small part of the layer. Elsewhere that
would stop the device's queue, and what can be counted is counted: optimizer steps, versions, storages, changes of mode.

Compiled code cannot ask "did they change?" without being compiled anew for every answer. It calls one opaque operator,
which asks when it runs. Its first argument names the layer: a tensor, so that layers of one shape share a graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dude_peft.artifact.fingerprint import memory_of

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def state_of(tensors: Sequence[Tensor], occasions: Callable[[], tuple[int, ...]] = tuple) -> tuple[Any, ...]:
    """A value that changes when the tensors have changed.

    Args:
        tensors: tensors of a layer.
        occasions: counts of events that may have changed tensors outside of the CPU's memory.

    Returns:
        What to compare and to keep: it holds the storages, so that no new one can be taken for them.
    """
    hashes = []
    for tensor in tensors:
        if not _is_readable(tensor):
            break
        hashes.append(_hash(tensor))
    else:
        return tuple(hashes)
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return ("fake",)
    counted = tuple(_Counted(tensor) for tensor in tensors)
    return (*occasions(), *counted)


def _is_readable(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN_TYPES and tensor.is_cpu and not _is_wrapped(tensor)


def _hash(tensor: Tensor) -> int:
    values = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    return xxhash.xxh3_64_intdigest(memory_of(values))


class _Counted:
    """A tensor's storage and torch's count of its changes."""

    def __init__(self, tensor: Tensor) -> None:
        self.kept = tensor.detach()  # while it lives, the allocator cannot hand its memory out again
        self.version = 0 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Counted):
            return NotImplemented
        same = self.kept.data_ptr() == other.kept.data_ptr() and self.kept.dtype == other.kept.dtype
        return same and self.version == other.version

    __hash__ = None  # type: ignore[assignment]


class Cached(Protocol):
    """A layer that caches what follows from its tensors, by the number of the adapter."""

    def current(self, slot: int, start: bool) -> list[Tensor]:
        """Gain and slope of an adapter, or W0 A0^T, up to date."""


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, Cached] = weakref.WeakValueDictionary()


def register(layer: Cached) -> Tensor:
    """A number, as a tensor on the CPU, under which the operators find the layer while it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("dude_peft::current_gain", mutates_args=())
def current_gain(layer: Tensor, slot: int, dA: Tensor, dB: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
    """Gain (out,) and its slope (out,) of adapter number `slot`; the trained tensors say what it has to wait for.

    A fixed magnitude has no dm: m0 stands for its shape and dtype.
    """
    gain, slope = _layers[int(layer)].current(slot, start=False)
    return gain.clone(), slope.clone()  # the compiler may reuse their memory


@current_gain.register_fake
def _(layer: Tensor, slot: int, dA: Tensor, dB: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dm.dtype, torch.float32)
    return torch.empty_like(dm, dtype=dtype), torch.empty_like(dm, dtype=dtype)


@torch.library.custom_op("dude_peft::start_product", mutates_args=())
def start_product(layer: Tensor, slot: int, A0: Tensor, B0: Tensor) -> Tensor:
    """W0 A0^T (out, r) of adapter number `slot`."""
    return _layers[int(layer)].current(slot, start=True)[0].clone()


@start_product.register_fake
def _(layer: Tensor, slot: int, A0: Tensor, B0: Tensor) -> Tensor:
    return torch.empty_like(B0)
