"""Looked at before anything is written, and behind the last step: that all numbers are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dude_peft.core.finite import first_not_finite
from dude_peft.errors import NumericsError
from dude_peft.folder.state import held
from dude_peft.machine.processes import gathered


def check_numbers(model: Any, step: int, optimizer: Mapping[str, Tensor] | None = None, rest: Any = None) -> None:
    """Looks for NaN and Inf in all that training depends on; every process has to call it, and all of them stop.

    Args:
        model: its trained tensors are looked at, of a sharded one this process's share of each.
        step: steps done, for the message.
        optimizer: tensors of its state.
        rest: what else a checkpoint keeps of optimizer and schedule, as JSON.

    Raises:
        NumericsError: there is one.
    """
    trained = ((name, held(weight)) for name, weight in model.named_parameters() if weight.requires_grad)
    found = (
        first_not_finite(trained)
        or first_not_finite((f"optimizer state {name}", tensor) for name, tensor in (optimizer or {}).items())
        or next((name for name, number in _numbers(rest, "optimizer state") if not math.isfinite(number)), None)
    )
    first = next(filter(None, gathered(found)), None)
    if first is not None:
        raise NumericsError(
            f"{first} has NaN or Inf after step {step}; this step was not saved, lower train.learning_rate"
        )


def _numbers(content: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in a piece of JSON, with its place."""
    if isinstance(content, float):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _numbers(value, f"{name}.{key}")
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from _numbers(value, f"{name}.{index}")
