"""The base model of an adapter as a plain safetensors checkpoint, whatever it is stored as."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.artifact.checkpoint import Checkpoint, open_checkpoint
from dude_peft.errors import ConfigError
from dude_peft.export.adapter import SavedAdapter
from dude_peft.init.architecture import empty_model, fetch_checkpoint, parameter_names
from dude_peft.show import shown
from dude_peft.train.config import ModelSection
from dude_peft.train.model import folder_of, load_model, load_tokenizer, locate


@dataclass(frozen=True)
class Base:
    """A base model on disk, in transformers' own layout, not loaded."""

    source: ModelSection
    """Where it comes from; `load_model` loads it."""
    folder: Path
    checkpoint: Checkpoint
    model: Any
    """The model on the meta device."""
    names: dict[int, list[str]]
    """Names of every parameter of the model, by its id."""


def source_of(adapter: SavedAdapter, name: str | None, gguf_file: str | None) -> ModelSection:
    """Which base model an adapter means, or the user says.

    Raises:
        ConfigError: neither tells.
    """
    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"adapter {shown(adapter.folder, 300)} names no base model; give it with --base")
    section = ModelSection(name_or_path=name, gguf_file=gguf_file, revision=adapter.config.revision)
    folder = folder_of(name)
    if gguf_file is not None or folder is None or (folder / "config.json").is_file():
        return section
    ggufs = [path.name for path in folder.glob("*.gguf")]
    return section.model_copy(update={"gguf_file": ggufs[0]}) if len(ggufs) == 1 else section


@contextmanager
def open_base(source: ModelSection, scratch: Path) -> Iterator[Base]:
    """The base model as a plain checkpoint; what is stored otherwise (GGUF) is written out in `scratch` for the time.

    Raises:
        ConfigError: it cannot be found, or is no causal language model.
        ArtifactError: its files are damaged.
    """
    where = locate(source)
    if source.gguf_file is None:
        folder = Path(where) if Path(where).is_dir() else fetch_checkpoint(where, source.revision)
        yield _opened(source, folder)
        return
    folder = scratch / "base"
    try:
        load_model(source, where).save_pretrained(folder)
        load_tokenizer(source, where).save_pretrained(folder)
        yield _opened(source, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _opened(source: ModelSection, folder: Path) -> Base:
    checkpoint = open_checkpoint(folder)
    model = empty_model(source.name_or_path, folder, checkpoint.dtype)
    return Base(source, folder, checkpoint, model, parameter_names(model))
