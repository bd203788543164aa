"""Loading a saved adapter so that training can go on from it, bit by bit."""

from __future__ import annotations

import os
import warnings
from typing import Any

from peft import PeftModel
from torch import nn

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.core.threads import one_thread, single_threaded_pool
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.tuner import frozen
from dude_peft.tuner.beside import check_beside
from dude_peft.tuner.config import DudeConfig, closest
from dude_peft.tuner.layer import DudeLinear

# Ours, and those that reach the hub and PEFT's own loading.
_OPTIONS = (
    "adapter_name", "is_trainable", "allow_base_mismatch", "revision", "token", "cache_dir", "subfolder",
    "force_download", "local_files_only", "proxies", "low_cpu_mem_usage", "autocast_adapter_dtype", "torch_device",
    "ephemeral_gpu_offload", "key_mapping", "max_memory", "device_map", "offload_folder", "offload_dir",
)  # fmt: skip


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_base_mismatch: bool = False,
    **hub_options: Any,
) -> PeftModel:
    """Load a DuDe adapter with its frozen start, without an SVD.

    Stock `peft.PeftModel.from_pretrained(model, path)` loads the same files as a plain DoRA or LoRA adapter: right for
    inference, but a DuDe run can only be continued from here.

    Args:
        model: the base model, or a PeftModel with DuDe adapters, which gets one more.
        path: folder or hub id of the adapter.
        adapter_name: its name in the model.
        is_trainable: True to go on training, False for inference.
        allow_base_mismatch: accept a base model with other values (outputs are then not those of training).
        **hub_options: revision, token, cache_dir, subfolder, and what PEFT's loading takes (low_cpu_mem_usage).

    Returns:
        The PeftModel.

    Raises:
        ArtifactError: damaged files, a file that is not ours, a wrong base model.
        NumericsError: NaN or Inf in the adapter.
        ConfigError: the name is taken, the model has adapters of another kind, or an option does not exist.
    """
    for name in hub_options:
        if name not in _OPTIONS:
            raise ConfigError(f"load_adapter has no option '{name}'; {closest(name, _OPTIONS)}")
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ConfigError(f"the model has an adapter '{adapter_name}' already; choose another adapter_name")
        if not all(isinstance(config, DudeConfig) for config in model.peft_config.values()):
            raise ConfigError("the model has adapters of another kind; load this one on the base model itself")
    config = DudeConfig.from_pretrained(str(path), **hub_options)
    config.inference_mode = not is_trainable
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert config._loading is not None
    check_base(base, config._loading.base, str(path), allow_base_mismatch)
    check_beside(base, config._loading.beside or {}, str(path), allow_base_mismatch)
    if not isinstance(model, PeftModel):
        with one_thread():  # hundreds of small copies
            return PeftModel.from_pretrained(
                model, str(path), adapter_name=adapter_name, is_trainable=is_trainable, config=config, **hub_options
            )
    model.add_adapter(adapter_name, config)
    try:
        model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **hub_options)
    except Exception:
        model.delete_adapter(adapter_name)
        raise
    if is_trainable:
        model.set_requires_grad(adapter_name)
    return model


def check_base(base: nn.Module, recorded: dict[str, TensorPrint], path: str, allow_mismatch: bool = False) -> None:
    """Compare a model in memory with the base weights that an adapter was trained on.

    Args:
        base: the base model, adapted or not.
        recorded: fingerprints by layer, from the manifest.
        path: of the adapter, for messages.
        allow_mismatch: warn of other values instead of refusing them.

    Raises:
        ArtifactError: layers, shapes or values are others.
    """
    modules = dict(base.named_modules())
    absent = [name for name in recorded if name not in modules or not frozen.is_supported(_base_layer(modules[name]))]
    if absent:
        raise ArtifactError(
            f"adapter '{path}' adapts {len(absent)} layers that {type(base).__name__} has not (first: '{absent[0]}'); "
            f"load it on the base model it was trained on"
        )
    for name, expected in recorded.items():
        module = modules[name]
        shape = frozen.layer_shape(_base_layer(module))
        if sorted(shape) != sorted(expected["shape"]):
            raise ArtifactError(
                f"adapter '{path}': layer '{name}' is {list(shape)} here and was {expected['shape']} in training; "
                f"load it on the base model it was trained on"
            )
    with single_threaded_pool(len(recorded)) as pool:  # hashing lets other threads run
        held = pool.map(lambda name: _holds(modules[name], recorded[name]), recorded)
        wrong = [name for name, holds in zip(recorded, held, strict=True) if not holds]
    if not wrong:
        return
    count = f"{len(wrong)} of {len(recorded)} differ (first: '{wrong[0]}')"
    message = f"adapter '{path}' was trained on other base weights: {count}"
    if not allow_mismatch:
        raise ArtifactError(f"{message}; load the base model it was trained on, or pass allow_base_mismatch=True")
    warnings.warn(f"{message}; outputs will not be those of training", stacklevel=3)


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, DudeLinear) else module


def _holds(module: nn.Module, expected: TensorPrint) -> bool:
    if isinstance(module, DudeLinear):
        if module.base_fingerprint() == expected:
            return True
        with module.unmerged():
            return frozen.holds(module.get_base_layer(), expected)
    return frozen.holds(module, expected)
