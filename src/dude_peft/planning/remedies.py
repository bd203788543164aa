"""What would make a run fit: the cheapest changes first, each with the bill that it leads to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from dude_peft.config.schema import RunConfig
from dude_peft.methods import METHODS
from dude_peft.planning.bill import Cost

_ENOUGH = 3
_SHORTEST, _SMALLEST_RANK = 128, 4

Evaluate = Callable[[RunConfig, int], Cost]
"""The cost of a run whose longest row has so many tokens."""


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration, and the bytes that the run needs with it."""

    settings: dict[str, Any]
    """Key -> value, as for --set."""
    total: int

    def __str__(self) -> str:
        return " ".join(f"--set {key}={_written(value)}" for key, value in self.settings.items())


def remedies(config: RunConfig, cost: Cost, length: int, memory: int, evaluate: Evaluate) -> list[Remedy]:
    """At most three changes with which the run fits into `memory` bytes; where no single one helps, several together.

    They come in the order of what they cost: memory for time first (smaller batches with more accumulation, gradient
    checkpointing), then rounding (bfloat16 weights, 4-bit ones), then what is trained (rows cut off, a smaller rank).

    Args:
        config: of the run, resolved.
        cost: of it.
        length: tokens of its longest row.
        memory: bytes that there are.
        evaluate: the same bill that `cost` came from.
    """
    found: list[Remedy] = []
    always = _always(cost)
    wide = cost.static.weights > 3 * (cost.static.total_parameters - cost.static.trainable_parameters)
    ways = list(_ways(config, length, wide, packed=cost.static.packed_parameters > 0))
    for steps in ways:
        smallest = steps[-1]
        changes_static = any(key.startswith(("model.", "adapter.")) for key in smallest)
        if always > memory and not changes_static:
            continue
        tried = _tried(config, smallest, length, evaluate)
        if tried > memory:
            continue
        for step in steps:  # the smallest change of this way that is enough
            total = tried if step is smallest else _tried(config, step, length, evaluate)
            if total <= memory:
                found.append(Remedy(step, total))
                break
        if len(found) == _ENOUGH:
            return found
    return found or _together(config, ways, length, memory, evaluate)


def _together(
    config: RunConfig, ways: list[list[dict[str, Any]]], length: int, memory: int, evaluate: Evaluate
) -> list[Remedy]:
    """The shortest run of the ways, each at its largest change, that is enough; nothing where all are not."""
    settings: dict[str, Any] = {}
    for number, steps in enumerate(ways):
        settings = settings | steps[-1]
        if number and (total := _tried(config, settings, length, evaluate)) <= memory:
            return [Remedy(settings, total)]
    return []


def _ways(config: RunConfig, length: int, wide: bool, *, packed: bool) -> Iterator[list[dict[str, Any]]]:
    """Each way as its steps, from the smallest change to the largest."""
    train, r = config.train, config.adapter.r
    batch, micro = train.per_device_train_batch_size, train.gradient_accumulation_steps
    smaller = [batch // 2**n for n in range(1, batch.bit_length())]
    if smaller:
        yield [
            {
                "train.per_device_train_batch_size": rows,
                "train.gradient_accumulation_steps": -(-batch * micro // rows),
            }
            for rows in smaller
        ]
    if not train.gradient_checkpointing:
        yield [{"train.gradient_checkpointing": True}]
    if wide:  # float32 weights
        yield [{"model.dtype": "bfloat16"}]
    plain = not packed and config.model.quantization is None and config.model.gguf_file is None
    if plain and not config.adapter.foreign and _has_bitsandbytes():
        yield [{"model.quantization": "nf4"}]
    if lengths := [length // 2**n for n in (1, 2, 3) if length // 2**n >= _SHORTEST]:
        yield [{"data.max_length": tokens} for tokens in lengths]
    ranks = [r // 2**n for n in range(1, r.bit_length()) if r // 2**n >= _SMALLEST_RANK]
    if ranks and not config.adapter.foreign and METHODS[config.adapter.method].ranked:
        yield [{"adapter.r": rank} for rank in ranks]


def _tried(config: RunConfig, settings: dict[str, Any], length: int, evaluate: Evaluate) -> int:
    return evaluate(changed(config, settings), min(length, settings.get("data.max_length", length))).bill.total


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The run with some keys ("train.bf16") replaced."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(update={name: _with(getattr(config, name), update) for name, update in sections.items()})


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _with(section: BaseModel, update: dict[str, Any]) -> BaseModel:
    """Read again, because a value may be short for a section."""
    return type(section).model_validate({**dict(section), **update})


def _always(cost: Cost) -> int:
    """Bytes that live whatever the batch is."""
    bill = cost.bill
    return bill.weights + bill.adapter_frozen + bill.trained + bill.optimizer + bill.runtime


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
