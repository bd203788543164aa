"""Reads a safetensors checkpoint one weight at a time, in a few MiB at a time.

The files are read, not mapped: pages of a mapping count as the process's memory until they are let go, and a file that
shrinks under a mapping kills the process. Every header is checked before any work, so that a damaged checkpoint is
refused within a second.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.data.show import shown
from dude_peft.errors import ArtifactError, ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LARGEST_HEADER_BYTES = 100 << 20
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


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, none of them read."""

    tensors: dict[str, StoredTensor]
    identity: list[list[Any]]
    """Name, size, time of change and sha256 of the header of every file: a resumed run compares them."""

    @property
    def dtype(self) -> torch.dtype:
        """The first float dtype in it, which is what transformers loads it in where config.json is silent."""
        return next((_DTYPES[t.dtype] for t in self.tensors.values() if t.dtype in _DTYPES), torch.float32)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of the checkpoint in a folder, found by its index or in its only file.

    Raises:
        ConfigError: there are no safetensors weights.
        ArtifactError: a file is missing or damaged, or the index does not fit the files.
    """
    if (folder / SINGLE).is_file():
        tensors, identity = _read_header(folder / SINGLE)
        return Checkpoint(tensors, [identity])
    if not (folder / INDEX).is_file():
        raise ConfigError(
            f"model {shown(folder, 300)}: no {SINGLE} and no {INDEX}; only safetensors checkpoints are read, convert "
            "others with save_pretrained"
        )
    places = _read_index(folder / INDEX)
    files = sorted(set(places.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise ArtifactError(
            f"{shown(folder / absent[0], 300)} is missing ({len(absent)} of {len(files)} shards are); download it again"
        )
    headers = {file: _read_header(folder / file) for file in files}
    found = {}
    for name, file in places.items():
        if name not in headers[file][0]:
            raise ArtifactError(
                f"{shown(folder / INDEX, 300)}: tensor '{shown(name)}' is not in {shown(file)}; download both again"
            )
        found[name] = headers[file][0][name]
    return Checkpoint(found, [headers[file][1] for file in files])


def read_weight(stored: StoredTensor, dtype: torch.dtype) -> tuple[Tensor, TensorPrint]:
    """A weight as the model has it in memory, in float32 (float64 stays), and its fingerprint.

    Args:
        stored: where it lies.
        dtype: the model's own; values are rounded to it first, as loading does.

    Returns:
        The weight in the file's shape, and the fingerprint of its values in `dtype`.

    Raises:
        ArtifactError: the file ends early.
    """
    stored_dtype = _DTYPES[stored.dtype]
    weight = torch.empty(stored.shape, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    flat, digest = weight.view(-1), xxhash.xxh3_128()
    buffer = bytearray(_CHUNK_BYTES)
    done = 0
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.offset)
        while done < flat.numel():
            count = min(flat.numel() - done, _CHUNK_BYTES // stored_dtype.itemsize)
            _fill(file, memoryview(buffer)[: count * stored_dtype.itemsize], stored)
            chunk = torch.frombuffer(buffer, dtype=stored_dtype, count=count).to(dtype)
            digest.update(chunk.view(torch.uint8).numpy().data)
            flat[done : done + count] = chunk
            done += count
    name = str(dtype).removeprefix("torch.")
    return weight, {"dtype": name, "shape": list(stored.shape), "xxh3_128": digest.hexdigest()}


def is_plain(stored: StoredTensor) -> bool:
    """Whether the tensor is a float matrix that can be read."""
    return stored.dtype in _DTYPES and len(stored.shape) == 2


def _fill(file: Any, view: memoryview, stored: StoredTensor) -> None:
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise ArtifactError(
                f"{shown(stored.file, 300)} ends within tensor '{shown(stored.name)}': it changed while it was read; "
                "start again when it is whole"
            )
        filled += count


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise TypeError("weight_map has to map tensor names to file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise ArtifactError(f"{shown(path, 300)} cannot be used ({shown(reason, 200)}); download it again") from error
    for name, file in places.items():
        # A name, never a path: an index from elsewhere must not make us read files outside its folder.
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ArtifactError(
                f"{shown(path, 300)}: tensor '{shown(name)}' lies in '{shown(file)}', no shard's file name; "
                "use the checkpoint's own index"
            )
    return places


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], list[Any]]:
    try:
        with path.open("rb") as file:
            status = path.stat()
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(status.st_size - 8, _LARGEST_HEADER_BYTES):
                raise ValueError("its header's length is impossible")
            raw = file.read(size)
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {
            name: _entry(path, name, entry, 8 + size, status.st_size - 8 - size) for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{shown(path, 300)} is no whole safetensors file ({shown(error, 200)}); download it again"
        ) from error
    return tensors, [path.name, status.st_size, status.st_mtime_ns, hashlib.sha256(raw).hexdigest()]


def _entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> StoredTensor:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"tensor {shown(name)!r}: shape and offsets are not whole numbers")
    if not start <= end <= data_bytes:
        raise ValueError(f"tensor {shown(name)!r} lies beyond the end of the file")
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {shown(name)!r}: its bytes do not fit its shape")
    return StoredTensor(str(path), name, entry["dtype"], tuple(shape), data_start + start)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)!r} stands in it twice")
    return found
