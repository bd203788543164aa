"""The header of a safetensors file, read as if a stranger had forged it.

Nothing is allocated on the file's word: the header's size and its number of values are bounded before it is parsed, and
every tensor has to lie inside the file, one behind the other, with as many bytes as its shape takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dude_peft.doors import open_file, parse_json, without_duplicates
from dude_peft.errors import ArtifactError
from dude_peft.show import shown

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Ten times what the largest models of today have in one file; parsing it takes less than 0.5 s and 50 MB.
_LARGEST_BYTES, _MOST_VALUES = 16 << 20, 400_000
_MOST_DIMENSIONS, _LARGEST_DIMENSION = 8, 1 << 40
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: str
    name: str
    dtype: str
    """As safetensors names it: BF16, F32, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    """What one file says of itself."""

    tensors: dict[str, StoredTensor]
    """In the file's order of bytes."""
    metadata: dict[str, str]
    identity: list[Any]
    """Name, size, time of change and sha256 of the header: who resumes compares them."""


def read_header(path: Path) -> Header:
    """The tensors of a safetensors file, none of them read.

    Raises:
        ArtifactError: the file is no whole safetensors file.
    """
    try:
        with open_file(path) as file:
            status = path.stat()
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(status.st_size - 8, _LARGEST_BYTES):
                raise ValueError("its header's length is not valid")
            raw = file.read(size)
        if raw.count(b",") > _MOST_VALUES:
            raise ValueError(f"its header holds more than {_MOST_VALUES:,} values")
        content = parse_json(raw, object_pairs_hook=without_duplicates)
        if not isinstance(content, dict):
            raise ValueError("its header is not a JSON object")
        metadata = content.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata values are not strings")
        tensors = _laid_out(path, content, 8 + size, status.st_size - 8 - size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason: Any = f"a tensor has no {error}" if isinstance(error, KeyError) else error
        reason = getattr(error, "strerror", None) or reason
        raise ArtifactError(
            f"{shown(path, 300)} is not a complete safetensors file ({shown(reason, 200)}); copy or download it again"
        ) from error
    identity = [path.name, status.st_size, status.st_mtime_ns, hashlib.sha256(raw).hexdigest()]
    return Header(tensors, metadata, identity)


def chunks(stored: StoredTensor, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[memoryview]:
    """The bytes of one tensor in pieces, each valid until the next is asked for.

    Raises:
        ArtifactError: the file ends early.
    """
    return (view for _, view in pieces([stored], chunk_bytes))


def pieces(
    tensors: Sequence[StoredTensor], chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[tuple[StoredTensor, memoryview]]:
    """`chunks` of several tensors, each with its tensor, in their order.

    Args:
        tensors: of one file, which is opened once.
        chunk_bytes: of a piece at most.

    Raises:
        ArtifactError: the file ends early.
    """
    if not tensors:
        return
    buffer = memoryview(bytearray(min(chunk_bytes, max(stored.size for stored in tensors) or 1)))
    with open_file(tensors[0].file) as file:
        for stored in tensors:
            file.seek(stored.offset)
            left = stored.size
            while left:
                view = buffer[: min(left, len(buffer))]
                _fill(file, view, stored)
                left -= len(view)
                yield stored, view


def stored_sha256(tensors: Sequence[StoredTensor]) -> dict[str, str]:
    """Name -> hexadecimal sha256 of a tensor's bytes on disk, which is `fingerprint.sha256_of` of its values.

    Args:
        tensors: of one file.

    Raises:
        ArtifactError: the file ends early.
    """
    digests = {stored.name: hashlib.sha256() for stored in tensors}
    for stored, view in pieces(tensors):
        digests[stored.name].update(view)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def byte_count(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of this dtype and shape takes in a file."""
    return math.prod(shape) * _BITS[dtype] // 8


def _fill(file: Any, view: memoryview, stored: StoredTensor) -> None:
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise ArtifactError(
                f"{shown(stored.file, 300)} ends within tensor '{shown(stored.name)}': it changed while it was read; "
                "try again when the file is complete"
            )
        filled += count


def _laid_out(path: Path, content: dict[str, Any], data_start: int, data_bytes: int) -> dict[str, StoredTensor]:
    entries = [_entry(path, name, entry, data_start) for name, entry in content.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.size))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            raise ValueError(f"tensor {shown(entry.name)!r} does not begin where the one before it ends")
        end += entry.size
    if end != data_start + data_bytes:
        what = "it is cut short" if end > data_start + data_bytes else "there are extra bytes after its last tensor"
        raise ValueError(what)
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    shape, (start, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    check: Callable[[Any], bool] = lambda number: type(number) is int and number >= 0  # noqa: E731
    if not all(map(check, (*shape, start, end))) or start > end:
        raise ValueError(f"tensor {shown(name)!r}: its shape or offsets are not whole numbers in ascending order")
    if len(shape) > _MOST_DIMENSIONS or any(side > _LARGEST_DIMENSION for side in shape):
        raise ValueError(f"tensor {shown(name)!r}: its shape is not valid")
    if dtype not in _BITS:
        raise ValueError(f"tensor {shown(name)!r}: its dtype {shown(dtype)!r} is unknown")
    if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {shown(name)!r}: its bytes do not fit its shape")
    return StoredTensor(str(path), name, dtype, tuple(shape), data_start + start, end - start)
