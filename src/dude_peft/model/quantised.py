"""Quantised base models: what a configuration asks for, what a checkpoint is already, and whether this device runs it.

bitsandbytes' and torchao's formats are made while a full-precision checkpoint is loaded. A checkpoint that is stored
quantised stays as it is, but for formats that transformers can dequantise while it loads (fp8, mxfp4,
compressed-tensors): their own kernels train nothing, or run on some devices only. A format to be made is tried on one
small layer first, forward and backward: libraries list more than they run.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dude_peft.config.schema import BITSANDBYTES, ModelSection, QuantizationSection
from dude_peft.errors import ConfigError
from dude_peft.installing import install
from dude_peft.show import reason_of, shown
from dude_peft.terminal.quiet import quiet_imports

_TORCHAO = "torchao:"
_WITH_KERNELS = "gptq"
"""gptqmodel's format; of its kernels some have no backward."""
_UNPROVEN = "awq"
"""A run trained on it, but every command then found other weights than the run had."""
_USUAL = (*BITSANDBYTES, "torchao:int8_weight_only")
_SIDE = 256
_WORST_ERROR = 0.5
"""Of a format worth the name; 4 bits have 0.09 on random weights."""


def asked_of(section: ModelSection) -> QuantizationSection | None:
    """What `model.quantization` asks for; None where it asks for nothing, or for a model that is not quantised."""
    asked = section.quantization
    return None if asked is None or asked.method == "none" else asked


def stored_config(settings: Any) -> dict[str, Any] | None:
    """How the checkpoint of a model's configuration is quantised, in transformers' words; None where it is not."""
    found = getattr(settings, "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    config: dict[str, Any] = json.loads(found.to_json_string(use_diff=False))
    return config


def trainable_config(stored: Mapping[str, Any]) -> Any:
    """A format's settings for `from_pretrained`, so that a checkpoint in it can be trained on wherever it is loaded.

    They dequantise fp8, mxfp4 and compressed-tensors, and choose a kernel with a backward for GPTQ.

    Args:
        stored: how the checkpoint is quantised, from `stored_config`.

    Returns:
        A quantisation config of transformers; None for a format that needs none.

    Raises:
        ConfigError: transformers does not know the format, or is too old to dequantise it.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    method = method_of(stored)
    if method == _UNPROVEN:
        raise ConfigError(
            "the checkpoint is stored in AWQ, and an adapter trained on it would be refused afterwards, because its "
            "weights are not found to be the same; give the unquantised checkpoint, with model.quantization: nf4"
        )
    try:
        config: Any = AutoQuantizationConfig.from_dict(dict(stored))
    except Exception as error:  # each format's settings check themselves, by errors of their own
        raise ConfigError(
            f"the checkpoint is stored quantised with {shown(method)}, which this transformers does not load "
            f"({shown(' '.join(str(error).split()), 200)}); give the unquantised checkpoint"
        ) from error
    if hasattr(config, "dequantize"):
        config.dequantize = True
        return config
    if method == "compressed-tensors":
        raise ConfigError(
            "the checkpoint is stored in compressed-tensors, which this transformers does not dequantise while it "
            "loads; upgrade transformers, or give the unquantised checkpoint"
        )
    if method == _WITH_KERNELS:
        config.backend = "auto_trainable"
        return config
    return None


def packed_config(settings: Any) -> dict[str, Any] | None:
    """How the model stays quantised in memory, likewise; None where its checkpoint is dequantised while it loads."""
    stored = stored_config(settings)
    return None if stored is None or getattr(trainable_config(stored), "dequantize", False) else stored


def method_of(config: Mapping[str, Any]) -> str:
    """`model.quantization.method` of settings in transformers' words; another library's own name for its format."""
    if config.get("load_in_8bit"):
        return "int8"
    if config.get("load_in_4bit"):
        return str(config.get("bnb_4bit_quant_type", "fp4"))
    kind = str(config.get("quant_method", "unknown"))
    if kind != "torchao":
        return kind
    named = re.search(r'"_type": "(\w+)Config"', json.dumps(config.get("quant_type")))
    return f"{_TORCHAO}{_snake(named[1])}" if named else kind


def moves(config: Mapping[str, Any]) -> bool:
    """Whether a model of these settings may be loaded on the CPU and moved; other formats choose their device."""
    method = method_of(config)
    return method in BITSANDBYTES or method.startswith("torchao")


def check_as_stored(section: ModelSection, settings: Any) -> None:
    """Compare what `model.quantization` asks for with how the checkpoint is quantised.

    Raises:
        ConfigError: the checkpoint is quantised otherwise.
    """
    asked, stored = section.quantization, stored_config(settings)
    if asked is None or stored is None:
        return
    method = method_of(stored)
    nested = bool(stored.get("bnb_4bit_use_double_quant"))
    computed = str(stored.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    for key, ours, theirs in (
        ("method", asked.method, method),
        ("double_quantization", asked.double_quantization, nested),
        ("compute_dtype", asked.compute_dtype or computed, computed),
    ):
        if ours != theirs:
            raise ConfigError(
                f"model.quantization.{key}: {str(ours).lower()}, but the checkpoint {shown(section.name_or_path, 300)} "
                f"is stored quantised with {str(theirs).lower()}; leave model.quantization out, or give the "
                "unquantised checkpoint"
            )


def check_plain(section: ModelSection, settings: Any, key: str) -> None:
    """Raises ConfigError where the base model is, or will be, quantised, for what works on plain weights alone.

    Args:
        section: of the model.
        settings: the model's configuration.
        key: that asks for it, for the message.
    """
    if asked_of(section) is not None or packed_config(settings) is not None:
        raise ConfigError(f"key '{key}' does not work on a quantised base model yet; leave one of them out")


def quantization_of(asked: QuantizationSection, dtype: torch.dtype) -> dict[str, Any]:
    """How a model is to be quantised, as an adapter's manifest has it: transformers' settings, and the others' dtype.

    Args:
        asked: by the configuration; its library is here (`check_runs`).
        dtype: of the weights that are not quantised.

    Raises:
        ConfigError: torchao has no such scheme.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    config: Any
    bitsandbytes: Any = BitsAndBytesConfig
    if asked.method.startswith(_TORCHAO):
        config = TorchAoConfig(quant_type=_scheme(asked.method))
    elif asked.method == "int8":
        config = bitsandbytes(load_in_8bit=True)
    else:
        config = bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type=asked.method,
            bnb_4bit_compute_dtype=_compute_dtype(asked, dtype),
            bnb_4bit_use_double_quant=asked.double_quantization,
        )
    return {"config": json.loads(config.to_json_string(use_diff=False)), "dtype": str(dtype).removeprefix("torch.")}


