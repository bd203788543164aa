"""The adapter for stock PEFT alone: the same function, without what only our loader reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.header import chunks
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
from dude_peft.artifact.stock import STOCK_NAMES, stock_names
from dude_peft.doors import read_json
from dude_peft.errors import ConfigError
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.model.stream import Piece, write_pieces
from dude_peft.show import shown
from dude_peft.tuner.stacks import stack_in

_PREFIX = "base_model.model."


def write_stock(adapter: SavedAdapter, folder: Path, base_model: str, model: nn.Module) -> None:
    """Write a stock PEFT adapter that computes the same function: rank 2r where there is a frozen start.

    Args:
        adapter: what is exported.
        folder: where it goes.
        base_model: recorded as its base.
        model: the base model, on any device.

    Raises:
        ConfigError: stock PEFT takes the sides of a stack of experts for each other.
    """
    extra = tuple(f".{name}" for name in stock_names(adapter.config.spec) if name not in STOCK_NAMES)
    places = _places(adapter.stacks, model)
    pieces = [
        Piece(_renamed(name, places), stored.dtype, stored.shape, lambda stored=stored: chunks(stored))  # type: ignore[misc]
        for name, stored in adapter.tensors.items()
        if not name.endswith(extra)
    ]
    config = read_json(adapter.folder / CONFIG_FILE) if adapter.config.is_stock else _stock(adapter)
    config["base_model_name_or_path"] = base_model
    write_pieces(folder / WEIGHTS_FILE, {"format": "pt"}, pieces)
    replace_file(folder / CONFIG_FILE, (json_text(config, indent=2, sort_keys=True) + "\n").encode())


def _places(stacks: Sequence[str], model: nn.Module) -> dict[str, str]:
    """Names of stacks -> where stock PEFT has their tensors.

    It nests its layers of one module in the order of the module's parameters, the last one outside.
    """
    places = {}
    for name in stacks:
        place, _, last = name.rpartition(".")
        module = model.get_submodule(place)
        # PEFT asks the module alone, and takes silence for (experts, out, in).
        if stack_in(module, last).transposed and not getattr(module, "is_transposed", False):
            raise ConfigError(
                f"--to peft: stock PEFT takes the sides of '{shown(name)}' for each other, because "
                f"{type(module).__name__} does not say which is which; use --to merged"
            )
        own = [one for one, _ in module.named_parameters(recurse=False) if f"{place}.{one}" in stacks]
        places[name] = place + ".base_layer" * (len(own) - 1 - own.index(last))
    return places


def _renamed(key: str, places: Mapping[str, str]) -> str:
    name, _, rest = key.removeprefix(_PREFIX).partition(".lora_")
    return f"{_PREFIX}{places[name]}.lora_{rest}" if name in places else key


def _stock(adapter: SavedAdapter) -> dict[str, Any]:
    config: dict[str, Any] = adapter.config.stock().to_dict()  # type: ignore[no-untyped-call]
    config["target_modules"] = sorted(config["target_modules"] or ())
    return config
