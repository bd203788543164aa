"""Writes safetensors files tensor by tensor, without holding them: the bytes that safetensors itself would write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.header import DTYPES, StoredTensor, byte_count, chunks
from dude_peft.artifact.manifest import WEIGHTS_FILE, BaseRecord, sealed_metadata, sorted_header
from dude_peft.errors import NumericsError
from dude_peft.model.weights import INDEX, SINGLE
from dude_peft.show import shown

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, not made or read yet."""

    name: str
    dtype: str
    """As safetensors names it: BF16, F32, ..."""
    shape: tuple[int, ...]
    content: Callable[[], Iterable[Any]]
    """Gives its bytes, in as many buffers as it likes."""
    sha256: str = ""
    """Of its bytes, where it is known."""

    @property
    def size(self) -> int:
        """Bytes."""
        return byte_count(self.dtype, self.shape)


def write_pieces(
    path: Path, metadata: dict[str, str], pieces: Sequence[Piece], done: Callable[[], None] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, in safetensors' own order: wide dtypes first, so all lie aligned.

    Args:
        path: of the file.
        metadata: of its header.
        pieces: its tensors in any order, made one at a time.
        done: called behind each.

    Raises:
        OSError: the folder cannot be written; the file that was there stays.
    """
    pieces = sorted(pieces, key=lambda piece: (-byte_count(piece.dtype, (8,)), piece.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.size
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [start, end]}

    def content() -> Iterator[Any]:
        yield sorted_header(header)
        for piece in pieces:
            yield from piece.content()
            if done is not None:
                done()

    replace_file(path, content())


def stored_piece(key: str, stored: StoredTensor, dtype: torch.dtype | None) -> Piece:
    """A tensor of another file under a name, in a float dtype where one is given and it is a float.

    Raises NumericsError, when its content is made, where it overflows that dtype.
    """
    source = DTYPES.get(stored.dtype)
    if dtype is None or source is None or dtype == source:
        return Piece(key, stored.dtype, stored.shape, lambda: chunks(stored))

    def cast() -> Iterator[Any]:
        for view in chunks(stored):
            values = torch.frombuffer(view, dtype=source)
            changed = values.to(dtype)
            if not bool(torch.isfinite(changed).all()) and bool(torch.isfinite(values).all()):
                raise NumericsError(f"'{shown(key)}' overflows {dtype}; choose --dtype bfloat16 or float32")
            yield changed.view(torch.uint8).numpy().data

    return Piece(key, NAMES[dtype], stored.shape, cast)


def write_checkpoint(folder: Path, files: dict[str, list[Piece]], done: Callable[[], None] | None = None) -> None:
    """Write the weights of a model into a folder, and the index that tells which file holds what, where one is wanted.

    Args:
        folder: of the model.
        files: tensors of each file.
        done: called behind each tensor.

    Raises:
        OSError: the folder cannot be written.
    """
    for file, pieces in files.items():
        write_pieces(folder / file, {"format": "pt"}, pieces, done)
    if len(files) > 1 or SINGLE not in files:
        places = {piece.name: file for file, pieces in files.items() for piece in pieces}
        size = sum(piece.size for pieces in files.values() for piece in pieces)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        replace_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_adapter(
    directory: Path,
    config: dict[str, Any],
    base: BaseRecord,
    pieces: Sequence[Piece],
    config_file: Path,
) -> None:
    """Write adapter_model.safetensors as `manifest.stamp` does, whole or not at all.

    Args:
        directory: where it goes.
        config: fields of DudeConfig.
        base: what is remembered of the base model.
        pieces: the tensors with their hashes, in any order; read one at a time.
        config_file: the adapter_config.json that will lie beside it.

    Raises:
        OSError: the directory cannot be written; the file that was there stays.
    """
    hashes = {piece.name: piece.sha256 for piece in pieces}
    metadata = sealed_metadata(config, base, hashes, config_file)
    write_pieces(directory / WEIGHTS_FILE, metadata, pieces)
