"""The gains of a model's layers, computed together.

An optimizer step makes the gains of all layers out of date at once. A gain takes some thirty small operations, and
starting them takes longer than their work. So the first layer that notices computes the gains of its equals with its
own. Each row is computed by itself: a gain has the same bits, with whichever others it is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from dude_peft.artifact.stock import LayerTensors
from dude_peft.core.magnitude import Change, change_of, gain, gain_slope, norm_terms
from dude_peft.core.precision import no_autocast
from dude_peft.tuner.frozen import is_sharded

# Elements of L at a time. On a CPU they stay in the cache; elsewhere it is launches that count.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 18, 1 << 22
_PLAIN_TYPES = (Tensor, nn.Parameter)
Kind: TypeAlias = tuple[Any, ...]
"""Shape, dtypes, device, parts and scaling of a layer's tensors."""


class Stale(NamedTuple):
    """A layer whose gain is out of date."""

    layer: Gained
    tensors: LayerTensors
    state: tuple[Any, ...]
    """What the gain will belong to: the scaling, and the state of the trained tensors."""

    @property
    def scaling(self) -> float:
        """The scaling s."""
        scaling: float = self.state[0]
        return scaling


class Gained(Protocol):
    """A layer with a gain for each adapter that has a magnitude."""

    def stale(self, adapter_name: str, kind: Kind | None = None) -> Stale | None:
        """What is needed to compute the gain ahead of its use; None: it need not, cannot, or is of another kind."""

    def change(self, adapter_name: str, tensors: LayerTensors) -> Change:
        """What its norm is computed from."""

    def keep_gain(self, adapter_name: str, state: tuple[Any, ...], gain: Tensor, slope: Tensor) -> None:
        """Take the gain and its slope as those of this state."""


class Together:
    """The adapted layers of one model. A copy of the model has a group of its own."""

    def __init__(self) -> None:
        self._layers: weakref.WeakValueDictionary[int, Gained] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        return Together, ()  # the copied layers join again

    def join(self, layer: Gained) -> None:
        """Count a layer in."""
        self._layers[id(layer)] = layer

    # Never tensors of inference mode, also where the first forward is in it: training could not take them.
    @torch.inference_mode(False)
    @torch.no_grad()
    def compute(self, one: Stale, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Gain and slope of a layer, (out,) each; its equals are given theirs too."""
        left = one.tensors.dB
        size = left.numel() * (1 if one.tensors.B0 is None else 2)
        most = max(1, (_AT_ONCE_ON_CPU if left.device.type == "cpu" else _AT_ONCE) // max(1, size))
        several = [one, *(self._equals(one, adapter_name) if most > 1 else ())]
        with no_autocast(left.device.type):
            found = [_compute(several[start : start + most], adapter_name) for start in range(0, len(several), most)]
        return found[0]

    def _equals(self, one: Stale, adapter_name: str) -> Iterator[Stale]:
        # A replica of torch's DataParallel is a copy that has not joined.
        joined = self._layers.get(id(one.layer)) is one.layer
        kind = kind_of(one.tensors, one.scaling) if joined else None
        if kind is None:
            return
        for layer in list(self._layers.values()):
            if layer is not one.layer and (other := layer.stale(adapter_name, kind)) is not None:
                yield other


def is_here(tensor: Tensor) -> bool:
    """Whether all of its values are: it is no share of a tensor, and its memory was not given back."""
    if is_sharded(tensor) or tensor.is_meta:
        return False
    return type(tensor) not in _PLAIN_TYPES or tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def kind_of(tensors: LayerTensors, scaling: float) -> Kind | None:
    """What two layers need to have in common; None: the layer is alone."""
    needed = [each for each in (*tensors.learned, tensors.A0, tensors.B0, tensors.m0) if each is not None]
    if tensors.dB.ndim != 2 or any(type(each) not in _PLAIN_TYPES or is_sharded(each) for each in needed):
        return None
    dtypes = tuple(tensor.dtype for tensor in (tensors.dB, tensors.m0) if tensor is not None)
    return (tensors.dB.shape, *dtypes, tensors.dB.device, tensors.B0 is None, tensors.dm is None, scaling)


def _compute(several: list[Stale], adapter_name: str) -> tuple[Tensor, Tensor]:
    first = several[0].tensors
    *rows, r = first.dB.shape  # out; or experts, out
    k = r if first.B0 is None else 2 * r
    wide = torch.promote_types(first.dB.dtype, torch.float32)
    left, terms = torch.empty(2, len(several), *rows, k, dtype=wide, device=first.dB.device)
    for each, L, products in zip(several, left, terms, strict=True):
        squares = norm_terms(each.layer.change(adapter_name, each.tensors), (L, products))[2]
        add_product = products.baddbmm_ if L.ndim == 3 else products.addmm_
        add_product(L, squares, alpha=each.scaling / 2)
    q = change_of(left, terms, several[0].scaling)
    m0 = torch.stack([each.tensors.m0 for each in several if each.tensors.m0 is not None])
    g = gain(m0, torch.stack([each.tensors.magnitude_change() for each in several]), q)
    slope = gain_slope(m0, q).to(g.dtype)
    for each, own_gain, own_slope in zip(several, g, slope, strict=True):
        each.layer.keep_gain(adapter_name, each.state, own_gain, own_slope)
    return g[0], slope[0]
