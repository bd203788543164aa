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

_ANY_RATE, _ANY_STEPS, _PLACES = 1e-4, 1000, 500
_TRIED = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs")


def handed_on(section: TrainSection) -> dict[str, Any]:
    """The fields as Trainer takes them.

    Raises:
        ConfigError: the installed transformers has no such field, it is of another type, the optimizer or the schedule
            refuses it, or the optimizer does not look at it.
    """
    extra = section.extra_arguments
    if not extra and section.lr_scheduler_type != "polynomial":  # it has a last rate, which may be above the run's
        return {}
    checked: dict[str, Any] = {}
    known, hints = {field.name for field in fields(TrainingArguments)}, get_type_hints(TrainingArguments)
    for name, value in extra.items():
        if name not in known:
            raise ConfigError(f"key '{KEY}.{name}': the installed transformers has no such field; update it")
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            told = error.errors(include_url=False)[0]["msg"].lower()
            raise ConfigError(f"key '{KEY}.{name}': {told}, got {shown(repr(value), 120)}") from None
    _check_words(checked)
    _try_out(section, {name: value for name, value in checked.items() if name in _TRIED})
    return checked


def _check_words(extra: Mapping[str, Any]) -> None:
    """Raises ConfigError for text where a number is meant, which transformers would meet in the middle of a run."""
    schedule = extra.get("lr_scheduler_kwargs")
    for name, value in schedule.items() if isinstance(schedule, Mapping) else ():
        if isinstance(value, str) and _is_number(value):
            key = f"{KEY}.lr_scheduler_kwargs.{shown(name, 80)}"
            raise ConfigError(f"key '{key}': {shown(repr(value), 80)} is text; write a finite number")
    given = extra.get("optim_args")
    if given and any("=" not in each for each in given.split(",")):
        raise ConfigError(f"key '{KEY}.optim_args': {shown(repr(given), 80)}; write it as name=value,name=value")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _try_out(section: TrainSection, extra: Mapping[str, Any]) -> None:
    """Makes the optimizer and the schedule over one number, and walks through it, before a model is loaded."""
    number = torch.nn.Parameter(torch.zeros(1))
    try:
        arguments = TrainingArguments(
            output_dir=".",
            optim=section.optim,
            lr_scheduler_type=section.lr_scheduler_type,
            learning_rate=section.learning_rate or _ANY_RATE,
            warmup_steps=section.warmup_steps,
            report_to=[],
            use_cpu=True,
            **extra,
        )
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if settings.get("eps") == 0:  # 0 / 0 in the first step: LoRA's A has no gradient while B is 0
            raise ConfigError(f"section '{KEY}': an epsilon of 0 makes NaN of a gradient that is 0; set one above 0")
        for name, without in _left_out(arguments):
            if Trainer.get_optimizer_cls_and_kwargs(without)[1] == settings:
                raise ConfigError(f"key '{KEY}.{name} has no effect on train.optim: {section.optim}; leave it out")
        total = section.max_steps or _ANY_STEPS
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=kind([number], **settings),
            num_warmup_steps=min(arguments.get_warmup_steps(total), total - 1),
            num_training_steps=total,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs or None,  # type: ignore[arg-type]
        )
        _walk(schedule, total)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
        ImportError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"section '{KEY}': {shown(' '.join(str(error).split()), 300)}; change it") from error


def _walk(schedule: Any, total: int) -> None:
    """Raises ConfigError where the rate of a step is no number from 0 to the run's."""
    for factor in getattr(schedule, "lr_lambdas", ()):
        for step in sorted({total * part // _PLACES for part in range(_PLACES + 1)}):
            share = float(factor(step))
            if not 0.0 <= share <= 1.0 + 1e-9:
                raise ConfigError(
                    f"section '{KEY}': at step {step} the schedule gives {share:g} times train.learning_rate, which is "
                    "no share of it; change lr_scheduler_kwargs"
                )


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
