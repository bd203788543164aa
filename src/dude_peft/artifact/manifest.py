"""The manifest: what our loader has to know beyond the tensors, inside the safetensors file's own metadata.

The directory is a stock PEFT adapter (adapter_config.json + adapter_model.safetensors). The manifest sits in the header
of the safetensors file, where stock readers do not look, so one file carries it all: the DuDe configuration, the
sha256 of every tensor, the fingerprint of the base weights, and the sha256 of adapter_config.json, so that a changed or
foreign half of the pair is noticed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from dude_peft.artifact.durable import replace_file
from dude_peft.artifact.fingerprint import TensorPrint, sha256_of
from dude_peft.artifact.header import DTYPES, StoredTensor, read_header, stored_sha256
from dude_peft.core.threads import single_threaded_pool
from dude_peft.doors import parse_json, read_json
from dude_peft.errors import ArtifactError
from dude_peft.version import __version__

FORMAT_VERSION = 3  # 1: base weights hashed with sha256; 2: the magnitude under a name that transformers does not read
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's: where the base model stands
_SHARES = 16
_KEY, _SEAL = "dude", "dude_sha256"


@dataclass(frozen=True)
class Manifest:
    """What the metadata of an adapter file says."""

    config: dict[str, Any]
    """Fields of DudeConfig."""
    base: dict[str, TensorPrint]
    """Name of every adapted module of the base model -> fingerprint of its weight."""
    tensors: dict[str, str]
    """Name of every tensor in the file -> sha256 of its values."""
    config_sha256: str
    """sha256 of adapter_config.json's content."""
    quantization: dict[str, Any] | None = None
    """How the base model was quantised: `config`, transformers' own settings, and `dtype` of the rest; None: not."""
    beside: dict[str, TensorPrint] | None = None
    """Name of every tensor of the base model that is relied on beside the adapted ones -> its fingerprint."""
    format_version: int = FORMAT_VERSION
    dude_version: str = __version__


def stamp(
    directory: Path,
    config: dict[str, Any],
    base: dict[str, TensorPrint],
    quantization: dict[str, Any] | None = None,
    beside: dict[str, TensorPrint] | None = None,
    left_out: tuple[str, ...] = (),
) -> None:
    """Write the manifest into an adapter directory that PEFT has just saved.

    Weights of the base model that PEFT put into the file beside an adapted output layer are left out: the base is
    untouched, and the fingerprint stands for it.

    Args:
        directory: holds adapter_model.safetensors and adapter_config.json.
        config: fields of DudeConfig.
        base: fingerprints of the adapted base weights.
        quantization: how the base is quantised, if it is.
        beside: fingerprints of what else the adapter relies on; those of saved tensors are left out.
        left_out: beginnings of the names of tensors that PEFT put into the file and no loader needs.

    Raises:
        OSError: the directory cannot be written; the file that was there stays.
    """
    path = directory / WEIGHTS_FILE
    tensors = safetensors.torch.load_file(path)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(left_out)}
    hashes = {name: sha256_of([tensor]) for name, tensor in tensors.items()}
    beside = {name: seen for name, seen in (beside or {}).items() if f"{_PREFIX}{name}" not in tensors}
    metadata = sealed_metadata(config, base, hashes, directory / CONFIG_FILE, quantization, beside)
    replace_file(path, _with_sorted_header(safetensors.torch.save(tensors, metadata)))


def sealed_metadata(
    config: dict[str, Any],
    base: dict[str, TensorPrint],
    tensors: dict[str, str],
    config_file: Path,
    quantization: dict[str, Any] | None = None,
    beside: dict[str, TensorPrint] | None = None,
) -> dict[str, str]:
    """Metadata of an adapter file: the manifest and its hash.

    Args:
        config: fields of DudeConfig.
        base: fingerprints of the adapted base weights.
        tensors: name of every tensor in the file -> sha256 of its values.
        config_file: the adapter_config.json that goes with it.
        quantization: how the base is quantised, if it is.
        beside: fingerprints of what else the adapter relies on.
    """
    manifest = Manifest(config, base, tensors, _json_sha256(config_file), quantization, beside or None)
    fields = {name: value for name, value in asdict(manifest).items() if value is not None}
    text = json.dumps(fields, sort_keys=True)
    return {"format": "pt", _KEY: text, _SEAL: _text_sha256(text)}


