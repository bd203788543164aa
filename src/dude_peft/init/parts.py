"""The unfinished adapter: a folder beside the files to come, with one file a layer, each whole or absent.

A part is 32 bytes of sha256, then a safetensors file whose metadata say which layer of which init it is. It is trusted
only if both fit, so that a part of other settings, of another checkpoint or of a failing disk is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.fingerprint import TensorPrint, is_print
from dude_peft.artifact.header import byte_count
from dude_peft.artifact.json_text import json_text
from dude_peft.doors import open_file, read_json
from dude_peft.init.layer import LayerStart
from dude_peft.model.stream import Piece

FOLDER = ".dude-init"
_SETTINGS = "settings.json"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Part:
    """One finished layer on disk, its tensors not held."""

    layer: str
    base: TensorPrint
    captured: float | None
    pieces: list[Piece]


class Parts:
    """The parts of one init.

    Args:
        output: the adapter's folder.
        settings: hash of all that the bits depend on.
    """

    def __init__(self, output: Path, settings: str) -> None:
        self.output, self.folder, self.settings = output, output / FOLDER, settings

    def begin(self) -> None:
        """Make the folder; parts of an earlier, interrupted run stay, its half-written files go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.output, self.folder):
            for left in folder.glob(".dude-*"):
                if left.is_file():
                    left.unlink()
        replace_file(self.folder / _SETTINGS, json_text({"settings": self.settings}).encode())

    def write(self, index: int, layer: str, start: LayerStart) -> None:
        """Write one layer's part."""
        metadata = {
            "settings": self.settings,
            "layer": layer,
            "base": json_text(start.base),
            "captured": json_text(start.captured),
        }
        data = safetensors.torch.save(start.tensors, metadata)
        replace_file(self._path(index), hashlib.sha256(data).digest() + data)

    def read(self, index: int, layer: str) -> Part | None:
        """The part of a layer, or None where there is none that can be trusted."""
        path = self._path(index)
        try:
            with open_file(path) as file:
                data = file.read()
        except OSError:
            return None
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # a header that is none of ours
            return self._parsed(path, layer, data)
        return None

    def _parsed(self, path: Path, layer: str, data: bytes) -> Part | None:
        start = _DIGEST_BYTES + 8 + int.from_bytes(data[_DIGEST_BYTES : _DIGEST_BYTES + 8], "little")
        header = json.loads(data[_DIGEST_BYTES + 8 : start])
        metadata = header.pop("__metadata__")
        base, captured = json.loads(metadata["base"]), json.loads(metadata["captured"])
        right = (metadata["settings"], metadata["layer"]) == (self.settings, layer) and is_print(base)
        if not right or not (captured is None or isinstance(captured, (int, float))):
            return None
        pieces = [_piece(path, layer, name, entry, start, data) for name, entry in header.items()]
        return Part(layer, base, captured, pieces)

    def remove(self) -> None:
        """Remove everything; the settings last, so that a removal that is cut short can be taken up again."""
        for path in self.folder.iterdir():
            if path.name != _SETTINGS:
                path.unlink()
        shutil.rmtree(self.folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.part"


def settings_found(output: Path) -> str | None:
    """Hash of the settings of the unfinished init in a folder; None where there is none that can be taken up."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(output / FOLDER / _SETTINGS)["settings"])
    return None


def _piece(path: Path, layer: str, name: str, entry: dict[str, Any], start: int, data: bytes) -> Piece:
    first, last = (start + offset for offset in entry["data_offsets"])
    if byte_count(entry["dtype"], entry["shape"]) != last - first:
        raise ValueError("the sizes do not match")

    def read() -> Iterator[bytes]:
        with open_file(path) as file:
            file.seek(first)
            yield file.read(last - first)

    digest = hashlib.sha256(memoryview(data)[first:last]).hexdigest()
    return Piece(f"base_model.model.{layer}.{name}", entry["dtype"], tuple(entry["shape"]), read, digest)
