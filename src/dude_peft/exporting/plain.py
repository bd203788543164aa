"""The adapter for stock PEFT alone: the same function, without what only our loader reads."""

from __future__ import annotations

import json
from pathlib import Path

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.header import chunks
from dude_peft.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
from dude_peft.artifact.stock import EXTRA_A0, EXTRA_DM, EXTRA_M0
from dude_peft.doors import read_json
from dude_peft.exporting.adapter import SavedAdapter
from dude_peft.model.stream import Piece, write_pieces

_OURS = tuple(f".{name}" for name in (EXTRA_A0, EXTRA_M0, EXTRA_DM))


def write_stock(adapter: SavedAdapter, folder: Path, base_model: str) -> None:
    """Write a stock PEFT adapter that computes the same function: rank 2r where there is a frozen start.

    Args:
        adapter: what is exported.
        folder: where it goes.
        base_model: recorded as its base.
    """
    pieces = [
        Piece(name, stored.dtype, stored.shape, lambda stored=stored: chunks(stored))  # type: ignore[misc]
        for name, stored in adapter.tensors.items()
        if not name.endswith(_OURS)
    ]
    config = read_json(adapter.folder / CONFIG_FILE)
    config["base_model_name_or_path"] = base_model
    write_pieces(folder / WEIGHTS_FILE, {"format": "pt"}, pieces)
    replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
