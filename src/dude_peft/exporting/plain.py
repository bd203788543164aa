"""The adapter for stock PEFT alone: the same function, without what only our loader reads."""

from __future__ import annotations

from pathlib import Path

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.header import chunks
from dude_peft.artifact.json_text import json_text
from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
from dude_peft.artifact.stock import STOCK_NAMES, stock_names
from dude_peft.doors import read_json
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.model.stream import Piece, write_pieces


def write_stock(adapter: SavedAdapter, folder: Path, base_model: str) -> None:
    """Write a stock PEFT adapter that computes the same function: rank 2r where there is a frozen start.

    Args:
        adapter: what is exported.
        folder: where it goes.
        base_model: recorded as its base.
    """
    extra = tuple(f".{name}" for name in stock_names(adapter.config.spec) if name not in STOCK_NAMES)
    pieces = [
        Piece(name, stored.dtype, stored.shape, lambda stored=stored: chunks(stored))  # type: ignore[misc]
        for name, stored in adapter.tensors.items()
        if not name.endswith(extra)
    ]
    config = read_json(adapter.folder / CONFIG_FILE)
    config["base_model_name_or_path"] = base_model
    write_pieces(folder / WEIGHTS_FILE, {"format": "pt"}, pieces)
    replace_file(folder / CONFIG_FILE, (json_text(config, indent=2, sort_keys=True) + "\n").encode())
