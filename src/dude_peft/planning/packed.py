"""Quantised layers without weights: as many bytes as the real ones have, and passes that unpack for a moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from dude_peft.model.quantised import method_of
from dude_peft.tuner import frozen

_BLOCK, _OUTER_BLOCK, _CODE = 64, 256, 16  # bitsandbytes' for 4 bits: weights of a scale, scales of a scale, values
_FLOAT = 4
# One byte a weight -> bytes of a row's scale, and of torchao's zero point beside it.
_ONE_BYTE = {"int8": _FLOAT, "torchao:int8_weight_only": _FLOAT + 1, "torchao:float8_weight_only": _FLOAT}


def countable(config: Mapping[str, Any]) -> bool:
    """Whether the bytes of a format are known here. `config` is in transformers' words."""
    return method_of(config) in ("nf4", "fp4", *_ONE_BYTE)


def pack_(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Puts a stand-in for every layer that transformers would quantise, in place, on the meta device.

    Args:
        model: on the meta device.
        config: of the quantisation, in transformers' words; `countable`.
    """
    named = config.get("llm_int8_skip_modules") or config.get("modules_to_not_convert")
    whole: Any = model
    kept = HfQuantizer.get_modules_to_not_convert(whole, named, whole._keep_in_fp32_modules)
    for name, module in list(model.named_modules()):
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if linear and should_convert_module(name, kept):
            model.set_submodule(name, PackedLinear(module, config))


class PackedLinear(nn.Linear):
    """Stands for a quantised layer in a dry step."""

    def __init__(self, dense: nn.Module, config: Mapping[str, Any]) -> None:
        """`dense` is what it stands for; `config` says how that is quantised, in transformers' words."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = frozen.layer_shape(dense)
        method = method_of(config)
        nested = bool(config.get("bnb_4bit_use_double_quant"))
        # Scales among them: FSDP2 cuts these as well.
        size = _bytes(method, self.out_features, self.in_features, nested)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias: Any = getattr(dense, "bias", None)
        self.keeps_input = method in _ONE_BYTE
        if method not in _ONE_BYTE:
            named = str(config.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
            self.compute_dtype: torch.dtype = getattr(torch, named)

    @property
    def numbers(self) -> int:
        """Weights that it stands for."""
        return self.out_features * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out), of no meaning."""
        inner = x.to(getattr(self, "compute_dtype", x.dtype))
        product: Any = _Product.apply
        y: Tensor = product(inner, self.weight, self.out_features, self.keeps_input)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T with a W that is unpacked anew in each direction, as both libraries do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, out: int, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(*([x] if keeps_input else []))
        ctx.shape = (out, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy @ dy.new_empty(ctx.shape), None, None, None


def _bytes(method: str, out: int, in_: int, nested: bool) -> int:
    """Bytes of the packed weights, and of their scales."""
    numbers = out * in_
    if method in _ONE_BYTE:
        return numbers + _ONE_BYTE[method] * out
    blocks = math.ceil(numbers / _BLOCK)
    table = _CODE * _FLOAT
    if not nested:
        return math.ceil(numbers / 2) + _FLOAT * blocks + table
    outer = _FLOAT * (math.ceil(blocks / _OUTER_BLOCK) + 1 + _OUTER_BLOCK)
    return math.ceil(numbers / 2) + blocks + outer + table
