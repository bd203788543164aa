"""Loading a saved adapter so that training can go on from it, bit by bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from dude_peft.artifact.base_settings import PADDING
from dude_peft.artifact.manifest import BaseRecord
from dude_peft.core.threads import one_thread
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.show import shown
from dude_peft.tuner.config import DudeConfig, closest
from dude_peft.tuner.same_base import check_base, checked_base

# Ours, and those that reach the hub and PEFT's own loading.
_OPTIONS = (
    "adapter_name", "is_trainable", "allow_base_mismatch", "lora_dropout", "revision", "token", "cache_dir",
    "subfolder", "force_download", "local_files_only", "proxies", "low_cpu_mem_usage", "autocast_adapter_dtype",
    "torch_device", "ephemeral_gpu_offload", "key_mapping", "max_memory", "device_map", "offload_folder", "offload_dir",
)  # fmt: skip


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_base_mismatch: bool = False,
    lora_dropout: float | None = None,
    **hub_options: Any,
) -> PeftModel:
    """Load a DuDe adapter with its frozen start, without an SVD.

        model = AutoModelForCausalLM.from_pretrained("my-model")
        model = dude_peft.load_adapter(model, "runs/mine/adapter", is_trainable=True)

    Stock `peft.PeftModel.from_pretrained(model, path)` loads the same files as a plain DoRA or LoRA adapter: right for
    inference, but a DuDe run can only be continued from here.

    Args:
        model: the base model, or a PeftModel with DuDe adapters, which gets one more.
        path: folder or hub id of the adapter.
        adapter_name: its name in the model.
        is_trainable: True to go on training, False for inference.
        allow_base_mismatch: accept a base model with other values (outputs are then not those of training).
        lora_dropout: of the training that follows; None: the file's.
        **hub_options: revision, token, cache_dir, subfolder, and what PEFT's loading takes (low_cpu_mem_usage).

    Returns:
        The PeftModel.

    Raises:
        ArtifactError: damaged files, a file that is not ours, a wrong base model.
        NumericsError: NaN or Inf in the adapter.
        ConfigError: the name is taken, the model has adapters of another kind, or an option does not exist.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("load_adapter needs a loaded model, such as AutoModelForCausalLM.from_pretrained(NAME)")
    for name in hub_options:
        if name not in _OPTIONS:
            raise ConfigError(f"load_adapter has no option '{name}'; {closest(name, _OPTIONS)}")
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ConfigError(f"the model already has an adapter '{adapter_name}'; choose another adapter_name")
        if not all(isinstance(config, DudeConfig) for config in model.peft_config.values()):
            raise ConfigError("the model has another kind of adapter; load this one on the base model itself")
    config = DudeConfig.from_pretrained(str(path), **hub_options)
    config.inference_mode = not is_trainable
    if lora_dropout is not None:
        config.lora_dropout = lora_dropout
    assert config._loading is not None
    recorded = config._loading.record
    if not isinstance(model, PeftModel):
        options = {"adapter_name": adapter_name, "is_trainable": is_trainable, **hub_options}
        loaded = _load_first(model, str(path), config, recorded, allow_base_mismatch, options)
        _pad_as_trained(loaded, recorded, str(path))
        return loaded
    check_base(model.get_base_model(), recorded, str(path), allow_base_mismatch)
    model.add_adapter(adapter_name, config)
    try:
        model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **hub_options)
    except Exception:
        model.delete_adapter(adapter_name)
        raise
    if is_trainable:
        model.set_requires_grad(adapter_name)
    _pad_as_trained(model, recorded, str(path))
    return model


def _pad_as_trained(model: Any, recorded: BaseRecord, path: str) -> None:
    """Give a model that scores the padding token of the training: it reads the score at the last other token."""
    wanted = (recorded.settings or {}).get(PADDING)
    if wanted is None or not hasattr(model, "config"):
        return
    settings = model.config.get_text_config()
    if settings.pad_token_id not in (None, wanted):
        warnings.warn(
            f"adapter '{shown(path, 300)}' was trained with pad_token_id {wanted}, the model has "
            f"{settings.pad_token_id}; it is set to {wanted}, because scores are read at the last other token",
            stacklevel=3,
        )
    settings.pad_token_id = wanted


def put_on_empty(model: nn.Module, config: DudeConfig) -> PeftModel:
    """A model on the meta device, with the modules of an adapter that another process has, and sends.

    Args:
        model: the base model, all on the meta device.
        config: that process's, as it came out of `get_peft_model` or `load_adapter`.
    """
    config._is_sent = True
    return get_peft_model(model, config).eval()


@contextmanager
def _where_it_is(model: nn.Module) -> Iterator[None]:
    """Within: PEFT does not see the device map. It would take accelerate's hooks off, and dispatch the model anew."""
    device_map = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


def _load_first(
    model: nn.Module, path: str, config: DudeConfig, recorded: BaseRecord, allow_mismatch: bool, options: dict[str, Any]
) -> PeftModel:
    """The base model is read by other threads while PEFT puts the adapter in; a refusal takes it out again."""
    loaded = None
    attributes = set(vars(model))
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        # Hundreds of small copies.
        with _where_it_is(model), checked_base(model, recorded, path, allow_mismatch), one_thread():
            loaded = PeftModel.from_pretrained(model, path, config=config, **options)
    except KeyError as error:  # PEFT's, of a module to save whose tensors the file does not have
        raise ArtifactError(
            f"adapter {shown(path, 300)} has no tensor {shown(error, 200)}, which its settings name; save it again"
        ) from error
    except (ArtifactError, NumericsError):
        if loaded is not None:
            loaded.unload()
            for name in set(vars(model)) - attributes:
                delattr(model, name)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
        raise
    return loaded