def read_manifest(directory: Path) -> Manifest:
    """Manifest of an adapter directory, with every tensor and the configuration checked against it.

    Raises:
        ArtifactError: a file is missing, damaged, edited, from another format version, or not ours.
    """
    path = directory / WEIGHTS_FILE
    for wanted in (path, directory / CONFIG_FILE):
        if not wanted.is_file():
            raise ArtifactError(_missing(directory, wanted))
    header = read_header(path)
    if _KEY not in header.metadata:
        raise ArtifactError(
            f"'{path}' carries no DuDe manifest, it was not saved by PEFT's save_pretrained with a DudeConfig; load it "
            "with peft.PeftModel"
        )
    sealed = {"format": "pt", _KEY: header.metadata[_KEY], _SEAL: _text_sha256(header.metadata[_KEY])}
    if header.metadata != sealed:
        raise ArtifactError(f"'{path}': the DuDe manifest is damaged (its hash differs); copy the file again")
    manifest = _parse(header.metadata[_KEY], path)
    _check_names(set(header.tensors), set(manifest.tensors), path)
    stored = list(header.tensors.values())
    shares = [stored[first::_SHARES] for first in range(min(_SHARES, len(stored)))]  # a task a tensor costs more
    with single_threaded_pool(len(shares)) as pool:  # reading and hashing let other threads run
        hashes = {name: digest for found in pool.map(_hashes, shares) for name, digest in found.items()}
    for name, digest in hashes.items():
        if digest != manifest.tensors[name]:
            raise ArtifactError(
                f"'{path}': tensor '{name}' is not what was saved; copy the file again or save it again"
            )
    if _json_sha256(directory / CONFIG_FILE) != manifest.config_sha256:
        raise ArtifactError(
            f"'{directory / CONFIG_FILE}' was changed after saving, or belongs to another adapter; restore it"
        )
    return manifest


def _hashes(tensors: list[StoredTensor]) -> dict[str, str]:
    return {stored.name: stored_sha256(stored) for stored in tensors}


def _missing(directory: Path, wanted: Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles and wanted.name == WEIGHTS_FILE:
        return (
            f"'{directory}' holds {pickles[0]}, a pickle, and no {WEIGHTS_FILE}; pickles are never read: load it with "
            "the PEFT that wrote it and save it again as safetensors"
        )
    return f"'{wanted}' is missing; an adapter is {CONFIG_FILE} and {WEIGHTS_FILE} in one folder"


def _parse(text: str, path: Path) -> Manifest:
    try:
        fields = parse_json(text)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"'{path}' has adapter format {version}, this is dude-peft {__version__} with format {FORMAT_VERSION}; "
                + (
                    "peft.PeftModel loads it for inference, training starts anew"
                    if version in (1, 2)
                    else "upgrade with: pip install -U dude-peft"
                )
            )
        manifest = Manifest(**fields)
        if not all(isinstance(part, dict) for part in (manifest.config, manifest.base, manifest.tensors)):
            raise TypeError("config, base and tensors have to be objects")
        if not _is_quantization(manifest.quantization):
            raise TypeError("quantization has to have a config and a float dtype")
        prints = [*manifest.base.values(), *(manifest.beside or {}).values()]
        if not all(set(entry) == set(TensorPrint.__annotations__) for entry in prints):
            raise TypeError("a fingerprint has to have dtype, shape and xxh3_128")
    except ArtifactError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{path}': the DuDe manifest is damaged ({error}); copy the file again") from error
    return manifest


def _is_quantization(found: Any) -> bool:
    if found is None:
        return True
    known = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
    return isinstance(found, dict) and isinstance(found.get("config"), dict) and found.get("dtype") in known


def _check_names(found: set[str], recorded: set[str], path: Path) -> None:
    missing, extra = sorted(recorded - found), sorted(found - recorded)
    if missing or extra:
        parts = [
            f"{len(names)} {what}, first: {', '.join(names[:5])}"
            for what, names in (("missing", missing), ("not recorded", extra))
            if names
        ]
        raise ArtifactError(f"'{path}': its tensors are not those that were saved ({'; '.join(parts)}); copy it again")


def _json_sha256(path: Path) -> str:
    """Hash of the content, not of its layout: whitespace and the order of keys do not count."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read as JSON ({error}); copy it again") from error
    return _text_sha256(json.dumps(content, sort_keys=True))


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with a sorted header: safetensors orders the metadata by chance, and equal content shall be equal
    bytes.
    """
    size = int.from_bytes(data[:8], "little")
    return sorted_header(json.loads(data[8 : 8 + size])) + data[8 + size :]


def sorted_header(content: dict[str, Any]) -> bytes:
    """Head of a safetensors file: its length, and the header as sorted JSON."""
    header = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
