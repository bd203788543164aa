"""The header of a GGUF file, walked as if a stranger had forged it, before gguf's reader believes its counts.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from dude_peft.doors import check_size, open_file
from dude_peft.errors import ArtifactError
from dude_peft.show import quoted, shown

_MAGIC = b"GGUF"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_WHOLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS, _MOST_DIMENSIONS = 65_536, 400_000, 4_000_000, 8
_LAYERS, _SIDES = ".block_count", (".embedding_length", ".feed_forward_length", ".vocab_size", ".attention.head_count")


def check_gguf_file(path: Path) -> None:
    """Refuse a GGUF file whose header does not fit into it, or is another model's than its tensors.

    Raises:
        ArtifactError: it is damaged, or no GGUF file.
    """
    try:
        with open_file(path) as file:
            size = path.stat().st_size
            _walk(_Reader(file, size))
    except (OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"{shown(path, 300)} is not a complete GGUF file ({shown(reason, 200)}); copy or download it again"
        ) from error


@dataclass
class _Reader:
    file: BinaryIO
    size: int
    order: str = "<"
    whole: dict[str, int] = field(default_factory=dict)
    """The whole numbers among the values."""

    def number(self, kind: str) -> int:
        found: int = struct.unpack(self.order + kind, self.file.read(struct.calcsize(self.order + kind)))[0]
        return found

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("a value extends past the end of the file")
        self.file.seek(count, 1)

    def skip_strings(self, count: int) -> None:
        """In one loop: a vocabulary has so many that a call for each would take most of the time."""
        read, seek, place = self.file.read, self.file.seek, self.file.tell()
        unpack = struct.Struct(self.order + "Q").unpack
        for _ in range(count):
            place += 8 + unpack(read(8))[0]
            if place > self.size:
                raise ValueError("a value extends past the end of the file")
            seek(place)

    def string(self) -> bytes:
        length = self.number("Q")
        if length > self.size - self.file.tell():
            raise ValueError("a string extends past the end of the file")
        return self.file.read(length)

    def value(self, key: str, kind: int, depth: int = 0) -> None:
        if kind in _WHOLE and depth == 0:
            self.whole[key] = self.number(_WHOLE[kind])
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and depth < 2:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
                return
            if count > _MOST_STRINGS:
                raise ValueError(f"the list {quoted(key)} is longer than {_MOST_STRINGS:,}")
            if inner == _STRING:
                self.skip_strings(count)
                return
            for _ in range(count):
                self.value(key, inner, depth + 1)
        else:
            raise ValueError(f"{quoted(key)} has an unknown type")


def _walk(reader: _Reader) -> None:
    if reader.file.read(4) != _MAGIC:
        raise ValueError("it does not start with the GGUF magic number")
    if reader.number("I") & 0xFFFF == 0:
        reader.order = ">"
    tensors, keys = reader.number("Q"), reader.number("Q")
    if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
        raise ValueError("its counts are not valid")
    for _ in range(keys):
        key = reader.string().decode("utf-8", "replace")
        reader.value(key, reader.number("I"))
    largest = 0
    for _ in range(tensors):
        reader.string()
        dimensions = reader.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError("a tensor has too many dimensions")
        shape = [reader.number("Q") for _ in range(dimensions)]
        reader.number("I")
        # No format takes less than a bit a number.
        if math.prod(shape) > 8 * reader.size or reader.number("Q") > reader.size:
            raise ValueError("a tensor lies past the end of the file")
        largest = max(largest, *shape, 0)
    for key, number in reader.whole.items():
        if key.endswith((_LAYERS, *_SIDES)):
            check_size(key, number, tensors, largest, layers=key.endswith(_LAYERS))
