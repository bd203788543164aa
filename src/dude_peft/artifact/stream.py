"""Writes safetensors files tensor by tensor, without holding them: the bytes that safetensors itself would write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.header import byte_count
from dude_peft.artifact.manifest import WEIGHTS_FILE, BaseRecord, sealed_metadata, sorted_header


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
