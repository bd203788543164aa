"""The decoder layers of a model: which of them are alike, and the model shortened to one of each kind."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn


def shorten(model: nn.Module) -> list[int]:
    """Leaves one decoder layer of every kind in the model, and tells the kind of each layer that it had.

    Two layers are of one kind where they have the same modules, tensors and (sliding or full) attention. The first two
    are kinds of their own: nothing before the first wants a gradient, and the second does not free its input's
    predecessor, the embeddings, which the model holds on to. Kinds are numbered in the order in which they stay.

    Args:
        model: adapted; changed in place.

    Returns:
        The kind of every layer; empty where the model has no list of layers that could be shortened (nothing changes).
    """
    settings: Any = getattr(model, "config", None)
    text: Any = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    layers = _decoder_layers(model, getattr(text, "num_hidden_layers", 0))
    if layers is None:
        return []
    types = getattr(text, "layer_types", None)
    kinds: dict[Hashable, int] = {}
    kept: list[int] = []
    order = []
    for index, layer in enumerate(layers):
        signature = (min(index, 2), types[index] if types else None, _signature(layer))
        if signature not in kinds:
            kinds[signature] = len(kept)
            kept.append(index)
        order.append(kinds[signature])
    for index in reversed(range(len(layers))):
        if index not in kept:
            del layers[index]
    if types:
        text.layer_types = [types[index] for index in kept]
    return order


def decoder_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The `count` decoder layers of a model that `shorten` has shortened to them."""
    return list(_decoder_layers(model, count) or ())


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList | None:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count > 0]
    # Of several lists of that length the decoder's is the outermost, which comes first.
    return lists[0] if lists else None


def _signature(layer: nn.Module) -> Hashable:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return modules, tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors)
