"""Adapted embeddings and convolutions: the linear layer's adapter, with another way to its low-rank input u = R x.

Of an embedding u is looked up, of a convolution it is a convolution with r or 2r output channels, with the frozen
layer's own stride, padding, dilation and groups. All behind it, y = g (base + s u L^T) + bias, is the linear layer's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.artifact.stock import LayerTensors
from dude_peft.core.linear import adapted_linear
from dude_peft.core.rounding import content_thresholds, is_half, round_dithered_
from dude_peft.parents import fits
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.maps import scale_of


@fits()
class _Mapped(DudeLinear):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models ask such a layer for its stride, its padding token or its sizes.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if name not in getattr(base, "__constants__", ()):
                raise
            return getattr(base, name)

    def _on_top(self, name: str, u: Tensor, left: Tensor, base: Tensor, factor: float, again: Any) -> Tensor:
        """`y = g (base + s factor u L^T) + bias`, (*, out).

        Args:
            name: of the adapter.
            u: (*, k).
            left: (out, k) L.
            base: (*, out) what the frozen layer gave.
            factor: of the change beside s.
            again: the frozen layer's rows (tokens, out) once more, without its bias.
        """
        g, bias, dm, slope = self._gained(name)
        factors = (None, left, None, None, g, bias, factor * self.scaling[name], dm, slope)
        return adapted_linear(base, u, *factors, True, again)

    def _gained(self, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gain and bias of an adapter with a magnitude; dm and the gain's slope where the gain is a known value."""
        layer = self.tensors(name)
        if layer.m0 is None:
            return None, None, None, None
        bias = getattr(self.get_base_layer(), "bias", None)
        if self._differentiates_norm(name):
            return self._exact_gain(name, layer), bias, None, None
        g, slope = self._gain_and_slope(name, layer)
        return g, bias, layer.dm, slope


@fits()
class DudeEmbedding(_Mapped):
    """A frozen embedding with any number of adapters: A (r, num_embeddings), B (embedding_dim, r)."""

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__(base_layer, layer_name)
        self._followers: list[Any] = []

    def follow(self, layer: nn.Module) -> None:
        """From now on a frozen layer gets every weight that the embedding gets: the two are tied."""
        self._followers.append(layer)

    def give(self, weight: nn.Parameter) -> None:
        super().give(weight)
        for layer in self._followers:
            layer.weight = weight

    def _adapt(self, name: str, x: Tensor, base_out: Tensor | None) -> Tensor:
        assert base_out is not None, "only a plain linear layer's product is taken inside"
        base: Any = self.get_base_layer()
        layer = self.tensors(name)
        assert layer.dA is not None
        left = layer.dB
        u = torch.nn.functional.embedding(x, layer.dA.T, padding_idx=base.padding_idx)
        if layer.A0 is not None and layer.B0 is not None:  # of the tokens alone: the vocabulary is large
            left = torch.cat([left.to(layer.B0.dtype), layer.B0], dim=1)
            u = torch.cat([torch.nn.functional.embedding(x, layer.A0.T) + u, u.to(layer.A0.dtype)], dim=-1)
        # Dropout on a one-hot vector: the change of a whole token, or nothing of it.
        if name in self.lora_dropout:
            u = u * self.dropped(name, u.new_ones(*x.shape, 1))

        def again(_: Tensor) -> Tensor:
            with torch.no_grad():
                rows: Tensor = self._own_layer()(x).reshape(-1, self.out_features)
                return rows

        return self._on_top(name, u.to(base_out.dtype), left, base_out, scale_of(base), again)


@fits()
class DudeConv(_Mapped):
    """A frozen convolution with any number of adapters: A (r, in / groups x kernel), B (out, r)."""

    def _adapt(self, name: str, x: Tensor, base_out: Tensor | None) -> Tensor:
        assert base_out is not None, "only a plain linear layer's product is taken inside"
        base: Any = self.get_base_layer()
        left, right = _stacked(self.tensors(name))
        channels = -base.weight.ndim + 1

        def rows_of(output: Tensor) -> Tensor:
            return output.movedim(channels, -1)

        def again(_: Tensor) -> Tensor:
            own: Any = self._own_layer()
            with torch.no_grad():
                return rows_of(own._conv_forward(x, own.weight, None)).reshape(-1, self.out_features)

        seen = self.dropped(name, x)
        if base.groups > 1:
            # Every group sees its own channels, by the same A: u would have r channels of each. The change's own kernel
            # is as small as the weight.
            kernel = (left @ right).view(base.weight.shape).to(x.dtype)
            y = self._beside(name, rows_of(base_out), rows_of(base._conv_forward(seen, kernel, None)))
        else:
            kernel = right.view(-1, *base.weight.shape[1:]).to(x.dtype)
            y = self._on_top(name, rows_of(base._conv_forward(seen, kernel, None)), left, rows_of(base_out), 1.0, again)
        # Its own memory in the layout of convolutions, which the code behind may change in place.
        return y.movedim(-1, channels).clone(memory_format=torch.contiguous_format)

    def _beside(self, name: str, base: Tensor, change: Tensor) -> Tensor:
        """`y = g (base + s change) + (1 - g) bias`, (*, out), with one rounding; by torch's own operations."""
        wide = torch.promote_types(base.dtype, torch.float32)
        y = torch.add(base.to(wide), change.to(wide), alpha=self.scaling[name])
        g, bias = self.live_gain(name), getattr(self.get_base_layer(), "bias", None)
        if g is not None:
            y = g.to(wide) * y
            if bias is not None:
                y = y + (1 - g.to(wide)) * bias.to(wide)
        return rounded(y, base)


def rounded(y: Tensor, base: Tensor) -> Tensor:
    """`y` (*, n) in the dtype of `base` (*, n), dithered by what that holds, with the gradient of `y`."""
    dtype = base.dtype
    if is_half(dtype):
        rows = base.detach().to(y.dtype).reshape(-1, base.shape[-1])
        threshold = content_thresholds(rows, dtype, torch.empty_like(rows, dtype=torch.int32))
        found = round_dithered_(y.detach().reshape(rows.shape).clone(), threshold, dtype)
        y = y + (found.view(y.shape) - y.detach())
    return y.to(dtype)


def _stacked(layer: LayerTensors) -> tuple[Tensor, Tensor]:
    """L = [dB, B0] and R = [A0 + dA; dA]; dB and dA alone without a frozen start; L and R of a delta."""
    assert layer.dA is not None
    if layer.A0 is None or layer.B0 is None:
        return layer.dB, layer.dA
    return torch.cat([layer.dB.to(layer.B0.dtype), layer.B0], dim=1), torch.cat([layer.A0 + layer.dA, layer.dA])