def check_runs(asked: QuantizationSection, dtype: torch.dtype, device: Any) -> None:
    """Try a format on one small layer, forward and backward, before a large model is loaded in it.

    Raises:
        ConfigError: its library is not installed, has no such scheme, or does not run it on this device; transformers
            trains no adapters on it.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    check_installed(asked.method)
    config = quantization_of(asked, dtype)["config"]
    quantiser_of: Any = AutoHfQuantizer.from_config  # reads no checkpoint, so there is no code to allow
    check_trains(quantiser_of(AutoQuantizationConfig.from_dict(config), pre_quantized=False), config)
    reason = _fault(asked, dtype, device)
    if reason is None:
        return
    works = [each for each in _USUAL if each != asked.method and _works(each, dtype, device)]
    raise ConfigError(
        f"model.quantization: {shown(asked.method)} does not run on {torch.device(device).type} in "
        f"{str(dtype).removeprefix('torch.')} ({reason}); "
        + (f"choose {' or '.join(works)}" if works else "use model.dtype: bfloat16, or leave it out")
    )


def check_installed(method: str) -> None:
    """Raises ConfigError where the library of a format is not installed."""
    library = "bitsandbytes" if method in BITSANDBYTES else "torchao"
    known = method in BITSANDBYTES or method.startswith(_TORCHAO)
    if known and importlib.util.find_spec(library) is None:
        raise ConfigError(f"model.quantization: {method} needs {library}: {install(library)}")


def check_trains(quantiser: Any, config: Mapping[str, Any] | None) -> None:
    """Raises ConfigError for a format in which transformers trains no adapters.

    Args:
        quantiser: transformers' own of the format, as a model has it; None of a model that is not quantised.
        config: of the format, in transformers' words.
    """
    if quantiser is not None and not quantiser.is_trainable:
        raise ConfigError(
            f"model.quantization: transformers trains no adapters on {shown(method_of(config or {}))}; choose nf4, "
            "fp4, int8 or torchao:int8_weight_only, from the unquantised checkpoint"
        )


def apply_as_trained_(model: nn.Module) -> None:
    """Let bitsandbytes' layers compute with the weights that they train on, in evaluation too, from here on.

    In evaluation on CPUs, 4-bit ones pack their weights anew and round their scales to bfloat16 where AVX512-BF16 is,
    and 8-bit ones round their input to int8: arithmetic of that place, which no file has a part in.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state") and _as_in_training not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_in_training)


