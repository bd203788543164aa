"""bitsandbytes' formats: one weight quantised by bitsandbytes itself, as transformers lays it out in a checkpoint."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.installing import install
from dude_peft.show import shown
from dude_peft.terminal.quiet import quiet_imports
from dude_peft.tuner import frozen

FORMATS = ("nf4", "int8")
# Blocks that run over the end of a row are read back wrong by bitsandbytes 0.50's kernel for CPUs: (64, 96), say.
_NF4_BLOCK = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantisedWeight:
    """One weight, quantised."""

    tensors: dict[str, Tensor]
    """By the names that follow the layer's: weight, weight.absmax, SCB, ..."""
    values: Tensor
    """(out, in) float32: what the layer applies."""
    base: TensorPrint
    """Fingerprint of the layer, as a loaded model has it."""


def check_format(name: str) -> None:
    """Refuse a format that does not exist, or whose library is not here.

    Raises:
        ConfigError: either.
    """
    if name not in FORMATS:
        raise ConfigError(f"--quantize {shown(name)}: choose {' or '.join(FORMATS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"--quantize {name} needs bitsandbytes: {install('bitsandbytes')}")


def quantise(W: Tensor, form: str, dtype: torch.dtype, where: str) -> QuantisedWeight:
    """Quantise one weight as transformers does while it loads a model in `dtype`.

    Args:
        W: (out, in).
        form: nf4 (blocks of 64, scales in float32) or int8 (a scale a row).
        dtype: of the model.
        where: name of the layer, for messages.

    Raises:
        ConfigError: a shape or dtype that bitsandbytes does not take.
        NumericsError: the weight does not fit into the format's range.
    """
    with quiet_imports():
        import bitsandbytes
    if dtype not in _DTYPES:
        raise ConfigError(f"bitsandbytes has no {form} for a model in {dtype}; choose --dtype bfloat16 or float32")
    # Neither library says what its names are.
    nn: Any = bitsandbytes.nn
    functional: Any = bitsandbytes.functional
    layer: Any
    out, in_ = W.shape
    if form == "nf4" and in_ % _NF4_BLOCK:
        raise ConfigError(
            f"'{where}' (out {out}, in {in_}) does not fit nf4, which needs inputs in multiples of {_NF4_BLOCK}; "
            "choose int8, or leave the layer out with --exclude-modules"
        )
    try:
        if form == "nf4":
            layer = nn.Linear4bit(in_, out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            layer.weight = nn.Params4bit(
                W.to(dtype), quant_type="nf4", compress_statistics=False, module=layer, requires_grad=False
            ).to("cpu")
            values = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            layer = nn.Linear8bitLt(in_, out, bias=False, has_fp16_weights=False, device="meta")
            layer.weight = nn.Int8Params(W.to(dtype), has_fp16_weights=False, requires_grad=False).to("cpu")
            values = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    except Exception as error:  # bitsandbytes raises what its kernels raise
        reason = shown(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"bitsandbytes cannot quantise '{where}' (out {out}, in {in_}) to {form} ({reason}); leave the layer out "
            "with --exclude-modules"
        ) from error
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"'{where}' overflows {form}; leave the layer out with --exclude-modules")
    tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    return QuantisedWeight(tensors, values.float(), frozen.layer_fingerprint(layer))


def settings(form: str, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose linear layers, except those named, are quantised by `quantise`."""
    make: Any = BitsAndBytesConfig
    if form == "nf4":
        config = make(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
        )
    else:
        config = make(load_in_8bit=True, llm_int8_skip_modules=skipped)
    found: dict[str, Any] = config.to_dict()
    return {name: value for name, value in found.items() if not name.startswith("_")} | {"quant_method": "bitsandbytes"}
