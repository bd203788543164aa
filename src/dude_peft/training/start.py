"""`adapter.start`: a run that begins with an adapter which is there already, such as `dude init` writes.

The file decides everything that the start consists of; a key of the run that says otherwise is refused. The SVD then
runs once for any number of runs. A start in the folded form (`dude init --quantize`), or one that was trained already,
is no base model: what the run measures before training is the start itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.artifact.sealed import file_sha256
from dude_peft.config.schema import RunConfig
from dude_peft.errors import ConfigError
from dude_peft.show import shown
from dude_peft.terminal.quiet import quiet_imports

_LAYERS = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform")
_FREE = "lora_dropout"


@dataclass(frozen=True)
class Start:
    """An adapter folder to start from, its files compared with its manifest."""

    folder: Path
    sha256: str
    """Of its tensors and its manifest, which covers everything else."""
    base: str
    """The base model that it names."""
    layers: frozenset[str]
    """The layers that it adapts."""
    asks: bool
    """Whether the run says itself which layers to adapt; then they are compared on the model."""


def with_start(config: RunConfig) -> tuple[RunConfig, Start | None]:
    """The run with everything that its start decides written out.

    Raises:
        ConfigError: there is no such folder, or a key of the run contradicts the file.
        ArtifactError: the file is damaged.
    """
    section = config.adapter
    if section.start is None:
        return config, None
    folder = Path(section.start)
    if not folder.is_dir():
        raise ConfigError(
            f"adapter.start: no folder {shown(folder, 300)}; make it with: dude init "
            f"{shown(config.model.name_or_path)} -o {shown(folder)}"
        )
    with quiet_imports():
        from dude_peft.artifact.manifest import WEIGHTS_FILE
        from dude_peft.exporting.adapter import open_adapter
    saved = open_adapter(folder)
    fields: dict[str, Any] = saved.config.to_dict()
    asks = bool(set(_LAYERS) & section.model_fields_set)
    said_of = section.settings()
    decided = {name: fields[name] for name in said_of if name not in (*_LAYERS, _FREE)}
    for name, value in decided.items():
        said = said_of[name]
        if name in section.model_fields_set and said is not None and said != value:
            raise ConfigError(
                f"adapter.{name}: {shown(said)}, but the start {shown(folder, 300)} has {shown(value)}; leave the key "
                "out, or give another start"
            )
    if not asks:
        decided |= {name: fields[name] for name in _LAYERS}
    start = Start(
        folder.absolute(),
        file_sha256(folder / WEIGHTS_FILE),
        str(saved.config.base_model_name_or_path),
        frozenset(saved.base),
        asks,
    )
    return config.model_copy(update={"adapter": section.model_copy(update=decided)}), start


def put_on(model: Any, start: Start, config: RunConfig) -> Any:
    """The start on its base model, ready to train.

    Args:
        model: the base model.
        start: by `with_start`.
        config: of the run, as `with_start` returned it.

    Raises:
        ConfigError: the run's keys choose other layers.
        ArtifactError: it belongs to another base model.
    """
    from dude_peft.tuner.load import load_adapter
    from dude_peft.tuner.same_base import with_remedy

    if start.asks:
        _compare_layers(model, start, config)
    remedy = f"adapter.start needs the model that it was made for, {shown(start.base, 300)}, loaded in the same way"
    with with_remedy(remedy):
        adapted = load_adapter(model, str(start.folder), is_trainable=True, lora_dropout=config.adapter.lora_dropout)
    adapted.peft_config["default"].base_model_name_or_path = config.model.name_or_path
    adapted.peft_config["default"].revision = config.model.revision
    return adapted


def _compare_layers(model: Any, start: Start, config: RunConfig) -> None:
    import peft

    from dude_peft.model.architecture import model_of
    from dude_peft.tuner import DudeConfig, DudeLinear

    settings = type(model.config).from_dict(model.config.to_dict())
    if getattr(settings, "quantization_config", None) is not None:
        del settings.quantization_config
    empty = model_of(settings, config.model.name_or_path, model.dtype, config.model.trust_remote_code)
    wanted = DudeConfig(**config.adapter.settings(), task_type=config.train.task_type)
    adapted = peft.inject_adapter_in_model(wanted, empty, low_cpu_mem_usage=True)
    layers = {module.layer_name for module in adapted.modules() if isinstance(module, DudeLinear)}
    if layers != start.layers:
        other = sorted(layers ^ start.layers)
        raise ConfigError(
            f"adapter.target_modules: {len(layers)} layers, but the start {shown(start.folder, 300)} has "
            f"{len(start.layers)} (first difference: {shown(other[0])}); leave the keys out, or give another start"
        )
