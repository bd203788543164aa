"""Which settings of a run its model card lists: those that somebody chose, and those that everybody asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dude_peft.config.schema import RunConfig, Section

_CENTRAL = {
    "model.name_or_path", "adapter.method", "adapter.r", "adapter.lora_alpha", "adapter.target_modules", "data.train",
    "data.test", "data.max_length", "train.learning_rate", "train.max_steps", "train.num_train_epochs",
    "train.per_device_train_batch_size", "train.seed",
}  # fmt: skip
# What adapter.budget decides, layer by layer: too long for a card, and in adapter_config.json.
_OF_A_BUDGET = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
# What a run writes out for a setting that was left to most methods.
_LEFT_OUT = {"adapter.norm_gradient": "detached"}


def settings_of(config: Mapping[str, Any], budget: Mapping[str, Any] | None = None) -> list[tuple[str, Any]]:
    """(dotted key, value) of the settings in a report's `config` that are central, or not as they are left out.

    Args:
        config: of the report.
        budget: of the report too; where it is there it stands for the ranks and layers that came of it.
    """
    if budget and isinstance(adapter := config.get("adapter"), Mapping):
        asked = {key: value for key, value in adapter.items() if key not in _OF_A_BUDGET}
        config = {**config, "adapter": {**asked, "budget": budget}}
    return list(_chosen(config, RunConfig, ""))


def _chosen(config: Mapping[str, Any], section: type[Section] | None, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key, field = f"{prefix}{name}", section.model_fields.get(name) if section is not None else None
        inner = field.annotation if field is not None else None
        if isinstance(value, Mapping):
            inside = inner if isinstance(inner, type) and issubclass(inner, Section) else None
            yield from _chosen(value, inside, f"{key}.")
        elif value is not None and (key in _CENTRAL or field is None or value != _LEFT_OUT.get(key, field.default)):
            yield key, value
