"""The state of a layer on disk, whether it is one matrix or a stack of experts.

A matrix (out, in) is `stock.py`'s. A stack (experts, out, in) is as many of these, one an expert, with an axis more:

    lora_A.weight (experts * k, in)    lora_B.weight (out, k * experts)    all others (experts, ...)

The first two are laid out as PEFT's own adapters of `target_parameters` are, experts slowest in the one and fastest in
the other, so that an adapter without a magnitude is PEFT's but for the names of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dude_peft.artifact.stock import (
    STOCK_A,
    STOCK_B,
    LayerTensors,
    from_stock,
    layer_tensors,
    start_tensors,
    stock_names,
    stock_shapes,
    to_stock,
)
from dude_peft.errors import ArtifactError
from dude_peft.methods import Method
from dude_peft.methods.start import Start

Shape = tuple[int, ...]
"""(out, in) of a matrix, (experts, out, in) of a stack."""


def first_tensors(
    method: Method,
    starts: Sequence[Start] | None,
    r: int,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """What a layer keeps at its start, as `stock.start_tensors`.

    Args:
        method: entry of the table.
        starts: one for a matrix, one an expert for a stack; None gives zeros.
        r: rank.
        shape: of the base weight.
        dtype: float32 or better.
        device: where the tensors are made.
    """
    matrix = (shape[-2], shape[-1])
    if len(shape) == 2:
        return start_tensors(method, None if starts is None else starts[0], r, matrix, dtype, device)
    if starts is None:
        one = start_tensors(method, None, r, matrix, dtype, device)
        return {name: tensor.new_zeros(shape[0], *tensor.shape) for name, tensor in one.items()}
    parts = [start_tensors(method, start, r, matrix, dtype, device) for start in starts]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def experts_of(layer: LayerTensors) -> list[LayerTensors]:
    """The state of every expert of a stack, as views."""
    return [layer_tensors(None, {name: tensor[e] for name, tensor in layer.kept.items()}) for e in range(len(layer.dB))]


def layer_shapes(method: Method, r: int, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a layer of rank r has on disk."""
    own = stock_shapes(method, r, (shape[-2], shape[-1]))
    if len(shape) == 2:
        return own
    experts = shape[0]
    shapes = {name: (experts, *size) for name, size in own.items()}
    (k, in_), (out, _) = own[STOCK_A], own[STOCK_B]
    return shapes | {STOCK_A: (experts * k, in_), STOCK_B: (out, k * experts)}


def to_disk(layer: LayerTensors, scaling: float) -> dict[str, Tensor]:
    """Tensors of one layer on disk, by name; `scaling` is s."""
    if layer.dB.ndim == 2:
        return to_stock(layer, scaling)
    parts = [to_stock(expert, scaling) for expert in experts_of(layer)]
    tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    tensors[STOCK_A] = tensors[STOCK_A].flatten(0, 1)
    tensors[STOCK_B] = tensors[STOCK_B].permute(1, 2, 0).flatten(1).contiguous()
    return tensors


def from_disk(tensors: Mapping[str, Tensor], method: Method, r: int, shape: Shape, where: str) -> LayerTensors:
    """State of one layer from its tensors on disk; the inverse of `to_disk`, bit by bit.

    Args:
        tensors: by name, exactly those of `stock_names`.
        method: of the adapter.
        r: rank of the layer as the user set it.
        shape: of the base weight.
        where: name of the layer, for messages.

    Raises:
        ArtifactError: a shape or dtype is wrong, or the stock tensors and ours disagree.
        NumericsError: NaN or Inf.
    """
    if len(shape) == 2:
        return from_stock(tensors, method, r, (shape[0], shape[1]), where)
    for name, wanted in layer_shapes(method, r, shape).items():
        if tuple(tensors[name].shape) != wanted:
            raise ArtifactError(
                f"tensor '{where}.{name}' has shape {tuple(tensors[name].shape)}, but the base layer and rank {r} need "
                f"{wanted}; load the adapter on the base model it was trained on"
            )
    experts, out, in_ = shape
    apart = dict(tensors)
    apart[STOCK_A] = tensors[STOCK_A].reshape(experts, -1, in_)
    apart[STOCK_B] = tensors[STOCK_B].reshape(out, -1, experts).permute(2, 0, 1)
    names = stock_names(method)
    parts = [
        from_stock({name: apart[name][e] for name in names}, method, r, (out, in_), f"{where}[{e}]")
        for e in range(experts)
    ]
    kept = [part.kept for part in parts]
    return layer_tensors(None, {name: torch.stack([one[name] for one in kept]) for name in kept[0]})
