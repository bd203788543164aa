"""Embeddings and convolutions as the linear maps that they are: their weight as an (out, in) matrix.

An embedding maps the one-hot vector of a token: its matrix is the transpose of its weight, (embedding_dim,
num_embeddings), and a magnitude belongs to an embedding dimension, as in PEFT's DoRA. A convolution maps a patch of its
input: its matrix is (out_channels, in_channels / groups x kernel), and a magnitude belongs to an output channel.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from dude_peft.show import a_

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Map = nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
_FORWARDS = (nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def is_map(layer: Any) -> TypeGuard[Map]:
    """Whether it is an embedding or a convolution, one that can be adapted or not."""
    return isinstance(layer, Map)


def why_no_map(layer: Map, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why it cannot be adapted, as the end of "target 'x' ..."; None where it can.

    Args:
        layer: an embedding or a convolution.
        dtypes: of plain weights.
    """
    kind, weight = a_(type(layer).__name__), layer.weight
    if weight.dtype not in dtypes or type(weight) is not nn.Parameter:
        return f"is {kind} with a quantised or split weight, which is not supported"
    if not {*layer._parameters, *layer._buffers, *layer._modules} <= {"weight", "bias", "embed_scale"}:
        return f"is {kind} with more tensors than weight and bias"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"is {kind} with max_norm, which writes into the frozen weight in every forward"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return f"is {kind} with sparse gradients, which the adapter does not have"
    if type(layer).forward not in _FORWARDS and not _scales(layer):
        return f"is {kind}, whose forward is not {'a look-up' if isinstance(layer, nn.Embedding) else 'a convolution'}"
    return None


def map_shape(layer: Map) -> tuple[int, int]:
    """(out, in) of its matrix."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def as_matrix(layer: Map, weight: Tensor) -> Tensor:
    """A weight of the layer as an (out, in) matrix; a view where it can be."""
    return weight.T if isinstance(layer, nn.Embedding) else weight.flatten(1)


def as_weight(layer: Map, matrix: Tensor) -> Tensor:
    """The inverse: an (out, in) matrix as the layer keeps its weight."""
    return matrix.T.contiguous() if isinstance(layer, nn.Embedding) else matrix.reshape(layer.weight.shape)


def scale_of(layer: nn.Embedding) -> float:
    """What the layer multiplies its rows by; 1 but for transformers' scaled embeddings."""
    return float(getattr(layer, "embed_scale", 1.0))


def stock_kernel(layer: nn.Module) -> tuple[int, ...] | None:
    """(in_channels, *kernel) of a convolution that stock PEFT adapts in the same way, and None of all others.

    PEFT's low-rank convolution knows neither dilation nor other padding than zeros, and sees all groups at once. Files
    for these are of another shape, which PEFT refuses.
    """
    if not isinstance(layer, Convolution) or layer.groups != 1 or layer.padding_mode != "zeros":
        return None
    if any(step != 1 for step in layer.dilation):
        return None
    return (layer.in_channels, *layer.kernel_size)


def _scales(layer: Map) -> bool:
    """Whether it is one of transformers' embeddings that scale their rows, by its class and by what it does."""
    if not isinstance(layer, nn.Embedding) or not hasattr(layer, "embed_scale"):
        return False
    if layer.weight.is_meta:
        return True
    ids = torch.arange(min(3, layer.num_embeddings), device=layer.weight.device)
    with torch.no_grad():
        found, rows = layer(ids), layer.weight[ids]
        wanted = rows * torch.tensor(scale_of(layer), device=rows.device).to(rows.dtype)
    return isinstance(found, Tensor) and torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=0)
