"""A quantised model as a dense one: every layer whose weight cannot be read becomes a Linear with what it applies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.tuner import frozen


def dense_layer(layer: nn.Module, weight: Tensor) -> nn.Linear:
    """A plain Linear with this (out, in) weight and the layer's own bias."""
    out, in_ = weight.shape
    bias = getattr(layer, "bias", None)
    dense = nn.Linear(in_, out, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return dense.train(layer.training)


def densify_(model: nn.Module) -> None:
    """Replace every opaque linear layer, in place, and forget that transformers quantised the model.

    The weights are those the layers apply in training, in float32, so that a merge rounds once.
    """
    for name, module in list(model.named_modules()):
        if frozen.is_supported(module) and frozen.plain_weight(module) is None:
            with torch.no_grad():
                model.set_submodule(name, dense_layer(module, frozen.dense_weight(module)))
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    # How a checkpoint's tensors became these layers, or were dequantised, which saving would do backwards.
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [c for c in conversions if not any(hasattr(o, "hf_quantizer") for o in getattr(c, "operations", ()))]
    model._weight_conversions = kept  # type: ignore[assignment]
