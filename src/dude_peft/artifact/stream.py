"""Writes an adapter file tensor by tensor: the bytes that `manifest.stamp` writes, without holding the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.manifest import WEIGHTS_FILE, sealed_metadata, sorted_header

# safetensors puts wide dtypes first, so that every tensor lies aligned; adapters have these two.
_ORDER = {"F64": 0, "F32": 1}


@dataclass(frozen=True)
class Piece:
    """One tensor of the file, not read yet."""

    name: str
    dtype: str
    """F32 or F64, as safetensors names them."""
    shape: list[int]
    size_bytes: int
    sha256: str
    read: Callable[[], bytes]


def write_adapter(
    directory: Path,
    config: dict[str, Any],
    base: dict[str, TensorPrint],
    pieces: Sequence[Piece],
    config_file: Path,
) -> None:
    """Write adapter_model.safetensors, whole or not at all.

    Args:
        directory: where it goes.
        config: fields of DudeConfig.
        base: fingerprints of the adapted base weights.
        pieces: the tensors, in any order; read one at a time.
        config_file: the adapter_config.json that will lie beside it.

    Raises:
        OSError: the directory cannot be written; the file that was there stays.
    """
    pieces = sorted(pieces, key=lambda piece: (_ORDER[piece.dtype], piece.name))
    hashes = {piece.name: piece.sha256 for piece in pieces}
    header: dict[str, Any] = {"__metadata__": sealed_metadata(config, base, hashes, config_file)}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.size_bytes
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [start, end]}

    def content() -> Iterator[bytes]:
        yield sorted_header(header)
        for piece in pieces:
            yield piece.read()

    replace_file(directory / WEIGHTS_FILE, content())
