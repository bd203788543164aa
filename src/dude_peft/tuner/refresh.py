"""The cached gain of a layer brought up to date, in eager and in compiled code.

Compiled code cannot ask "did the deviations change?" without being compiled anew for every answer. It calls one opaque
operator instead, which asks when it runs: `dude_peft::refresh_gain(layer, slot, gain, slope)` writes both tensors if
they are out of date.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class Refreshable(Protocol):
    """A layer whose gains are cached, by the number of the adapter."""

    def refresh_if_stale(self, slot: int) -> None:
        """Bring the cached gain up to date."""


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, Refreshable] = weakref.WeakValueDictionary()


def register(layer: Refreshable) -> int:
    """A number under which the operator finds the layer while it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op("dude_peft::refresh_gain", mutates_args=("gain", "slope"))
def refresh_gain(layer: int, slot: int, gain: Tensor, slope: Tensor) -> None:
    """Bring the gain of adapter number `slot` of a registered layer up to date, in place."""
    _layers[layer].refresh_if_stale(slot)


@refresh_gain.register_fake
def _(layer: int, slot: int, gain: Tensor, slope: Tensor) -> None:
    return None
