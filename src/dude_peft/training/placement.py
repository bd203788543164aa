"""What a run can do with a model that `model.device_map` spreads over devices and the disk, and what is refused."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dude_peft.artifact.sealed import content_sha256
from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.errors import ConfigError, ResourceError
from dude_peft.show import quoted, shown

_KEY = "model.device_map"


def check_placement(config: RunConfig, processes: int) -> None:
    """Refuses, before anything is loaded, what has no meaning or was not shown to be right for a spread model.

    Args:
        config: of the run.
        processes: of the run.

    Raises:
        ConfigError: such a setting.
    """
    if config.model.device_map is None:
        return
    if processes > 1:
        raise ConfigError(f"{_KEY}: each process has a device of its own; leave it, or --launch, out")
    if not config.model.is_hooked:
        return
    adapter, train = config.adapter, config.train
    faults = {
        "train.torch_compile: weights come and go between the layers; set it to false": train.torch_compile,
        "train.trainer: trl places the model itself; set it to transformers": train.trainer == "trl",
        "train.objective: grpo answers with merged weights, and offloaded ones cannot be merged; choose another": (
            train.rewarded is not None
        ),
        f"adapter.method: {adapter.method} is PEFT's own and was not tried with it; choose a method of dude methods": (
            adapter.foreign
        ),
        "adapter.budget is spent on a model on one device; give adapter.r": adapter.budget is not None,
        "adapter.target_parameters: experts are whole tensors in memory; leave it out": bool(adapter.target_parameters),
        "adapter.modules_to_save trains the module itself, which may be offloaded; leave it out": bool(
            adapter.modules_to_save
        ),
        "adapter.bias trains the base's own tensors, which may be offloaded; set it to none": adapter.bias != "none",
    }
    for fault, there in faults.items():
        if there:
            raise ConfigError(f"{_KEY}: {fault}; or leave {_KEY} out")


def check_map(model: Any, section: ModelSection) -> None:
    """Looks at a model, with or without weights, before its weights go where the map says.

    Raises:
        ConfigError: the map names what the model does not have, or sends nothing anywhere.
    """
    if isinstance(section.device_map, Mapping):
        known = {name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}
        if unknown := next((name for name in section.device_map if name not in known), None):
            near = difflib.get_close_matches(unknown, known, n=1)
            hint = f"closest: {quoted(near[0], 200)}" if near else 'write {"": cpu} for all of it'
            raise ConfigError(f"{_KEY}: {type(model).__name__} has no module {quoted(unknown, 200)}; {hint}")


def check_placed(model: Any) -> None:
    """Looks at a loaded model, whose map accelerate may have made.

    Raises:
        ResourceError: what a run needs in memory is offloaded: the input embeddings, where batches go to, or a head
            that is trained whole.
    """
    from dude_peft.model.outputs import is_scorer
    from dude_peft.tuner.heads import behind_backbone
    from dude_peft.tuner.offloaded import is_offloaded

    if is_scorer(model):
        for name in behind_backbone(model):
            if any(map(is_offloaded, model.get_submodule(name).modules())):
                raise ResourceError(
                    f"{_KEY}: the head '{shown(name)}' is offloaded, but it is trained whole; put it on a device that "
                    "computes, or give it more in model.max_memory"
                )
    if is_offloaded(model.get_input_embeddings()):
        raise ResourceError(
            f"{_KEY}: the input embeddings are offloaded, but batches begin there; put them on the device that "
            "computes, or give it more in model.max_memory"
        )


def check_adapted(model: Any) -> None:
    """Looks at the adapted layers of a spread model.

    Raises:
        ConfigError: an offloaded layer has no plain weight to read, or is no linear layer.
    """
    from dude_peft.tuner import frozen
    from dude_peft.tuner.layer import DudeLinear
    from dude_peft.tuner.offloaded import is_offloaded

    for layer in model.modules():
        if not isinstance(layer, DudeLinear) or not is_offloaded(base := layer.get_base_layer()):
            continue
        if frozen.is_map(base) or frozen.plain_weight(base) is None:
            raise ConfigError(
                f"{_KEY}: '{shown(layer.layer_name)}' is offloaded and no plain linear layer; leave it out of "
                "adapter.target_modules, or keep it on a device"
            )


def placement_notes(model: Any, *, checkpoints: bool) -> list[str]:
    """What a run says of where the parts of its model are; `checkpoints`: with train.gradient_checkpointing."""
    from dude_peft.tuner.offloaded import offloaded_layers

    placed: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    if placed is None:
        return []
    notes = [f"parts of the model: {_counted(placed)}"]
    if offloaded_layers(model) and not checkpoints:
        notes.append(
            "offloaded weights stay in memory from a step's forward to its backward; train.gradient_checkpointing: "
            "true reads them again instead"
        )
    return notes


def placed_as(model: Any) -> str | None:
    """The map of a loaded model in short, for the record of where a run computes; None without one."""
    placed: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    if placed is None:
        return None
    named = {name: str(device) for name, device in placed.items()}
    return f"{_counted(named)} ({content_sha256(named)[:12]})"


def _counted(placed: Mapping[str, Any]) -> str:
    counts = Counter(str(device) for device in placed.values())
    return ", ".join(f"{count} on {device}" for device, count in counts.items())
