"""The model without its weights, and the names of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from dude_peft.doors import check_folder
from dude_peft.errors import ConfigError, DudeError
from dude_peft.show import a_, shown
from dude_peft.task_types import CAUSAL, SCORES, TaskType

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]


def fetch_checkpoint(model: str, revision: str | None = None) -> Path:
    """The local copy of a hub model's configuration, tokenizer and safetensors weights.

    Raises:
        ConfigError: it cannot be fetched.
        ArtifactError: a file in it is damaged.
    """
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client's errors have no common base
        raise ConfigError(
            f"model {shown(model, 300)} is not a local folder, and cannot be downloaded ({_first(error)})"
        ) from error
    check_folder(folder)
    return folder


def empty_model(
    model_name: str, folder: Path, stored_dtype: torch.dtype, dtype: str = "auto", task_type: TaskType = CAUSAL
) -> Any:
    """The model of a folder's config.json, all parameters on the meta device.

    Args:
        model_name: as the user gave it; recorded as the model's name.
        folder: with config.json.
        stored_dtype: of the checkpoint, where config.json is silent.
        dtype: auto (config.json's, or the checkpoint's own), float32, bfloat16, float16.
        task_type: which head it has.

    Raises:
        ConfigError: it is quantised, or no causal language model.
    """
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises what its readers raise
        if refusal := code_refusal(shown(model_name, 300), error):
            raise refusal from error
        raise ConfigError(f"model {shown(model_name, 300)}: config.json cannot be used ({_first(error)})") from error
    wanted = (getattr(settings, "dtype", None) or stored_dtype) if dtype == "auto" else getattr(torch, dtype)
    return model_of(settings, model_name, wanted, task_type=task_type)


def code_refusal(model: str, error: Exception) -> ConfigError | None:
    """What to say where transformers wants to run Python code that a model brings along; None for another error.

    Args:
        model: its name, fit for a message.
        error: of transformers.
    """
    if "trust_remote_code" not in str(error):
        return None
    return ConfigError(
        f"model {model} has its own Python code, which was not run; only dude train and dude plan run it, if the YAML "
        "sets model.trust_remote_code: true"
    )


def model_of(
    settings: Any,
    model_name: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    *,
    task_type: TaskType = CAUSAL,
) -> Any:
    """The model of a configuration that is read already, all parameters on the meta device.

    Args:
        settings: transformers' configuration of the model.
        model_name: as the user gave it; recorded as the model's name.
        dtype: of the parameters.
        trust_remote_code: whether the model's own Python code may run.
        task_type: which head it has.

    Raises:
        ConfigError: it is quantised, or no causal language model.
    """
    quantised = getattr(settings, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ConfigError(
            f"model {shown(model_name, 300)} is quantised ({shown(method)}): give the unquantised checkpoint"
        )
    kinds = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    if not own and not any(type(settings) in kind for kind in kinds):
        raise ConfigError(
            f"model {shown(model_name, 300)} is not a causal language model known to transformers; its configuration "
            f"is {a_(type(settings).__name__)}"
        )
    try:
        with torch.device("meta"):
            automatic: Any = automatic_class(settings, task_type)
            model: nn.Module = automatic.from_config(settings, trust_remote_code=trust_remote_code, dtype=dtype)
    except DudeError:
        raise
    except Exception as error:
        if refusal := code_refusal(shown(model_name, 300), error):
            raise refusal from error
        raise ConfigError(
            f"model {shown(model_name, 300)} is not a causal language model known to transformers ({_first(error)})"
        ) from error
    model.name_or_path = settings.name_or_path = model_name  # type: ignore[assignment]
    return model


def automatic_class(settings: Any, task_type: TaskType = CAUSAL) -> Any:
    """The class of transformers that makes the language model of a configuration; some read images beside text.

    Raises:
        ConfigError: a model that scores is asked for, and transformers has none of this family.
    """
    if task_type == SCORES:
        known = type(settings) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if not known or type(settings) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(
                f"a reward model: transformers has no sequence classification for {a_(type(settings).__name__)}; use a "
                "model of another family, such as Llama, Qwen or Gemma"
            )
        settings.num_labels = 1
        return transformers.AutoModelForSequenceClassification
    if type(settings) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(settings) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by the parameter's id; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _first(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {shown(text.splitlines()[0], 200)}" if text else type(error).__name__
