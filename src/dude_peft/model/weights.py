"""Reads a safetensors checkpoint one weight at a time, in a few MiB at a time.

The files are read, not mapped: pages of a mapping count as the process's memory until they are let go, and a file that
shrinks under a mapping kills the process. Every header is checked before any work (`header.py`), so that a damaged
checkpoint is refused within a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dude_peft.artifact.fingerprint import TensorPrint
from dude_peft.artifact.header import DTYPES, StoredTensor, chunks, read_header
from dude_peft.core.finite import is_finite
from dude_peft.doors import check_size, read_json, without_duplicates
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.kinds import LONGEST_NAME
from dude_peft.show import shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIDES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "d_model", "n_embd", "n_inner", "d_ff",
    "ffn_dim", "dim", "head_dim", "num_attention_heads", "num_key_value_heads", "n_head",
)  # fmt: skip


@dataclass(frozen=True)
class WeightFiles:
    """All tensors of a checkpoint, none of them read."""

    tensors: dict[str, StoredTensor]
    files: list[str]
    """Names of its files, in order."""
    identity: list[list[Any]]
    """Name, size, time of change and sha256 of the header of every file: a resumed run compares them."""

    @property
    def dtype(self) -> torch.dtype:
        """The first float dtype in it, which is what transformers loads it in where config.json is silent."""
        return next((DTYPES[t.dtype] for t in self.tensors.values() if t.dtype in DTYPES), torch.float32)


def open_weights(folder: Path) -> WeightFiles:
    """The tensors of the checkpoint in a folder, found by its index or in its only file.

    Raises:
        ConfigError: there are no safetensors weights.
        ArtifactError: a file is missing or damaged, the index does not fit the files, or config.json the weights.
    """
    checkpoint = _found(folder)
    if (folder / "config.json").is_file():
        _check_sizes(folder / "config.json", checkpoint)
    return checkpoint


def check_weights(folder: Path) -> WeightFiles | None:
    """A folder's safetensors weights, where it has some, looked at before transformers makes room for them.

    Raises:
        ArtifactError: a file is missing or damaged, or config.json is another model's.
    """
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        return open_weights(folder)
    return None


def _found(folder: Path) -> WeightFiles:
    if (folder / SINGLE).exists():
        header = read_header(folder / SINGLE)
        return WeightFiles(header.tensors, [SINGLE], [header.identity])
    if not (folder / INDEX).exists():
        raise ConfigError(
            f"model {shown(folder, 300)}: no {SINGLE} and no {INDEX}; only safetensors checkpoints can be read; "
            "convert others with save_pretrained"
        )
    places = _read_index(folder / INDEX)
    files = sorted(set(places.values()))
    if absent := [file for file in files if not (folder / file).exists()]:
        raise ArtifactError(
            f"{shown(folder / absent[0], 300)} is missing ({len(absent)} of {len(files)} shards are missing); "
            "download it again"
        )
    headers = {file: read_header(folder / file) for file in files}
    found = {}
    for name, file in places.items():
        if name not in headers[file].tensors:
            raise ArtifactError(
                f"{shown(folder / INDEX, 300)}: tensor '{shown(name)}' is not in {shown(file)}; download both again"
            )
        found[name] = headers[file].tensors[name]
    return WeightFiles(found, files, [headers[file].identity for file in files])


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
    weight = torch.empty(stored.shape, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    flat, digest, done = weight.view(-1), xxhash.xxh3_128(), 0
    for view in chunks(stored):
        chunk = torch.frombuffer(view, dtype=DTYPES[stored.dtype]).to(dtype)
        digest.update(chunk.view(torch.uint8).numpy().data)
        flat[done : done + chunk.numel()] = chunk
        done += chunk.numel()
    name = str(dtype).removeprefix("torch.")
    return weight, {"dtype": name, "shape": list(stored.shape), "xxh3_128": digest.hexdigest()}


def print_of(stored: StoredTensor, dtype: torch.dtype, *, finite: bool = False) -> TensorPrint:
    """Fingerprint of a tensor as the model has it in memory, a few MiB of it at a time.

    Args:
        stored: where it lies.
        dtype: the model's own.
        finite: refuse NaN and Inf.

    Raises:
        NumericsError: one is found, in the file, or once its values are in the model's dtype.
    """
    digest, name = xxhash.xxh3_128(), str(dtype).removeprefix("torch.")
    for view in chunks(stored):
        chunk = torch.frombuffer(view, dtype=DTYPES[stored.dtype]).to(dtype)
        if finite and not is_finite(chunk):
            raise NumericsError(
                f"tensor '{shown(stored.name)}' has NaN or Inf in {name}; download the checkpoint again, or choose "
                "another --dtype"
            )
        digest.update(chunk.view(torch.uint8).numpy().data)
    return {"dtype": name, "shape": list(stored.shape), "xxh3_128": digest.hexdigest()}


def fits(stored: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every value of a tensor on disk; what is no float needs none."""
    source = DTYPES.get(stored.dtype)
    if source is None or torch.promote_types(source, dtype) == dtype:
        return True
    values = (torch.frombuffer(view, dtype=source) for view in chunks(stored))
    return all(torch.equal(chunk.to(dtype).to(source), chunk) for chunk in values)


def loads_as(stored: StoredTensor, recorded: TensorPrint) -> bool:
    """Whether a tensor on disk, loaded in the recorded dtype, has the recorded values."""
    dtype = getattr(torch, recorded["dtype"], None)
    if list(stored.shape) != recorded["shape"] or not isinstance(dtype, torch.dtype) or stored.dtype not in DTYPES:
        return False
    return print_of(stored, dtype) == recorded


def is_plain(stored: StoredTensor) -> bool:
    """Whether the tensor is a float matrix that can be read."""
    return stored.dtype in DTYPES and len(stored.shape) == 2


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = read_json(path, object_pairs_hook=without_duplicates)["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise TypeError("weight_map must map tensor names to file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise ArtifactError(f"{shown(path, 300)} cannot be used ({shown(reason, 200)}); download it again") from error
    for name, file in places.items():
        # A name, never a path: an index from elsewhere must not make us read files outside its folder.
        plain = Path(file).name == file and "\\" not in file and len(file.encode("utf-8", "replace")) <= LONGEST_NAME
        if not plain or not file.endswith(".safetensors"):
            raise ArtifactError(
                f"{shown(path, 300)}: tensor '{shown(name)}' lies in '{shown(file)}', which is not the name of a "
                "shard; use the checkpoint's own index"
            )
    return places


def _check_sizes(config: Path, checkpoint: WeightFiles) -> None:
    """Refuse settings that are far from the weights beside them: a model of such sizes fills the memory, or hours."""
    largest = max((side for stored in checkpoint.tensors.values() for side in stored.shape), default=0)
    try:
        settings = read_json(config)
        for part in (settings, *settings.values()):
            for key in (*_LAYERS, *_SIDES) if isinstance(part, dict) else ():
                if isinstance(value := part.get(key), int):
                    check_size(key, value, len(checkpoint.tensors), largest, layers=key in _LAYERS)
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{shown(config, 300)} cannot be used ({shown(error, 300)}); download it again") from error
