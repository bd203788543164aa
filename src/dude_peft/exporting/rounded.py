"""A checkpoint in the dtype in which an adapter was trained on it, where the files are wider."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dude_peft.artifact.companions import companions, copy_files
from dude_peft.artifact.durable import check_space, replace_file
from dude_peft.artifact.manifest import BaseRecord
from dude_peft.doors import read_json
from dude_peft.model.layout import Layout
from dude_peft.model.stream import Piece, stored_piece, write_checkpoint
from dude_peft.model.weights import WeightFiles, fits


def narrower_dtype(layout: Layout, base: BaseRecord) -> torch.dtype | None:
    """The dtype of the adapted weights in training, where it cannot hold what the files do; None where it can."""
    if base.dtype is None:
        return None
    dtype: torch.dtype = getattr(torch, base.dtype)
    found = (layout.whole([f"{name}.weight"]) for name in base.layers)
    return None if all(place is None or fits(place, dtype) for place in found) else dtype


def write_rounded(
    source: Path, checkpoint: WeightFiles, layout: Layout, base: BaseRecord, dtype: torch.dtype, folder: Path
) -> None:
    """Write a model as training had it in memory: every float in its own dtype of then, a few MiB at a time.

    Args:
        source: the folder of the model.
        checkpoint: its weights.
        layout: where its parameters lie in them.
        base: what the adapter remembers of it.
        dtype: of all that it does not remember.
        folder: where it goes; empty.

    Raises:
        ResourceError: the disk is too small.
        NumericsError: a number overflows.
    """
    dtypes = {}
    for name, seen in base.beside.items():
        if (stored := layout.whole([name])) is not None:
            dtypes[stored.name] = getattr(torch, seen["dtype"], dtype)
    files: dict[str, list[Piece]] = {file: [] for file in checkpoint.files}
    for key, stored in checkpoint.tensors.items():
        files[Path(stored.file).name].append(stored_piece(key, stored, dtypes.get(key, dtype)))
    check_space(folder, sum(piece.size for pieces in files.values() for piece in pieces), folder)
    write_checkpoint(folder, files)
    copy_files(source, folder, companions(source))
    config = read_json(source / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
