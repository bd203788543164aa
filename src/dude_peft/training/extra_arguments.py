"""`train.extra_arguments`: fields of TrainingArguments, checked by type and tried out before the model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler

from dude_peft.config.schema import TrainSection
from dude_peft.config.trainer_fields import KEY
from dude_peft.errors import ConfigError
from dude_peft.show import shown

_TRIED = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs")


def handed_on(section: TrainSection) -> dict[str, Any]:
    """The fields as Trainer takes them.

    Raises:
        ConfigError: the installed transformers has no such field, it is of another type, the optimizer or the schedule
            refuses it, or the optimizer does not look at it.
    """
    extra = section.extra_arguments
    if not extra:
        return {}
    known, hints = {field.name for field in fields(TrainingArguments)}, get_type_hints(TrainingArguments)
    for name, value in extra.items():
        if name not in known:
            raise ConfigError(f"key '{KEY}.{name}': the installed transformers has no such field; update it")
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            told = error.errors(include_url=False)[0]["msg"].lower()
            raise ConfigError(f"key '{KEY}.{name}': {told}, got {shown(repr(value), 120)}") from None
    _try_out(section, {name: value for name, value in extra.items() if name in _TRIED})
    return dict(extra)


def _try_out(section: TrainSection, extra: Mapping[str, Any]) -> None:
    """Makes the optimizer and the schedule over one number, which finds what they refuse before a model is loaded."""
    number = torch.nn.Parameter(torch.zeros(1))
    try:
        arguments = TrainingArguments(
            output_dir=".",
            optim=section.optim,
            lr_scheduler_type=section.lr_scheduler_type,
            report_to=[],
            use_cpu=True,
            **extra,
        )
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        for name, without in _left_out(arguments):
            if Trainer.get_optimizer_cls_and_kwargs(without)[1] == settings:
                raise ConfigError(f"key '{KEY}.{name} has no effect on train.optim: {section.optim}; leave it out")
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=kind([number], **settings),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs or None,  # type: ignore[arg-type]
        )
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"section '{KEY}': {shown(' '.join(str(error).split()), 300)}; change it") from error


def _left_out(arguments: TrainingArguments) -> Iterator[tuple[str, TrainingArguments]]:
    """For each setting of the optimizer that is not its default: its name, for messages, and all others."""
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        default = TrainingArguments.__dataclass_fields__[name].default
        if getattr(arguments, name) != default:
            yield f"{name}'", _with(arguments, name, default)
    pairs = (arguments.optim_args or "").split(",") if arguments.optim_args else []
    for pair in pairs:
        rest = ",".join(other for other in pairs if other is not pair)
        yield f"optim_args': {shown(pair.strip(), 80)}", _with(arguments, "optim_args", rest or None)


def _with(arguments: TrainingArguments, name: str, value: Any) -> TrainingArguments:
    changed = copy.copy(arguments)
    setattr(changed, name, value)
    return changed
