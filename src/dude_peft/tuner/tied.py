"""Tied embeddings: one weight is looked up at the model's input and multiplied by at its output.

An adapter of the embedding changes both, so that the model stays tied. The embedding's matrix is the transpose of the
output layer's, so the output layer's change is the transpose of the embedding's, by the same tensors:

    y = (g x) W0^T + s (g x) D + bias,    D = dB A + B0 dA (embedding_dim, num_embeddings)

The gain belongs to an embedding dimension, which is the output layer's input: it scales x. The layer in the output
layer's place has no tensors of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import override

from dude_peft.core.linear import FrozenProduct, adapted_linear
from dude_peft.parents import fits
from dude_peft.tuner import frozen
from dude_peft.tuner.mapped import DudeEmbedding, rounded
from dude_peft.tuner.offloaded import held


def sharing(model: nn.Module, embedding: nn.Module) -> dict[str, nn.Module]:
    """Other layers with the weight of an embedding, adapted or not, by their names."""
    base: Any = frozen.base_of(embedding)
    return {
        name: module
        for name, module in model.named_modules()
        if "base_layer" not in name.split(".")
        and (other := frozen.base_of(module)) is not base
        and _own_weight(module, other) is _own_weight(embedding, base)
    }


def why_not_tied(layer: nn.Module) -> str | None:
    """Why a layer cannot follow an embedding, as the end of "'x' ..."; None where it can."""
    if isinstance(layer, DudeTiedHead):
        return None
    if isinstance(layer, BaseTunerLayer):
        return "has an adapter of its own"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return "is no plain linear layer"
    return None


@fits()
class DudeTiedHead(nn.Module, BaseTunerLayer):
    """A frozen output layer that follows the adapters of the embedding with which it shares its weight."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, embedding: DudeEmbedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._embedding = [embedding]  # which is a part of the model in its own place
        embedding.follow(base_layer)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []  # the embedding merges, for both

    @property
    def embedding(self) -> DudeEmbedding:
        """The layer that has the adapters."""
        return self._embedding[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits under the embedding's active adapters, (*, in) -> (*, out)."""
        if self.disable_adapters:
            return self._own_output(x, *args, **kwargs)
        names, merged = self.embedding.unmerged_names(), self.embedding.merged
        if len(names) == 1 and not merged:
            return self._adapt(names[0], x)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        base_out = self._own_output(x, *args, **kwargs) if names and merged else y
        for name in names:
            y = y + (self._adapt(name, x) - base_out)
        return y

    @property
    @override
    def weight(self) -> Tensor:
        """What a module that reads it has to find: the effective weight of both."""
        own: Tensor = self._own_layer().weight
        return own if self.disable_adapters else self.embedding.weight

    @override
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the embedding does it for both."""

    @override
    def unmerge(self) -> None:
        """Nothing: the embedding does it for both."""

    @override
    def enable_adapters(self, enabled: bool) -> None:
        """Follow them or not."""
        self._disable_adapters = not enabled

    def _adapt(self, name: str, x: Tensor) -> Tensor:
        state, scaling, g = self.embedding.tensors(name), self.embedding.scaling[name], self.embedding.live_gain(name)
        assert state.dA is not None
        if g is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            x = rounded(x.to(wide) * g.to(wide), x)
        base: Any = self._own_layer()
        plain = frozen.is_dense(base, x)
        product = FrozenProduct(x, held(base, "weight")) if plain else base(x)
        A0, B0 = (None if tensor is None else tensor.T for tensor in (state.B0, state.A0))
        factors = (state.dB.T, state.dA.T, A0, B0, None, held(base, "bias") if plain else None, scaling)
        seen = self.embedding.dropped(name, x)
        return adapted_linear(product, seen, *factors, frozen_input=None if plain or seen is x else x)

    def _own_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self._own_layer()(x, *args, **kwargs)
        return y

    def _own_layer(self) -> Any:
        return self.embedding.with_own_weight(self.base_layer)

    def __repr__(self) -> str:
        return "dude_peft." + super().__repr__()


def _own_weight(module: Any, base: Any) -> Any:
    """The parameter under an adapter, merged or not; an object of its own where there is none."""
    if isinstance(module, DudeTiedHead):
        module, base = module.embedding, module.embedding.get_base_layer()
    merged = getattr(module, "lora_unmerged_weight", None)
    return base._parameters.get("weight") if merged is None else merged