def _as_in_training(module: nn.Module, inputs: Any) -> None:
    module.training = True


def _works(method: str, dtype: torch.dtype, device: Any) -> bool:
    try:
        check_installed(method)
    except ConfigError:
        return False
    return _fault(QuantizationSection(method=method), dtype, device) is None


def _fault(asked: QuantizationSection, dtype: torch.dtype, device: Any) -> str | None:
    """What goes wrong on a small layer, as the words in brackets; None where nothing does."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(_SIDE, _SIDE, generator=generator).to(device, dtype)
    x = torch.randn(4, _SIDE, generator=generator).to(device, dtype).requires_grad_()
    try:
        with quiet_imports(), torch.random.fork_rng(devices=[]):
            layer = _layer(asked, W)
            y = layer(x)
            y.backward(torch.ones_like(y))
            applied = layer(torch.eye(_SIDE, dtype=dtype, device=device)).detach().T
    except ConfigError:
        raise
    except Exception as error:  # whatever its kernels raise
        return reason_of(error, 120)
    if _distance(applied, W) > _WORST_ERROR:
        return "it applies other weights than it was given"
    gradient = torch.ones_like(y) @ applied
    if x.grad is None or _distance(x.grad, gradient) > _WORST_ERROR:
        return "its gradient is not that of the weights that it applies"
    return None


def _distance(some: Tensor, others: Tensor) -> float:
    """Relative; NaN counts as infinite."""
    found = float((some.float() - others.float()).norm() / others.float().norm())
    return found if found == found else float("inf")


def _layer(asked: QuantizationSection, W: Tensor) -> nn.Module:
    """A small layer in the format, on the device and in the dtype of W."""
    out, in_ = W.shape
    layer: Any
    if asked.method.startswith(_TORCHAO):
        from torchao.quantization import quantize_

        layer = nn.Linear(in_, out, bias=False, device=W.device, dtype=W.dtype)
        layer.weight = nn.Parameter(W, requires_grad=False)
        holder = nn.Sequential(layer)
        quantize_(holder, _scheme(asked.method))
        return holder
    import bitsandbytes

    kinds: Any = bitsandbytes.nn
    if asked.method == "int8":
        layer = kinds.Linear8bitLt(in_, out, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = kinds.Int8Params(W.cpu(), has_fp16_weights=False, requires_grad=False)
    else:
        options = {"quant_type": asked.method, "compress_statistics": asked.double_quantization}
        layer = kinds.Linear4bit(
            in_, out, bias=False, compute_dtype=_compute_dtype(asked, W.dtype), device="meta", **options
        )
        layer.weight = kinds.Params4bit(W.cpu(), requires_grad=False, module=layer, **options)
    layer.weight = layer.weight.to(W.device)
    apply_as_trained_(layer)
    return layer  # type: ignore[no-any-return]


def _compute_dtype(asked: QuantizationSection, dtype: torch.dtype) -> torch.dtype:
    found: torch.dtype = dtype if asked.compute_dtype is None else getattr(torch, asked.compute_dtype)
    return found


def _scheme(method: str) -> Any:
    """Settings of a scheme of torchao, all at their defaults."""
    with quiet_imports():
        import torchao.quantization as library
        from torchao.core.config import AOBaseConfig

    kinds = {
        _snake(name.removesuffix("Config")): kind
        for name, kind in vars(library).items()
        if name.endswith("Config") and isinstance(kind, type) and issubclass(kind, AOBaseConfig)
    }
    scheme = method.removeprefix(_TORCHAO)
    if scheme not in kinds:
        names = ", ".join(name for name in sorted(kinds) if "weight" in name)
        raise ConfigError(f"model.quantization: torchao has no scheme {shown(scheme)!r}; known: {names}")
    return kinds[scheme]()


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
