"""The cached gains of layers brought up to date, in eager and in compiled code.

Compiled code cannot ask "did the deviations change?" without being compiled anew for every answer. It calls one opaque
operator instead, which asks when it runs: `dude_peft::refresh_caches(layer, slot, caches)` writes the tensors if they
are out of date.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class Refreshable(Protocol):
    """A layer whose gains are cached, by the number of the adapter."""

    def refreshed(self, slot: int) -> list[Tensor]:
        """The caches of an adapter, up to date."""


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, Refreshable] = weakref.WeakValueDictionary()


def register(layer: Refreshable) -> int:
    """A number under which the operator finds the layer while it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op("dude_peft::refresh_caches", mutates_args=("caches",))
def refresh_caches(layer: int, slot: int, caches: list[Tensor]) -> None:
    """Bring what adapter number `slot` of a registered layer caches up to date, in place."""
    for own, given in zip(_layers[layer].refreshed(slot), caches, strict=True):
        if given.data_ptr() != own.data_ptr():  # the compiler may hand over copies, and writes them back afterwards
            given.copy_(own)


@refresh_caches.register_fake
def _(layer: int, slot: int, caches: list[Tensor]) -> None:
    return None
