"""The decoder layers of a model: which of them are alike, and the model shortened to one of each kind."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


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
    text = _text(model)
    layers = _decoder_layers(model, getattr(text, "num_hidden_layers", 0))
    if layers is None:
        return []
    types = list(getattr(text, "layer_types", None) or ())
    kinds: dict[Hashable, int] = {}
    kept: list[int] = []
    order = []
    for index, layer in enumerate(layers):
        signature = (min(index, 2), types[index] if types else None, _signature(layer))
        if signature not in kinds:
            kinds[signature] = len(kept)
            kept.append(index)
        order.append(kinds[signature])
    if types and not _set_types(text, types, [types[index] for index in kept]):
        return []
    for index in reversed(range(len(layers))):
        if index not in kept:
            del layers[index]
    return order


def every_layer(model: nn.Module) -> list[int]:
    """Each decoder layer as a kind of its own, of a model that stays whole; arguments and result are `shorten`'s."""
    text = _text(model)
    return list(range(len(_decoder_layers(model, getattr(text, "num_hidden_layers", 0)) or ())))


def _text(model: nn.Module) -> Any:
    settings: Any = getattr(model, "config", None)
    return settings.get_text_config() if hasattr(settings, "get_text_config") else settings


def _set_types(text: Any, types: list[str], wanted: list[str]) -> bool:
    """Tells the configuration the kinds of the layers that stay; False where it derives others itself, as Jamba's."""
    try:
        text.layer_types = wanted
    except AttributeError:
        return types[: len(wanted)] == wanted
    return True


def decoder_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The `count` decoder layers of a model that `shorten` has shortened to them."""
    return list(_decoder_layers(model, count) or ())


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList | None:
    whole: Any = model
    decoder = whole.get_decoder() if isinstance(model, PreTrainedModel) else whole
    lists = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    # Of several lists of that length (a vision tower may have one) the decoder's is the outermost.
    return min(lists, key=lambda found: found[0])[1] if lists else None


def _signature(layer: nn.Module) -> Hashable:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return modules, tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors)
