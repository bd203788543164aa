"""The `data:` section that trains on what `dude data check` was shown, as YAML to paste into a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dude_peft.config.schema import DataSection, TrainSection

_FEW, _TOO_FEW = 50, 5


def held_out_share(questions: int) -> float | None:
    """The share that is held out where nobody names one: a tenth, of few questions a fifth; None of a handful.

    Args:
        questions: number of different ones that the training rows ask.
    """
    if questions < _TOO_FEW:
        return None
    return 0.2 if questions < _FEW else 0.1


def data_section(
    settings: dict[str, Any], questions: int, objective: str = "sft", stages: int | Sequence[float] | None = None
) -> str:
    """YAML of the section, keys that say what is so anyway left out.

    Args:
        settings: keys of `DataSection`; where there is no `test`, one that works is chosen.
        questions: number of different ones that the training rows ask.
        objective: train.objective.
        stages: by length, of train.curriculum.
    """
    import yaml

    chosen = {name: value for name, value in settings.items() if value != DataSection.model_fields[name].default}
    sections: dict[str, Any] = {"data": chosen}
    if settings.get("test") is None and settings["train"].startswith("builtin:"):
        chosen["test"] = settings["train"]  # another split of it
    elif settings.get("test") is None and (share := held_out_share(questions)) is not None:
        chosen["test"] = share
    elif settings.get("test") is None:
        sections["evaluation"] = {"enabled": False}
    if objective != TrainSection.model_fields["objective"].default:
        sections["train"] = {"objective": objective}
    if stages is not None:
        own = stages if isinstance(stages, int) else [int(each) if each == int(each) else each for each in stages]
        sections["train"] = {**sections.get("train", {}), "curriculum": {"by": "length", "stages": own}}
    order = [name for name in DataSection.model_fields if name in chosen]
    sections["data"] = {name: chosen[name] for name in order}
    return str(yaml.safe_dump(sections, sort_keys=False, width=10**6)).rstrip()
