"""An adapter that PEFT makes, trains and saves as it is: its configuration, its start, its files.

The files are PEFT's own. The manifest beside their tensors, which PEFT does not read, is ours: hashes of the tensors
and of the whole base model, so that a damaged file and another base are told here as for our own adapters.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from dude_peft.artifact.base_settings import base_settings
from dude_peft.artifact.fingerprint import fingerprint
from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE, BaseRecord, Manifest, read_manifest, stamp
from dude_peft.doors import read_json
from dude_peft.errors import ArtifactError, ConfigError
from dude_peft.peft_file import PREFIX, checked_settings, is_foreign
from dude_peft.show import quoted, reason_of, shown
from dude_peft.task_types import CAUSAL
from dude_peft.tuner import frozen
from dude_peft.tuner.beside import prints_beside
from dude_peft.tuner.patterns import check_patterns
from dude_peft.tuner.same_base import checked_base

_RECORD = "_dude_base"  # on the configuration of such an adapter: what its manifest will say of the base


def config_of(settings: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration of these settings, for a causal language model.

    Raises:
        ConfigError: a type or key that this PEFT does not have, a value that it refuses, or prompt learning.
    """
    kind = settings["peft_type"]
    known: dict[str, Any] = {
        str(getattr(name, "value", name)): made for name, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if kind not in known:
        raise ConfigError(f"adapter.peft: this PEFT has no type {quoted(kind)}; it has {', '.join(sorted(known))}")
    made, names = known[kind], {field.name for field in dataclasses.fields(known[kind])}
    if unknown := next((key for key in settings if key not in names), None):
        raise ConfigError(f"adapter.peft: PEFT's {made.__name__} has no key {quoted(unknown)}; leave it out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it leaves to the user
            config: PeftConfig = made(
                **{key: value for key, value in settings.items() if key != "peft_type"}, task_type=CAUSAL
            )
    except Exception as error:  # each class has its own
        raise ConfigError(f"adapter.peft: PEFT's {made.__name__} refuses it ({_line(error)})") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ConfigError(
            f"adapter.peft: {kind} learns a prompt, which changes the length of every row; choose a type that adapts "
            "layers"
        )
    return config


def adapt_foreign(model: Any, settings: Mapping[str, Any]) -> PeftModel:
    """The model under a new adapter of PEFT's own.

    Raises:
        ConfigError: PEFT refuses the model, or the adapter changes the base weights.
    """
    kind, record = settings["peft_type"], _record(model)
    adapted = _adapted(model, settings)
    _keep(adapted, record)
    here = Counter(_same(fingerprint(t)) for t in (*adapted.parameters(), *adapted.buffers()) if frozen.is_plain(t))
    # Of tied tensors the record has several names.
    missing = [name for name, seen in record.beside.items() if not here[_same(seen)]]
    if missing:
        raise ConfigError(
            f"adapter.peft: {kind} changes the base weight {quoted(missing[0], 200)} with these settings, so its files "
            "alone would not be the adapter; choose another start"
        )
    return adapted


def adapt_empty(model: Any, settings: Mapping[str, Any]) -> Any:
    """The same of a model on the meta device, changed in place. That a start changes weights is not noticed here.

    Raises:
        ConfigError: PEFT refuses the model.
    """
    return _adapted(model, settings, empty=True).get_base_model()


def load_foreign(model: nn.Module, path: str | os.PathLike[str], is_trainable: bool = False) -> PeftModel:
    """The model under a saved adapter of PEFT's own, files and base model checked.

    Raises:
        ArtifactError: damaged files, or another base model.
    """
    folder = Path(path)
    manifest, _ = read_foreign(folder)
    with checked_base(model, manifest.record, str(path)):
        pass
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT would go on without them
            loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except Exception as error:
        raise ArtifactError(f"adapter {shown(folder, 300)}: PEFT cannot load it ({_line(error)})") from error
    _keep(loaded, manifest.record)
    return loaded


def read_foreign(folder: Path) -> tuple[Manifest, PeftConfig]:
    """Manifest and configuration of such an adapter, its files and settings checked.

    Raises:
        ArtifactError: they are damaged, forged, or not of such an adapter.
    """
    manifest = read_manifest(folder)
    if not is_foreign(manifest.config.get("method")):
        raise ArtifactError(f"{shown(folder, 300)} is an adapter of DuDe's own method; load it with load_adapter")
    stored = read_json(folder / CONFIG_FILE)
    try:
        settings = checked_settings(stored, stored.get("base_model_name_or_path") or "")
        config = config_of(settings)
        check_patterns(vars(config), list(manifest.beside or ()))
        if f"{PREFIX}{settings['peft_type']}" != manifest.config["method"]:
            raise ConfigError("its type is not the manifest's")
        config.base_model_name_or_path, config.revision = (
            None if stored.get(key) is None else str(stored[key]) for key in ("base_model_name_or_path", "revision")
        )
    except ConfigError as error:
        raise ArtifactError(f"{shown(folder / CONFIG_FILE, 300)}: {error}") from error
    return manifest, config


def stamp_foreign(model: Any, folder: Path) -> None:
    """Writes the manifest into the files of a PEFT adapter that has just been saved; ours have theirs."""
    record = getattr(next(iter(model.peft_config.values())), _RECORD, None)
    if record is None:
        return
    if not (folder / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"{shown(folder, 300)}: PEFT saved no {WEIGHTS_FILE}")
    stamp(folder, {"method": f"{PREFIX}{_kind(model)}"}, record)


def _adapted(model: Any, settings: Mapping[str, Any], *, empty: bool = False) -> PeftModel:
    config = config_of(settings)
    kind = settings["peft_type"]
    check_patterns(vars(config), [name for name, _ in model.named_modules() if name])
    own = {id(parameter) for parameter in model.parameters()}
    try:
        adapted: PeftModel = get_peft_model(model, config, low_cpu_mem_usage=empty)
    except Exception as error:
        raise ConfigError(f"adapter.peft: PEFT's {kind} refuses this model ({_line(error)})") from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ConfigError(f"adapter.peft: {kind} trains nothing with these settings; set what its start needs")
    in_place = [name for name, p in adapted.named_parameters() if p.requires_grad and id(p) in own]
    if in_place:
        raise ConfigError(
            f"adapter.peft: {kind} trains {quoted(in_place[0], 200)} of the base model itself, so no base model would "
            "be left to compare with; set bias: none"
        )
    return adapted


def _record(model: nn.Module) -> BaseRecord:
    """All of a plain model: nothing is known of which layers PEFT adapts in which way."""
    beside = {name: seen for name, (_, seen) in prints_beside(model, {}).items()}
    return BaseRecord({}, beside, base_settings(getattr(model, "config", None)))


def _keep(model: PeftModel, record: BaseRecord) -> None:
    (config,) = model.peft_config.values()
    for name in ("target_modules", "exclude_modules"):  # PEFT makes sets of them, in another order in every process
        value = getattr(config, name, None)
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    setattr(config, _RECORD, record)


def _kind(model: Any) -> str:
    return str(next(iter(model.peft_config.values())).peft_type.value)


def _same(seen: Any) -> tuple[Any, ...]:
    return seen["dtype"], tuple(seen["shape"]), seen["xxh3_128"]


def _line(error: Exception) -> str:
    return reason_of(error, 200)


@torch.inference_mode()
def check_disabled(model: PeftModel, base: Tensor, probe: Any) -> None:
    """Makes sure that PEFT gives the base model back, which every comparison with it needs.

    Args:
        model: adapted.
        base: what `probe` gave for the base model.
        probe: a function of a model.

    Raises:
        ConfigError: it does not.
    """
    with model.disable_adapter():
        if not torch.equal(probe(model), base):
            raise ConfigError(f"adapter.peft: {_kind(model)} does not give the base model back when it is disabled")
