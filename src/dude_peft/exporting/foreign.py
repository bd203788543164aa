"""A saved adapter that stock PEFT made: opened and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from dude_peft.artifact.header import StoredTensor, read_header
from dude_peft.artifact.manifest import WEIGHTS_FILE, BaseRecord, check_complete, is_foreign_adapter
from dude_peft.exporting.adapter import refuse_run_folder
from dude_peft.tuner.config import adapter_folder
from dude_peft.tuner.foreign import read_foreign


@dataclass(frozen=True)
class ForeignAdapter:
    """Its folder, whose files are whole and belong together."""

    folder: Path
    config: PeftConfig
    method: str
    """As reports have it: peft:TYPE."""
    record: BaseRecord
    """All of its base model."""
    tensors: dict[str, StoredTensor]
    writing: dict[str, str] | None = None
    """How its run wrote rows (`Manifest.writing`)."""
    quantization: dict[str, Any] | None = None
    """Such an adapter is trained on plain weights here."""


def open_foreign(path: str | Path) -> ForeignAdapter | None:
    """The adapter in a folder or on the hub; None where it is none that stock PEFT made.

    Raises:
        ArtifactError: it is one, and a file is missing, damaged or edited.
        ConfigError: it is a run's own folder.
    """
    refuse_run_folder(Path(path))
    folder = adapter_folder(str(path))
    if not is_foreign_adapter(folder):
        return None
    manifest, config = read_foreign(folder)
    check_complete(folder, manifest)
    tensors = read_header(folder / WEIGHTS_FILE).tensors
    return ForeignAdapter(folder, config, manifest.config["method"], manifest.record, tensors, manifest.writing)
